"""How adapters lie in device memory: one flat arena, and tables that say where each adapter's rows begin.

A *site* is one packed projection of the model (q·k·v, o, gate·up, down). A site has one or more *slices*, the
column ranges of its output that have a LoRA pair of their own; slice ``s`` of a site is *entry*
``site.first_entry + s``, and entries are numbered through the whole model. An adapter is one contiguous
*extent* of the arena, so bringing it in is one copy, and an entry it does not touch takes no room.

For each entry an adapter stores two blocks, both row-major by *rank row*: A is ``[rank_padded, in_features]``
and B transposed is ``[rank_padded, width]``. ``rank_padded`` is the rank rounded up to `RANK_ALIGN`; the rows
past the rank are zero. The factor ``lora_alpha / r`` (or ``/ sqrt(r)``) is already part of B. Vectors (scales
of an entry's input or output, a bias) lie in the same extent, a row each; so do weights of an adapter's own.

Blocks begin at a multiple of their own row length, so that the arena, seen as a matrix with that row length,
holds each block as whole rows; only row lengths that do not divide the extents' alignment (a vocabulary) do
without. Sorting an extent's blocks by row length makes this nearly free. Example, two
entries of a site with 64 inputs, widths 64 and 32, ranks 6 and 4::

    entry 0: A [8, 64] at 0      B [8, 64] at 1024        rows of 64: A of entry 0, A of entry 1, B of entry 0
    entry 1: A [8, 64] at 512    B [8, 32] at 1536        rows of 32: B of entry 1
    num_elements 1792, alignment 64

In 8 bits (`LoraPool.scaled`) A and B are int8, and each rank row has one float32 scale, the product of A's
and B's: ``(x · A[r]) · scale[r] · B[r]``. An entry's scales, ``[rank_padded]``, follow its B, and blocks
begin at multiples of `ALIGNMENT` alone. An adapter so takes about half the room of a 16-bit one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

RANK_ALIGN = 8
"""Rank rows are stored in multiples of this."""

ALIGNMENT = 16
"""Blocks begin at a multiple of this many elements, so that a row can be read in 16-byte pieces."""

MAX_EXTENT_ALIGNMENT = 1 << 18
"""Row-aligned extents are given up where they would have to begin at multiples of more elements than this."""

MAX_RANK = 512
"""The largest rank that can be served."""

MAX_SLICES = 4
"""The largest number of slices in one site."""


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
        """Columns that the output must have at least."""
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
    """What a vector does at its entry. Scales are stored less 1, and `loraplex_kernels.vectors` applies them;
    `replacement` takes weights and their biases, `vocabulary` the rows of tokens.
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

    `tokens`: whose rows they are, ascending, for `TOKEN_ROWS`.
    """

    entry: int
    kind: VectorKind
    length: int
    rows: int = 1
    tokens: Sequence[int] = ()


class BottleneckReads(enum.Enum):
    """What a bottleneck's network is applied to: y, the output of its projection; y and the residual stream
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


@dataclass(frozen=True)
class AdapterLayout:
    """Where an adapter's blocks lie, in elements from the start of its extent; entries of rank 0 are left
    out.

    `alignment`: the extent must begin at a multiple of this many elements of the arena. A store serves all
    adapters of a model with one value, `extent_alignment` over all row lengths of the model.
    """

    entries: tuple[EntryShape, ...]
    a_offset: tuple[int, ...]
    b_offset: tuple[int, ...]
    num_elements: int
    alignment: int
    vectors: tuple[VectorShape, ...] = ()
    vector_offset: tuple[int, ...] = ()
    scale_offset: tuple[int, ...] = ()
    """In 8 bits only: where each entry's scales begin."""
    bottleneck: Bottleneck | None = None


SCALE_BYTES = 4
"""Bytes of one scale, a float32."""


