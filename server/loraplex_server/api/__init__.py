"""The API: checks requests, makes the engine's of them, and streams the answers, by gRPC and HTTP."""
