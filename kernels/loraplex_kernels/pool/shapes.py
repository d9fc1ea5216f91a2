"""Sites of the model, and the shapes of an adapter's parameters there.

A *site* is one packed projection of the model (q·k·v, o, gate·up, down), a norm, the embedding or the head. A
site has one or more *slices*, the column ranges of its output with a LoRA pair each; slice ``s``
of a site is *entry* ``site.first_entry + s``, and entries are numbered through the whole model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RANK_ALIGN = 8
"""Rank rows are stored in multiples of this: 8 float32 values of h, or scales, are two 16-byte reads."""

MAX_RANK = 512
"""The largest rank that can be served: the pitch of the shrink's result, 2 KiB for each pair and slice."""

MAX_SLICES = 4
"""The largest number of slices in one site: q·k·v has three, and the expand kernel has arguments for four."""


def padded_rank(rank: int) -> int:
    """`rank` rounded up to the rows that it takes in the arena."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


@dataclass(frozen=True)
class LoraSite:
    """One packed projection: ``in_features`` inputs, and for each slice ``(first column, width)`` of its
    output.
    """

    first_entry: int
    in_features: int
    slices: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.slices) <= MAX_SLICES:
            raise ValueError(f"slices must hold 1 to {MAX_SLICES} slices, got {len(self.slices)}")
        end = 0
        for start, width in self.slices:
            if start < end or width < 1:
                raise ValueError(f"slices must be ascending, disjoint and not empty, got {self.slices}")
            end = start + width

    @property
    def num_slices(self) -> int:
        return len(self.slices)

    @property
    def out_features(self) -> int:
        """Least number of columns of the output."""
        start, width = self.slices[-1]
        return start + width


@dataclass(frozen=True)
class EntryShape:
    """The LoRA pair of one adapter at one entry: A is ``[rank, in_features]``, B is ``[width, rank]``."""

    entry: int
    in_features: int
    width: int
    rank: int

    @property
    def rank_padded(self) -> int:
        return padded_rank(self.rank)


class VectorKind(enum.IntEnum):
    """The effect of a vector at its entry. Scales are stored less 1. The op `vectors` applies most of them;
    `bottleneck` applies the parts of its networks, `replacement` weights and their biases, `vocabulary` the
    rows of tokens.
    """

    INPUT_SCALE = 0
    OUTPUT_SCALE = 1
    BIAS = 2
    SOFT_PROMPT = 3
    PREFIX = 4
    DOWN = 5
    DOWN_BIAS = 6
    UP = 7
    UP_BIAS = 8
    WEIGHT = 9
    WEIGHT_BIAS = 10
    TOKEN_ROWS = 11


@dataclass(frozen=True)
class VectorShape:
    """One vector of an adapter at one entry; a soft prompt is `rows` of them, at entry 0. In a prefix a row
    is a layer's keys or values of one virtual token: keys, values, then layers, then tokens.

    `tokens`: the token id of each row, ascending, for `TOKEN_ROWS`.
    """

    entry: int
    kind: VectorKind
    length: int
    rows: int = 1
    tokens: Sequence[int] = ()


class BottleneckReads(enum.Enum):
    """The input of a bottleneck's network: y, the output of its projection; y and the residual stream
    that y will be added to; or the stream alone.
    """

    OUTPUT = "output"
    SUM = "sum"
    RESIDUAL = "residual"


@dataclass(frozen=True)
class Bottleneck:
    """The form of an adapter's networks, which `loraplex_kernels.bottleneck` applies; parameters are vectors.

    - `non_linearity`  one of `bottleneck.NON_LINEARITIES`
    - `widths`         by entry: rows of `DOWN` and `UP` there
    """

    non_linearity: str
    reads: BottleneckReads
    widths: Mapping[int, int]
