"""loraplex and transformers + PEFT, the same requests, on the same machine, in one run."""
