"""The residual stream as bottleneck adapters read it: the input of the norm before attention or MLP."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from loraplex_kernels.pool import LoraSite


class ResidualStream:
    """Records the residual stream at each sub-block, from the first step on that needs it.

    Until then the norms run without a hook.

    Args:
        norms: entry of the projection that ends a sub-block, to the path of the norm that begins it.
    """

    def __init__(self, model: torch.nn.Module, norms: Mapping[int, str]) -> None:
        self._model = model
        self._norms = dict(norms)
        self._watching = False
        # The newest is enough: a sub-block ends before the next begins.
        self._entry = -1
        self._stream: torch.Tensor | None = None

    def watch(self) -> None:
        """Enables `at` from the next pass on."""
        if not self._watching:
            self._watching = True
            for entry, path in self._norms.items():
                norm = self._model.get_submodule(path)
                norm.register_forward_pre_hook(functools.partial(self._note, entry, norm))

    def _note(
        self, entry: int, norm: torch.nn.Module, called: torch.nn.Module, args: tuple[Any, ...]
    ) -> None:
        # A copy of the norm has the hook too, and may get other rows.
        if called is norm:
            self._entry, self._stream = entry, args[0]

    def at(self, site: LoraSite) -> torch.Tensor:
        """The residual [T, hidden] to which the model adds the output of this site's sub-block.

        Raises:
            RuntimeError: the sub-block did not begin with its norm.
        """
        if self._stream is None or self._entry != site.first_entry:
            raise RuntimeError(f"the residual stream at entry {site.first_entry} was not noted")
        return self._stream.reshape(-1, self._stream.shape[-1])
