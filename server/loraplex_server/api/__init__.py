"""The gRPC face: validates, translates to `core.Request`, streams what the engine generates."""
