"""Counts the bytes of tensors that live at once while some code runs, on any device, meta included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# CUDA's caching allocator rounds block sizes up to a multiple of this.
_GRAIN = 512


class LiveBytes(TorchDispatchMode):
    """Counts the tensors that are created inside a with block, but not those from before.

    Attributes:
        peak: most bytes that were alive at once.
        live: bytes that are alive now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.live = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _is_tensor(leaf):
                storage = leaf.untyped_storage()
                if id(storage) not in given:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // _GRAIN) * _GRAIN

        def ended(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, ended)
        self.live += size
        self.peak = max(self.peak, self.live)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
