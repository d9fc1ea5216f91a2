"""The CPU path: `reference.apply` with the number of torch calls cut down to two or three a site.

Decode has a row or two per adapter and many adapters, so a matmul per adapter would be all overhead. Two
sparse ops do the whole site at once, ragged ranks included, straight from the arena, because an
adapter's rank rows are rows of the arena seen as a matrix:

- expand: a bag's weighted sum of rows, ``Σ_r h[r] · B[r]``, is an embedding bag with per-sample weights. The
  members of a token's mix fill its bag one after the other. Slices of different widths share one call
  by cutting rows into *granules* as wide as the widths' greatest common divisor.
- shrink: ``h[r] = x · A[r]`` is one entry of ``x @ arena.T``, a dense product sampled at a sparse pattern.

Long stretches of consecutive tokens (prefill) are multiplied one adapter at a time. Which rows go where is
decided here, and kept with the batch: a plan holds indices and views, so steady decode costs no planning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels._sparse import csr
from loraplex_kernels.parallel import PRODUCTS_PER_US, threads_for
from loraplex_kernels.pool import HostSegments, LoraBatch, LoraPool, LoraSite, padded_rank
from loraplex_kernels.pool.segments import Group, ranges

MATMUL_ROWS = 8
"""Stretches of one mix with more tokens than this are multiplied per adapter."""

MIN_GRANULE = 32
"""Slices whose widths have a smaller common divisor are multiplied per adapter."""

_BAG_PRODUCTS_PER_US = 3_000
"""Multiply-adds per microsecond of one core whose rank rows are read from memory for a token or two."""

_SUM = 0
"""`torch.embedding_bag`'s mode for sums."""

_MAX_INDEX = 2**31 - 1
"""Rows of the arena are named in int32."""


@dataclass(frozen=True)
class _Bags:
    """One embedding bag over the tokens of all short stretches, for one site.

    Samples are (token, slice, member, rank row) for the shrink, (token, slice, granule, member, rank row) for
    the expand; `sample` maps the second to the first (None where they are the same).
    """

    num_tokens: int
    a_pattern: Tensor
    """Sparse CSR [tokens, arena rows]: a token's stored columns are its rank rows; stored values are 0."""
    a_columns: Tensor
    b_rows: Tensor
    b_index: Tensor
    b_offset: Tensor
    sample: Tensor | None
    weight: Tensor | None
    columns: slice
    tokens: slice | Tensor

    def add(self, x: Tensor, y: Tensor) -> None:
        if len(x) > self.num_tokens:
            x = x[: self.num_tokens]
        with threads_for(len(self.b_index) * self.b_rows.shape[1] / _BAG_PRODUCTS_PER_US):
            h = torch.sparse.sampled_addmm(self.a_pattern, x, self.a_columns, beta=0.0).values()
            if self.sample is not None:
                h = h.index_select(0, self.sample)
            if self.weight is not None:
                h.mul_(self.weight)
            delta = torch.embedding_bag(self.b_rows, self.b_index, self.b_offset, False, _SUM, False, h)[0]
            whole = self.columns.stop - self.columns.start == y.shape[1]
            _add(y if whole else y[:, self.columns], self.tokens, delta)


class _Part(NamedTuple):
    """One slice of a stack: its columns of the shrink's result, those of y, and B ``[rank, width]``."""

    ranks: slice
    columns: slice
    b: Tensor


class _Stack(NamedTuple):
    """An adapter's A of neighbouring slices as one view ``[rows, in_features]``, zero rows between them."""

    a: Tensor
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Term:
    """One member of a group: a stack of its slices, and its weight, ``[tokens, 1]`` where they differ."""

    a: Tensor
    weight: float | Tensor
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Product:
    """One long stretch, multiplied member by member."""

    tokens: slice
    terms: tuple[_Term, ...]

    def add(self, x: Tensor, y: Tensor) -> None:
        rows, out = x[self.tokens], y[self.tokens]
        for term in self.terms:
            with threads_for(rows.numel() * len(term.a) / PRODUCTS_PER_US):
                h = rows @ term.a.T
                alpha = 1.0
                if isinstance(term.weight, float):
                    alpha = term.weight
                else:
                    h *= term.weight
                for ranks, columns, b in term.parts:
                    out[:, columns].addmm_(h[:, ranks], b, alpha=alpha)


@dataclass(frozen=True)
class _Order:
    """The part of `_Bags` that depends on the batch and the site's slices alone.

    A *visit* is (token, slice, member); a *stop* is (token, slice, granule, member); a bag holds the stops of
    one (token, slice, granule). `stop_visit` gives the visit of each stop.
    """

    tokens: np.ndarray
    visit_pair: np.ndarray
    visit_slot: np.ndarray
    visit_slice: np.ndarray
    visit_granules: np.ndarray
    stop_visit: np.ndarray
    stop_granule: np.ndarray
    bag_stop: np.ndarray


