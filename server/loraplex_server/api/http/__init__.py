"""The OpenAI-compatible API: HTTP requests become messages of `loraplex.v1` and run as those do."""
