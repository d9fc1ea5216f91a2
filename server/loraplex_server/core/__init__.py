"""Data types and rules that API, engine, adapters and model share. Nothing here imports torch or gRPC."""
