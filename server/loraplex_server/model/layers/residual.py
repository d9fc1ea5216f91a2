"""The residual stream for bottleneck adapters: the input of the norm before attention or MLP."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from loraplex_kernels.pool import LoraSite


class ResidualStream:
    """Records the residual stream at the start of each sub-block (attention or MLP).

    It does so from the first call of `watch` on; until then norms run without a hook.

    Args:
        norms: maps the entry of the projection that ends a sub-block to the path of the norm that begins it.
    """

    def __init__(self, model: torch.nn.Module, norms: Mapping[int, str]) -> None:
        self._model = model
        self._norms = dict(norms)
        self._watching = False
        # Only the newest is kept: a sub-block ends before the next one begins.
        self._entry = -1
        self._stream: torch.Tensor | None = None

    def watch(self) -> None:
        """Records the stream from the next forward pass on, for `at`."""
        if not self._watching:
            self._watching = True
            for entry, path in self._norms.items():
                norm = self._model.get_submodule(path)
                norm.register_forward_pre_hook(functools.partial(self._note, entry, norm))

    def _note(
        self, entry: int, norm: torch.nn.Module, called: torch.nn.Module, args: tuple[Any, ...]
    ) -> None:
        # Copies of the norm share the hook, and may run on other rows.
        if called is norm:
            self._entry, self._stream = entry, args[0]

    def at(self, site: LoraSite) -> torch.Tensor:
        """The residual stream [T, hidden] to which the output of this site's sub-block will be added.

        Raises:
            RuntimeError: the expected norm did not run at the start of the sub-block.
        """
        if self._stream is None or self._entry != site.first_entry:
            raise RuntimeError(f"the residual stream at entry {site.first_entry} was not noted")
        return self._stream.reshape(-1, self._stream.shape[-1])
