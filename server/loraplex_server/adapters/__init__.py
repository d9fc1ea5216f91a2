"""The adapter cache: what an adapter is (`manifest`), its bytes (`weights`), and where it lies (`store`)."""
