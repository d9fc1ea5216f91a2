"""The recipe of a composition, as plain data that crosses from the API to the engine unchanged."""

from __future__ import annotations

import msgspec

from loraplex_server.core.request import AdapterUse

COMBINATION_TYPES = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""PEFT's names for the ways to combine adapters."""

MAJORITY_SIGNS = ("total", "frequency")


class Composition(msgspec.Struct, frozen=True):
    """A recipe: the arguments of PEFT's `add_weighted_adapter`. The API has validated every field.

    Attributes:
        combination_type: one of `COMBINATION_TYPES`.
        members: the adapters to combine, with their weights.
        density: fraction of the values to keep, in (0, 1]; for types that prune.
        majority_sign: how the sign is elected, one of `MAJORITY_SIGNS`; for types with "ties".
        svd_rank: rank of the result; None is the largest rank of the members. For types with "svd".
        seed: of the random choice of values to drop; for types with "dare".
    """

    combination_type: str
    members: tuple[AdapterUse, ...]
    density: float | None = None
    majority_sign: str = "total"
    svd_rank: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        """The source that the result's status shows: `ties(a*1, b*0.5)`."""
        return f"{self.combination_type}({', '.join(f'{use.name}*{use.weight:g}' for use in self.members)})"


def prunes(combination_type: str) -> bool:
    """True if this type prunes values, and so takes a density."""
    return combination_type.startswith(("ties", "dare", "magnitude_prune"))
