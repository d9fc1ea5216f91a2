"""The layout of one adapter in device memory: the offset of each of its blocks in its extent.

An adapter is one contiguous *extent* of the arena, so bringing it in is one copy, and an entry that it does
not touch takes no room.

For each entry an adapter stores two blocks, both row-major by *rank row*: A is ``[rank_padded, in_features]``
and B transposed is ``[rank_padded, width]``. ``rank_padded`` is the rank rounded up to `RANK_ALIGN`; the rows
past the rank are zero. The factor ``lora_alpha / r`` (or ``/ sqrt(r)``) is already part of B. Vectors (scales
of an entry's input or output, a bias) are in the same extent, a row each; so are weights that replace the
base's.

Blocks begin at a multiple of their own row length, so that the arena, seen as a matrix with that row length,
holds each block as whole rows; only blocks whose row length does not divide the extents' alignment (a
vocabulary) are not aligned. Sorting an extent's blocks by row length makes this nearly free.
Example, two entries of a site with 64 inputs, widths 64 and 32, ranks 6 and 4::

    entry 0: A [8, 64] at 0      B [8, 64] at 1024        rows of 64: A of entry 0, A of entry 1, B of entry 0
    entry 1: A [8, 64] at 512    B [8, 32] at 1536        rows of 32: B of entry 1
    num_elements 1792, alignment 64

In 8 bits (`LoraPool.scaled`) A and B are int8, and each rank row has one float32 scale, the product of A's
and B's: ``(x · A[r]) · scale[r] · B[r]``. An entry's scales, ``[rank_padded]``, follow its B, and blocks
begin at multiples of `ALIGNMENT` alone. Such an adapter takes about half the room of a 16-bit one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loraplex_kernels.pool.shapes import MAX_RANK, Bottleneck, EntryShape, VectorKind, VectorShape

ALIGNMENT = 16
"""Blocks begin at a multiple of this many elements, so that a row of any dtype, int8 included, can be read in
16-byte pieces."""

MAX_EXTENT_ALIGNMENT = 1 << 18
"""Largest alignment of row-aligned extents, in elements. It bounds the memory lost between two extents: half
a MiB in 16 bits."""

SCALE_BYTES = 4
"""Bytes of one scale, a float32."""


@dataclass(frozen=True)
class AdapterLayout:
    """The offsets of an adapter's blocks, in elements from the start of its extent; none of rank 0.

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
    """In 8 bits only: the offset of each entry's scales."""
    bottleneck: Bottleneck | None = None

    @property
    def touched(self) -> list[int]:
        """Every entry at which the adapter has a LoRA pair or a vector; may repeat an entry."""
        return [shape.entry for shape in self.entries] + [vector.entry for vector in self.vectors]


class _Block(NamedTuple):
    """A block to place: the length of its rows and its size, in elements of the arena."""

    row_length: int
    size: int


def extent_alignment(row_lengths: Iterable[int]) -> int:
    """The multiple, in elements, at which extents with rows of these lengths begin.

    The least common multiple of the row lengths, or `ALIGNMENT` if that is too large: adapters then take a
    slower path on a CPU.
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
    _check_entries(entries)
    _check_vectors(vectors)
    present = tuple(shape for shape in entries if shape.rank)
    # In 8 bits a scale follows for each row of B, and vectors are float32.
    scale_bytes, vector_bytes = (SCALE_BYTES, SCALE_BYTES) if scaled else (0, 1)
    blocks = [
        *(_Block(shape.in_features, shape.rank_padded * shape.in_features) for shape in present),
        *(_Block(shape.width, shape.rank_padded * (shape.width + scale_bytes)) for shape in present),
        *(_Block(vector.length, vector.rows * vector.length * vector_bytes) for vector in vectors),
    ]
    if not alignment:
        alignment = extent_alignment(() if scaled else {block.row_length for block in blocks})
    starts, end = _place(blocks, ALIGNMENT if scaled else alignment)
    num_entries = len(present)
    b_offset = starts[num_entries : 2 * num_entries]
    scale_offset = [b + shape.rank_padded * shape.width for b, shape in zip(b_offset, present, strict=True)]
    return AdapterLayout(
        entries=present,
        a_offset=tuple(starts[:num_entries]),
        b_offset=tuple(b_offset),
        num_elements=-(-end // ALIGNMENT) * ALIGNMENT,
        alignment=alignment,
        vectors=tuple(vectors),
        vector_offset=tuple(starts[2 * num_entries :]),
        scale_offset=tuple(scale_offset) if scaled else (),
        bottleneck=bottleneck,
    )


def _place(blocks: Sequence[_Block], alignment: int) -> tuple[list[int], int]:
    """The beginning of each block, and the end of the last one: blocks follow each other by row length.

    A block begins at a multiple of its row length where extents do, that is, where it divides `alignment`.
    """
    starts, end = [0] * len(blocks), 0
    for index in sorted(range(len(blocks)), key=lambda index: blocks[index].row_length):
        multiple = math.lcm(ALIGNMENT, blocks[index].row_length)
        if alignment % multiple:
            multiple = ALIGNMENT
        starts[index] = -(-end // multiple) * multiple
        end = starts[index] + blocks[index].size
    return starts, end


def _check_entries(entries: Sequence[EntryShape]) -> None:
    if len({shape.entry for shape in entries}) != len(entries):
        raise ValueError("entries must not repeat")
    for shape in entries:
        if not 0 <= shape.rank <= MAX_RANK:
            raise ValueError(f"rank of entry {shape.entry} must be 0 to {MAX_RANK}, got {shape.rank}")
        if shape.in_features < 1 or shape.width < 1:
            raise ValueError(f"entry {shape.entry} has an empty shape: {shape.in_features} to {shape.width}")


def _check_vectors(vectors: Sequence[VectorShape]) -> None:
    if len({(vector.entry, vector.kind) for vector in vectors}) != len(vectors):
        raise ValueError("vectors of one kind and entry must not repeat")
    if any(vector.length < 1 or vector.rows < 1 for vector in vectors):
        raise ValueError("a vector must not be empty")
    for vector in vectors:
        tokens = np.asarray(vector.tokens, np.int64)  # [rows], or [0] where rows are no tokens'
        wanted = vector.rows if vector.kind is VectorKind.TOKEN_ROWS else 0
        ascending = not len(tokens) or (tokens[0] >= 0 and (np.diff(tokens) >= 1).all())
        if len(tokens) != wanted or not ascending:
            raise ValueError(f"entry {vector.entry}: its rows need ascending tokens, one for each")
