"""The one place that chooses between the torch reference and the Triton kernels.

The choice is made once per process (`set_kernels`, from the server's ``--kernels``) and resolved per device:

=========  ===================  =============================================================
setting    CUDA tensors         CPU tensors
=========  ===================  =============================================================
``auto``   ``triton`` if found  ``torch``
``torch``  ``torch``            ``torch``
``triton`` ``triton``           ``triton`` under its interpreter (``TRITON_INTERPRET=1``) only
=========  ===================  =============================================================

`launches` counts what ran, under ``"<op>.<backend>"`` (for example ``"lora.shrink.triton"``): one per Triton
launch, one per call of a torch op. A replayed CUDA graph runs no Python, so only its capture is counted.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Kernels = Literal["auto", "torch", "triton"]
Backend = Literal["torch", "triton"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels compute with."""

launches: Counter[str] = Counter()

_kernels: Kernels = "auto"


class KernelUnavailableError(RuntimeError):
    """The requested kernels cannot run on this device; the message names the remedy."""


def set_kernels(kernels: Kernels) -> None:
    """Choose the implementation for the whole process. Raises `ValueError` for an unknown name."""
    global _kernels
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Kernels))}; got {kernels!r}")
    _kernels = kernels


def get_kernels() -> Kernels:
    """The setting made by `set_kernels` ("auto" at start)."""
    return _kernels


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block."""
    before = get_kernels()
    set_kernels(kernels)
    try:
        yield
    finally:
        set_kernels(before)


def backend(device: torch.device) -> Backend:
    """The implementation for tensors on `device` under the current setting.

    Raises `KernelUnavailableError` if the setting is ``triton`` and it cannot run.
    """
    if _kernels == "torch" or (_kernels == "auto" and device.type != "cuda"):
        return "torch"
    if not triton_installed():
        if _kernels == "auto":
            return "torch"
        raise KernelUnavailableError("kernels=triton needs the triton package: install it, or use torch")
    if device.type != "cuda" and not interpreting():
        raise KernelUnavailableError(
            f"kernels=triton needs a CUDA device, got {device.type}: use kernels=torch, "
            "or set TRITON_INTERPRET=1 before the process starts to run the interpreter"
        )
    return "triton"


@functools.cache
def triton_installed() -> bool:
    """True if the triton package can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if Triton runs its kernels through its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def count(op: str, chosen: Backend) -> None:
    """Note one launch of `op` on the `chosen` implementation."""
    launches[f"{op}.{chosen}"] += 1
