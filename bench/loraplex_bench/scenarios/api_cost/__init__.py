"""The cost of the API beside the engine: the real server on an engine that has every token at once."""
