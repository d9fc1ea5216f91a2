"""The place of other projects' files that are carried along only for measuring; git ignores it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".peers"

BITSANDBYTES = FOLDER / "bnb"
"""bitsandbytes with the library for one version of CUDA."""
