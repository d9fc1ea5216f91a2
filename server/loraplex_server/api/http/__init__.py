"""The OpenAI-compatible face: HTTP requests become the messages of `loraplex.v1` and run as those do."""