def padded_rank(rank: int) -> int:
    """`rank` rounded up to the rows that it takes in the arena."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


def extent_alignment(row_lengths: Iterable[int]) -> int:
    """The multiple, in elements, at which extents with rows of these lengths begin.

    The least common multiple of the row lengths, or only `ALIGNMENT` where that is out of proportion:
    adapters then work all the same, on a slower path on CPU.
    """
    alignment = math.lcm(ALIGNMENT, *row_lengths)
    return alignment if alignment <= MAX_EXTENT_ALIGNMENT else ALIGNMENT


def adapter_layout(
    entries: Sequence[EntryShape],
    alignment: int | None = None,
    vectors: Sequence[VectorShape] = (),
    *,
    scaled: bool = False,
    bottleneck: Bottleneck | None = None,
) -> AdapterLayout:
    """Lay out one adapter. Pure; the order of `entries` and `vectors` is kept in the result.

    `alignment`: extents begin at its multiples; `extent_alignment` over all row lengths of the model (by
    default over this adapter's own). `scaled`: in 8 bits, where `ALIGNMENT` is all that is needed. Raises
    `ValueError` for a repeated entry or vector, an empty shape, a rank outside 0..`MAX_RANK`, or rows of
    tokens that are not ascending and one for each.
    """
    if len({shape.entry for shape in entries}) != len(entries):
        raise ValueError("entries must not repeat")
    if len({(vector.entry, vector.kind) for vector in vectors}) != len(vectors):
        raise ValueError("vectors of one kind and entry must not repeat")
    if any(vector.length < 1 or vector.rows < 1 for vector in vectors):
        raise ValueError("a vector must not be empty")
    for vector in vectors:
        tokens = np.asarray(vector.tokens, np.int64)
        if len(tokens) != (vector.rows if vector.kind is VectorKind.TOKEN_ROWS else 0) or (
            len(tokens) and (tokens[0] < 0 or (np.diff(tokens) < 1).any())
        ):
            raise ValueError(f"entry {vector.entry}: its rows need ascending tokens, one for each")
    for shape in entries:
        if not 0 <= shape.rank <= MAX_RANK:
            raise ValueError(f"rank of entry {shape.entry} must be 0 to {MAX_RANK}, got {shape.rank}")
        if shape.in_features < 1 or shape.width < 1:
            raise ValueError(f"entry {shape.entry} has an empty shape: {shape.in_features} to {shape.width}")
    present = tuple(shape for shape in entries if shape.rank)
    row_lengths = {length for shape in present for length in (shape.in_features, shape.width)}
    row_lengths |= {vector.length for vector in vectors}
    if scaled:
        row_lengths = set()
    alignment = alignment or extent_alignment(row_lengths)

    offsets = ([0] * len(present), [0] * len(present), [0] * len(vectors))
    rows = ([shape.rank_padded for shape in present],) * 2 + ([vector.rows for vector in vectors],)
    blocks = [(shape.in_features, 0, index) for index, shape in enumerate(present)]
    blocks += [(shape.width, 1, index) for index, shape in enumerate(present)]
    blocks += [(vector.length, 2, index) for index, vector in enumerate(vectors)]
    end = 0
    for row_length, kind, index in sorted(blocks):
        multiple = math.lcm(ALIGNMENT, row_length)
        if scaled or alignment % multiple:
            multiple = ALIGNMENT
        start = -(-end // multiple) * multiple
        offsets[kind][index] = start
        # In 8 bits scales follow each row of B, and vectors are float32.
        row_bytes = (row_length, row_length + SCALE_BYTES, row_length * SCALE_BYTES)[kind]
        end = start + rows[kind][index] * (row_bytes if scaled else row_length)
    scale_offset = [b + shape.rank_padded * shape.width for b, shape in zip(offsets[1], present, strict=True)]
    return AdapterLayout(
        entries=present,
        a_offset=tuple(offsets[0]),
        b_offset=tuple(offsets[1]),
        num_elements=-(-end // ALIGNMENT) * ALIGNMENT,
        alignment=alignment,
        vectors=tuple(vectors),
        vector_offset=tuple(offsets[2]),
        scale_offset=tuple(scale_offset) if scaled else (),
        bottleneck=bottleneck,
    )


@dataclass
class SlotTables:
    """The pool's tables on the host. `version` grows with each slot written: what was derived from it is
    stale.
    """

    a_offset: np.ndarray
    b_offset: np.ndarray
    rank: np.ndarray
    vector_offset: np.ndarray
    """int64 ``[num_slots, kinds, num_entries]``: first element of a vector, -1 where there is none."""
    has_vectors: np.ndarray
    """bool ``[num_slots]``: whether any kind has one at any entry."""
    outside: np.ndarray
    """bool ``[num_slots]``: whether its adapter acts beyond the first entries, those of projections."""
    tokens: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """int64 by (slot, entry): whose `TOKEN_ROWS` the slot's adapter has there, ascending."""
    bottleneck: dict[int, Bottleneck] = field(default_factory=dict)
    """By slot: the form of its adapter's networks, if it has any."""
    version: int = 0

    @classmethod
    def empty(cls, num_slots: int, num_entries: int) -> SlotTables:
        shape = (num_slots, num_entries)
        return cls(
            a_offset=np.zeros(shape, np.int64),
            b_offset=np.zeros(shape, np.int64),
            rank=np.zeros(shape, np.int32),
            vector_offset=np.full((num_slots, len(VectorKind), num_entries), -1, np.int64),
            has_vectors=np.zeros(num_slots, np.bool_),
            outside=np.zeros(num_slots, np.bool_),
        )

    def clear(self, slot: int) -> None:
        self.rank[slot] = 0
        self.vector_offset[slot] = -1
        self.has_vectors[slot] = False
        self.outside[slot] = False
        for key in [key for key in self.tokens if key[0] == slot]:
            del self.tokens[key]
        self.bottleneck.pop(slot, None)


@dataclass(frozen=True, eq=False)
class LoraPool:
    """All adapters of one device. Make one with `allocate`; bind extents to slots with `bind` and `clear`.

    - `arena`     ``[num_elements]``, the compute dtype (float32, bfloat16 or float16), or int8
    - `a_offset`  int64 ``[num_slots, num_entries]``: first element of A in the arena
    - `b_offset`  int64 ``[num_slots, num_entries]``: first element of B transposed in the arena
    - `rank`      int32 ``[num_slots, num_entries]``: true rank; 0 where the adapter does not touch the entry
    - `host`      the tables on the host, those of vectors there alone; on a CPU pool they share memory
    - `dtype`     the compute dtype, which x and y have
    - `max_rank`  the largest rank that may be bound: the pitch of the intermediate result
    - `num_projections`  entries of layers' projections; those of norms and of the vocabulary follow
    """

    arena: Tensor
    a_offset: Tensor
    b_offset: Tensor
    rank: Tensor
    host: SlotTables = field(repr=False)
    dtype: torch.dtype
    max_rank: int = MAX_RANK
    num_projections: int = 0

    @classmethod
    def allocate(
        cls,
        *,
        num_elements: int,
        num_slots: int,
        num_entries: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int = MAX_RANK,
        scaled: bool = False,
        num_projections: int | None = None,
    ) -> LoraPool:
        """An arena of `num_elements`, zeroed, and `num_slots` slots in which no adapter is bound.

        `dtype`: the compute dtype, and that of the arena unless `scaled` asks for int8.
        """
        # Scales and vectors are read through a float32 view of the whole arena.
        num_elements += -num_elements % SCALE_BYTES if scaled else 0
        host = SlotTables.empty(num_slots, num_entries)
        return cls(
            arena=torch.zeros(num_elements, dtype=torch.int8 if scaled else dtype, device=device),
            a_offset=torch.from_numpy(host.a_offset).to(device),
            b_offset=torch.from_numpy(host.b_offset).to(device),
            rank=torch.from_numpy(host.rank).to(device),
            host=host,
            dtype=dtype,
            max_rank=padded_rank(max_rank),
            num_projections=num_entries if num_projections is None else num_projections,
        )

    @property
    def scaled(self) -> bool:
        """Whether adapters are held in 8 bits, with scales."""
        return self.arena.dtype == torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the arena, and the tables."""
        return self.arena.nbytes + self.a_offset.nbytes + self.b_offset.nbytes + self.rank.nbytes

    @property
    def num_slots(self) -> int:
        return int(self.rank.shape[0])

    @property
    def num_entries(self) -> int:
        return int(self.host.rank.shape[1])

    def bind(self, slot: int, start: int, layout: AdapterLayout) -> None:
        """Make `slot` serve the adapter whose extent begins at element `start`.

        The device tables are written on the current stream: call this where the next step will see it, after
        the extent's copy has finished. Raises `ValueError` where the extent does not fit or is misaligned.
        """
        if start % layout.alignment:
            raise ValueError(f"slot {slot}: the extent begins at {start}, no multiple of {layout.alignment}")
        if start < 0 or start + layout.num_elements > self.arena.numel():
            raise ValueError(f"slot {slot}: the extent leaves the arena of {self.arena.numel()} elements")
        named = [shape.entry for shape in layout.entries] + [vector.entry for vector in layout.vectors]
        if any(not 0 <= entry < self.num_entries for entry in named):
            raise ValueError(f"slot {slot}: an entry lies outside the {self.num_entries} entries of the pool")
        if any(shape.rank > self.max_rank for shape in layout.entries):
            raise ValueError(f"slot {slot}: a rank is above the pool's max_rank of {self.max_rank}")
        if bool(layout.scale_offset) != self.scaled and layout.entries:
            raise ValueError(f"slot {slot}: the layout must{'' if self.scaled else ' not'} have scales here")
        host = self.host
        entries = [shape.entry for shape in layout.entries]
        host.clear(slot)
        host.rank[slot, entries] = [shape.rank for shape in layout.entries]
        host.a_offset[slot, entries] = np.asarray(layout.a_offset, np.int64) + start
        host.b_offset[slot, entries] = np.asarray(layout.b_offset, np.int64) + start
        for vector, offset in zip(layout.vectors, layout.vector_offset, strict=True):
            host.vector_offset[slot, vector.kind, vector.entry] = start + offset
            if vector.kind is VectorKind.TOKEN_ROWS:
                host.tokens[slot, vector.entry] = np.asarray(vector.tokens, np.int64)
        host.has_vectors[slot] = bool(layout.vectors)
        host.outside[slot] = any(entry >= self.num_projections for entry in named)
        if layout.bottleneck is not None:
            host.bottleneck[slot] = layout.bottleneck
        self._publish(slot)

    def clear(self, slot: int) -> None:
        """Make `slot` serve nothing: its tokens get no delta."""
        self.host.clear(slot)
        self._publish(slot)

    def _publish(self, slot: int) -> None:
        host = self.host
        host.version += 1
        if self.arena.device.type != "cpu":
            # A step may be running: from pinned memory, nothing here waits for its end.
            pinned = self.arena.device.type == "cuda"
            for table, rows in (
                (self.a_offset, host.a_offset),
                (self.b_offset, host.b_offset),
                (self.rank, host.rank),
            ):
                row = torch.from_numpy(rows[slot])
                table[slot].copy_(row.pin_memory() if pinned else row, non_blocking=pinned)

    def a(self, slot: int, entry: int, in_features: int) -> Tensor:
        """A view of the true rank rows of A: ``[rank, in_features]``. Host tables are read, nothing is
        copied.
        """
        return self._rows(int(self.host.a_offset[slot, entry]), int(self.host.rank[slot, entry]), in_features)

    def b(self, slot: int, entry: int, width: int) -> Tensor:
        """A view of the true rank rows of B transposed: ``[rank, width]``."""
        return self._rows(int(self.host.b_offset[slot, entry]), int(self.host.rank[slot, entry]), width)

    def scale(self, slot: int, entry: int, width: int) -> Tensor:
        """A view of the scales of the true rank rows, float32 ``[rank]``; only in 8 bits."""
        rank = int(self.host.rank[slot, entry])
        start = int(self.host.b_offset[slot, entry]) + padded_rank(rank) * width
        return self.arena[start : start + rank * SCALE_BYTES].view(torch.float32)

    def vector(self, slot: int, kind: VectorKind, entry: int, length: int) -> Tensor:
        """A vector that the slot's adapter has, in the compute dtype: ``[length]``."""
        return self.matrix(slot, kind, entry, 1, length)[0].to(self.dtype)

    def matrix(self, slot: int, kind: VectorKind, entry: int, rows: int, length: int) -> Tensor:
        """A view of a vector of several rows: ``[rows, length]``, float32 where the pool is in 8 bits."""
        start = int(self.host.vector_offset[slot, kind, entry])
        if self.scaled:
            flat = self.arena[start : start + rows * length * SCALE_BYTES].view(torch.float32)
            return flat.view(rows, length)
        return self._rows(start, rows, length)

    def block(self, slot: int, kind: VectorKind, entry: int, length: int, first: int, rows: int) -> Tensor:
        """Rows `first` to `first + rows` of a block of vectors, in the compute dtype: ``[rows, length]``."""
        start, size = int(self.host.vector_offset[slot, kind, entry]), rows * length
        if self.scaled:
            start += first * length * SCALE_BYTES
            block = self.arena[start : start + size * SCALE_BYTES].view(torch.float32).to(self.dtype)
            return block.view(rows, length)
        return self._rows(start + first * length, rows, length)

    def _rows(self, offset: int, rank: int, length: int) -> Tensor:
        return self.arena.as_strided((rank, length), (length, 1), offset)