@dataclass(frozen=True)
class _Samples:
    """The part of `_Bags` that depends on the visits' ranks too, so that layers of equal ranks share it.

    A sample's row of the arena is its visit's first row plus `a_inner`, or `b_inner`.
    """

    a_visit: np.ndarray
    a_inner: np.ndarray
    a_start: Tensor
    a_zero: Tensor
    b_visit: np.ndarray
    b_inner: np.ndarray
    b_offset: Tensor
    sample: Tensor | None
    weight: Tensor | None
    tokens: slice | Tensor


def apply(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """`reference.apply` for float32 and float64 on CPU."""
    parts = batch.derived((pool, site), pool.host.version, lambda: _plan(pool, site, batch))
    for part in parts:
        part.add(x, y)


def _plan(pool: LoraPool, site: LoraSite, batch: LoraBatch) -> list[_Bags | _Product]:
    host = batch.host
    parts: list[_Bags | _Product] = []
    bags, few = _bags(pool, site, batch)
    if bags is not None:
        parts.append(bags)
    for stretch in _stretches(batch):
        if stretch.end_row - stretch.first_row > few:
            product = _product(pool, site, host, stretch)
            if product.terms:
                parts.append(product)
    return parts


def _stretches(batch: LoraBatch) -> list[Group]:
    """The groups of `batch.host`, cut where their tokens are not consecutive: an adapter's decodes and its
    prompt's chunk are a group, yet lie apart.
    """
    found: list[Group] | None = batch.cache.get("stretches")
    if found is None:
        token = batch.host.group_token
        breaks = np.flatnonzero(np.diff(token) != 1) + 1
        found = batch.cache["stretches"] = []
        for first, end, members in batch.host.group:
            inner = breaks[np.searchsorted(breaks, first, "right") : np.searchsorted(breaks, end)]
            bounds = [first, *inner.tolist(), end]
            found += [Group(start, stop, members) for start, stop in pairwise(bounds)]
    return found


def _bags(pool: LoraPool, site: LoraSite, batch: LoraBatch) -> tuple[_Bags | None, int]:
    """The bags, and the size of the groups that they take care of: none where they do not work."""
    widths = [width for _, width in site.slices]
    granule = math.gcd(*widths)
    first_column = site.slices[0][0]
    if granule < MIN_GRANULE or sum(widths) != site.out_features - first_column:
        return None, 0
    if pool.arena.numel() // min(granule, site.in_features) > _MAX_INDEX:
        return None, 0
    order_key = ("order", site.slices)
    if order_key not in batch.cache:
        batch.cache[order_key] = _order(batch, [width // granule for width in widths])
    order: _Order = batch.cache[order_key]

    tables = pool.host
    entry = site.first_entry + order.visit_slice
    rank = tables.rank[order.visit_slot, entry]
    if not rank.any():
        return None, MATMUL_ROWS
    a_offset = tables.a_offset[order.visit_slot, entry]
    a_first = a_offset // site.in_features
    b_offset = tables.b_offset[order.visit_slot, entry]
    b_first = b_offset // granule
    aligned = (a_first * site.in_features == a_offset) & (b_first * granule == b_offset)
    if not (aligned | (rank == 0)).all():
        return None, 0
    samples_key = (order_key, pool.arena.dtype, rank.tobytes())
    if samples_key not in batch.cache:
        batch.cache[samples_key] = _samples(batch, order, rank.astype(np.int64), pool.arena.dtype)
    samples: _Samples = batch.cache[samples_key]
    a_rows = _matrix(pool, site.in_features)
    bags = _Bags(
        num_tokens=batch.num_tokens,
        a_pattern=csr(
            samples.a_start,
            _index(a_first[samples.a_visit] + samples.a_inner),
            samples.a_zero,
            (batch.num_tokens, len(a_rows)),
        ),
        a_columns=a_rows.t(),
        b_rows=_matrix(pool, granule),
        b_index=_index(b_first[samples.b_visit] + samples.b_inner),
        b_offset=samples.b_offset,
        sample=samples.sample,
        weight=samples.weight,
        columns=slice(first_column, site.out_features),
        tokens=samples.tokens,
    )
    return bags, MATMUL_ROWS


def _order(batch: LoraBatch, granules: list[int]) -> _Order:
    host = batch.host
    short = np.zeros(batch.num_pairs, np.bool_)
    for first, end, members in _stretches(batch):
        if end - first <= MATMUL_ROWS:
            for _, shift in members:
                short[first + shift : end + shift] = True
    pairs = np.flatnonzero(short)
    pairs = pairs[np.lexsort((host.pair_member[pairs], host.pair_token[pairs]))]
    tokens, token_index = np.unique(host.pair_token[pairs], return_inverse=True)

    visit_pair = np.tile(pairs, len(granules))
    visit_slice = np.repeat(np.arange(len(granules)), len(pairs))
    visit_token = np.tile(token_index, len(granules))
    order = np.lexsort((visit_slice, visit_token))
    visit_pair, visit_slice, visit_token = visit_pair[order], visit_slice[order], visit_token[order]

    per_slice = np.array(granules, np.int64)
    visit_granules = per_slice[visit_slice]
    stop_visit = np.repeat(np.arange(len(visit_pair)), visit_granules)
    stop_granule = ranges(np.zeros_like(visit_granules), visit_granules)
    first_bag = visit_token * sum(granules) + (np.cumsum(per_slice) - per_slice)[visit_slice]
    stop_bag = first_bag[stop_visit] + stop_granule
    order = np.argsort(stop_bag, kind="stable")
    return _Order(
        tokens=tokens,
        visit_pair=visit_pair,
        visit_slot=host.pair_slot[visit_pair],
        visit_slice=visit_slice,
        visit_granules=visit_granules,
        stop_visit=stop_visit[order],
        stop_granule=stop_granule[order],
        bag_stop=np.searchsorted(stop_bag[order], np.arange(len(tokens) * sum(granules))),
    )


def _samples(batch: LoraBatch, order: _Order, rank: np.ndarray, dtype: torch.dtype) -> _Samples:
    host, num_tokens = batch.host, batch.num_tokens
    visit_start = np.cumsum(rank) - rank
    a_visit = np.repeat(np.arange(len(rank)), rank)
    a_token = host.pair_token[order.visit_pair][a_visit]

    stop_rank = rank[order.stop_visit]
    stop_start = np.cumsum(stop_rank) - stop_rank
    stop = np.repeat(np.arange(len(stop_rank)), stop_rank)
    rank_row = ranges(np.zeros_like(stop_rank), stop_rank)
    b_visit = order.stop_visit[stop]
    weight = host.pair_weight[order.visit_pair][b_visit]
    identity = len(b_visit) == len(a_visit)

    # A token that no adapter touches here has only empty bags: leave it out, so that its row keeps its bits.
    bag_offset = np.append(stop_start, len(stop))[order.bag_stop].reshape(len(order.tokens), -1)
    touched = np.diff(np.append(bag_offset[:, 0], len(stop))) > 0
    return _Samples(
        a_visit=a_visit,
        a_inner=ranges(np.zeros_like(rank), rank),
        a_start=_index(np.searchsorted(a_token, np.arange(num_tokens + 1))),
        a_zero=torch.zeros(len(a_visit), dtype=dtype),
        b_visit=b_visit,
        b_inner=order.stop_granule[stop] + rank_row * order.visit_granules[b_visit],
        b_offset=_index(bag_offset[touched].ravel()),
        sample=None if identity else torch.from_numpy(visit_start[b_visit] + rank_row),
        weight=None if (weight == 1).all() else torch.from_numpy(weight).to(dtype),
        tokens=_tokens(order.tokens[touched]),
    )


def _product(pool: LoraPool, site: LoraSite, host: HostSegments, stretch: Group) -> _Product:
    first, end, members = stretch
    terms: list[_Term] = []
    for slot, shift in members:
        weights = host.pair_weight[first + shift : end + shift]
        weight: float | Tensor = float(weights[0])
        if (weights != weights[0]).any():
            weight = torch.from_numpy(weights).to(pool.arena.dtype)[:, None]
        terms += [_Term(stack.a, weight, stack.parts) for stack in _stacks(pool, site, slot)]
    token = int(host.group_token[first])
    return _Product(slice(token, token + end - first), tuple(terms))


def _stacks(pool: LoraPool, site: LoraSite, slot: int) -> list[_Stack]:
    """An adapter's A of the site, those slices together that lie one behind the other in the arena."""
    tables, length = pool.host, site.in_features
    stacks: list[_Stack] = []
    end = -1  # where the last stack's zero rows end
    for s, (column, width) in enumerate(site.slices):
        entry = site.first_entry + s
        rank, offset = int(tables.rank[slot, entry]), int(tables.a_offset[slot, entry])
        if not rank:
            continue
        before = 0
        parts: tuple[_Part, ...] = ()
        if offset == end:
            stack = stacks.pop()
            before, parts = padded_rank(len(stack.a)), stack.parts
        rows = before + rank
        a = pool.arena.as_strided((rows, length), (length, 1), offset - before * length)
        part = _Part(slice(before, rows), slice(column, column + width), pool.b(slot, entry, width))
        stacks.append(_Stack(a, (*parts, part)))
        end = offset + padded_rank(rank) * length
    return stacks


def _add(y: Tensor, tokens: slice | Tensor, delta: Tensor) -> None:
    if isinstance(tokens, slice):
        rows = y if tokens.stop - tokens.start == len(y) else y[tokens]
        rows.add_(delta.view(rows.shape))
    else:
        y.index_add_(0, tokens, delta.view(len(tokens), -1))


def _tokens(tokens: np.ndarray) -> slice | Tensor:
    """Ascending token rows as a slice where they are consecutive."""
    first = int(tokens[0])
    if (tokens == np.arange(first, first + len(tokens))).all():
        return slice(first, first + len(tokens))
    return torch.from_numpy(tokens)


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _matrix(pool: LoraPool, row_length: int) -> Tensor:
    """The arena as a matrix; an extent's rows never lie in the remainder, since they begin at whole rows."""
    rows = pool.arena.numel() // row_length
    return pool.arena[: rows * row_length].view(rows, row_length)
