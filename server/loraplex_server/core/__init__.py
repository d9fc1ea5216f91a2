"""The nouns that scheduler, engine, runner and API share. Nothing here imports torch or gRPC."""
