"""The loraplex server: one frozen 4-bit base model, many adapters in each batch."""
