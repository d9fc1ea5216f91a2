"""The frozen 4-bit base model, and the runner that turns step plans into tokens."""
