"""The embedded demo model: text transformations with exact answers, their training and their check."""
