"""Minutes of hard use of a real server, then a look for anything wrong or left behind."""
