"""Tensor operations of loraplex: 4-bit base weights and segmented LoRA products.

Each op is a folder: ``__init__`` is its public face, ``reference`` the plain-torch implementation (which is
also the CPU path), further modules are implementations for one device or instruction set. Nothing here knows
about requests, adapters on disk, or the server, and importing this package imports nothing else.
"""
