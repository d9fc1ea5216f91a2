"""Takers of a weight file's tensors: one for each entry, which scales and writes what it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from loraplex_kernels.pool import SCALE_BYTES, AdapterLayout, VectorKind
from loraplex_server.adapters.files.encoding import encode, finite, overflowed, quantize, too_large, write
from loraplex_server.adapters.files.tensor_file import ITEM_BYTES, decode
from loraplex_server.adapters.files.token_tables import blocks, check_unchanged
from loraplex_server.adapters.spec.declared import (
    BiasSpec,
    BottleneckSpec,
    EffectSpec,
    InputScaleSpec,
    LoraSpec,
    MagnitudeSpec,
    OutputScaleSpec,
    OwnWeightSpec,
    PrefixSpec,
    SiteSpec,
    SoftPromptSpec,
    TokenRowsSpec,
)
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.adapters.spec.sites import Entry, SiteKind
from loraplex_server.adapters.spec.tensors import TensorInfo
from loraplex_server.core.errors import InternalError
from loraplex_server.core.frozen_base import Array, FrozenBase, FrozenProjection
from loraplex_server.core.text import quoted


class Taker(Protocol):
    """Puts tensors where they belong."""

    def take(self, tensor: TensorInfo, raw: bytes) -> None: ...


def find_takers(
    manifest: AdapterManifest, target: np.ndarray[Any, Any], layout: AdapterLayout, base: FrozenBase | None
) -> dict[str, list[Taker]]:
    """The takers of each tensor, by the tensor's name; one that nobody takes is `Unused`.

    Args:
        target: `[num_elements]` as the arena holds them, uint16 for bfloat16.
    """
    takers: dict[str, list[Taker]] = {}
    for site in manifest.sites:
        for taker, names in _site_takers(target, layout, site, base):
            for name in names:
                takers.setdefault(name, []).append(taker)
    for entry, table in manifest.base_tables:
        takers.setdefault(table.name, []).append(_BaseTable(entry, base))
    match manifest.prompt:
        case SoftPromptSpec(tensor) | PrefixSpec(tensor):
            takers[tensor.name] = [_Prompt(target, layout)]
    return takers


def _site_takers(
    target: np.ndarray[Any, Any], layout: AdapterLayout, site: SiteSpec, base: FrozenBase | None
) -> Iterator[tuple[Taker, Iterable[str]]]:
    """The takers of one entry's tensors, with the tensors' names."""
    rows = next((effect for effect in site.effects if isinstance(effect, TokenRowsSpec)), None)
    others = tuple(effect for effect in site.effects if effect is not rows)
    if others:
        taken = [name for effect in others for name in _named(effect)]
        yield _Site(target, layout, SiteSpec(site.entry, others), base), taken
    if rows is not None:
        pair = next((effect for effect in others if isinstance(effect, LoraSpec)), None)
        yield (
            _Rows(target, layout, site.entry, rows, pair, base),
            [*_named(rows), *(_named(pair) if pair is not None else ())],
        )


class _Rows:
    """Rows of the vocabulary. What a pair adds to those of added tokens is added here: a pair in the pool has
    the base's tokens alone.
    """

    def __init__(
        self,
        target: np.ndarray[Any, Any],
        layout: AdapterLayout,
        entry: Entry,
        rows: TokenRowsSpec,
        pair: LoraSpec | None,
        base: FrozenBase | None,
    ) -> None:
        self._entry = entry
        self._rows = rows
        self._base = base
        self._tokens = np.asarray(rows.tokens, np.int64)
        self._trained = np.asarray(rows.trained_tokens, np.int64)
        embedding = entry.kind is SiteKind.EMBEDDING
        self._vocabulary = entry.in_features if embedding else entry.out_features
        hidden = entry.out_features if embedding else entry.in_features
        self._pair = pair if len(self._tokens) and self._tokens[-1] >= self._vocabulary else None
        # Rows of added tokens, and the parts of the pair for them: `[tokens, rank]`, `[rank, hidden]`.
        self._added: list[tuple[np.ndarray[Any, Any], Array]] = []
        self._ranks: Array | None = None
        self._hidden: Array | None = None
        vectors = zip(layout.vectors, layout.vector_offset, strict=True)
        offset = next(o for v, o in vectors if (v.entry, v.kind) == (entry.index, VectorKind.TOKEN_ROWS))
        size = len(self._tokens) * hidden
        table = target[offset : offset + size]
        if target.dtype == np.int8:
            table = target[offset : offset + size * SCALE_BYTES].view(np.float32)
        self._target = table.reshape(-1, hidden)

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        # What overflows is found, and named, once it is encoded.
        with np.errstate(over="ignore", invalid="ignore"):
            self._take(tensor, raw)

    def _take(self, tensor: TensorInfo, raw: bytes) -> None:
        if tensor == self._rows.table:
            self._take_table(tensor, raw)
        elif tensor == self._rows.trained:
            self._put(tensor, self._trained, finite(tensor, raw))
        elif self._pair is not None:
            values = finite(tensor, raw)
            columns = values.T if self._entry.kind is SiteKind.EMBEDDING else values
            if (tensor.name == self._pair.a.name) == (self._entry.kind is SiteKind.EMBEDDING):
                self._ranks = columns[self._vocabulary :] * np.float32(self._pair.scale)
            else:
                self._hidden = columns.copy()
        if self._pair is not None and self._ranks is not None and self._hidden is not None and self._added:
            for tokens, rows in self._added:
                summed = rows + self._ranks[tokens - self._vocabulary] @ self._hidden
                self._put(tensor, tokens, summed)
            self._added.clear()

    def _take_table(self, table: TensorInfo, raw: bytes) -> None:
        width = table.shape[1] * ITEM_BYTES[table.dtype]
        own = np.setdiff1d(self._tokens, self._trained, assume_unique=True)
        whole = len(self._tokens) == table.shape[0]
        for first, count in blocks(table):
            block = finite(
                dataclasses.replace(table, shape=(count, table.shape[1])),
                raw[first * width : (first + count) * width],
            )
            if self._base is not None and not whole:
                check_unchanged(self._base, self._entry, first, block, self._tokens)
            tokens = own[np.searchsorted(own, first) : np.searchsorted(own, first + count)]
            known = len(tokens) if self._pair is None else int(np.searchsorted(tokens, self._vocabulary))
            if known:
                self._put(table, tokens[:known], block[tokens[:known] - first])
            if known < len(tokens):
                self._added.append((tokens[known:], block[tokens[known:] - first]))

    def _put(self, tensor: TensorInfo, tokens: np.ndarray[Any, Any], values: Array) -> None:
        encoded = encode(np.ascontiguousarray(values), self._target.dtype)
        if overflowed(encoded):
            raise too_large(tensor)
        self._target[np.searchsorted(self._tokens, tokens)] = encoded


class _BaseTable:
    """A table that was the base's when it was registered: it must still be."""

    def __init__(self, entry: Entry, base: FrozenBase | None) -> None:
        self._entry = entry
        self._base = base

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        width = tensor.shape[1] * ITEM_BYTES[tensor.dtype]
        none = np.empty(0, np.int64)
        for first, count in blocks(tensor):
            block = decode(tensor.dtype, raw[first * width : (first + count) * width]).reshape(count, -1)
            if self._base is not None:
                check_unchanged(self._base, self._entry, first, block, none)


class Unused:
    """A tensor without effect, which must be whole all the same."""

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        finite(tensor, raw)


class _Prompt:
    """A soft prompt's rows, or a prefix's."""

    def __init__(self, target: np.ndarray[Any, Any], layout: AdapterLayout) -> None:
        self._target = target[layout.vector_offset[0] :]

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        write(self._target, tensor, finite(tensor, raw))


class _Site:
    """Takes the tensors of one entry."""

    def __init__(
        self,
        target: np.ndarray[Any, Any],
        layout: AdapterLayout,
        site: SiteSpec,
        base: FrozenBase | None,
    ) -> None:
        self._entry = site.entry
        self._effects = site.effects
        self._target = target
        self._base = base
        places = zip(
            layout.entries,
            layout.a_offset,
            layout.b_offset,
            layout.scale_offset or (None,) * len(layout.entries),
            strict=True,
        )
        self._a, self._b, self._scale = next(
            ((a, b, scale) for shape, a, b, scale in places if shape.entry == site.entry.index), (0, 0, None)
        )
        vectors = zip(layout.vectors, layout.vector_offset, strict=True)
        self._vector = {v.kind: offset for v, offset in vectors if v.entry == site.entry.index}
        self._waiting: dict[str, Array] = {}

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        """Writes one tensor. Those of a DoRA pair, or of a network, wait for each other."""
        values = finite(tensor, raw)
        # What overflows is found, and named, once it is encoded.
        with np.errstate(over="ignore", invalid="ignore"):
            self._take(tensor, values)

    def _take(self, tensor: TensorInfo, values: Array) -> None:
        match self._effects:
            case (MagnitudeSpec(magnitude), LoraSpec(_, scale, a, b)):
                self._waiting[tensor.name] = values
                if len(self._waiting) == 3:
                    self._put_dora(magnitude, np.float32(scale), a, b)
                    self._waiting.clear()
            case (BottleneckSpec() as network,):
                self._waiting[tensor.name] = values
                if len(self._waiting) == len(_named(network)):
                    self._put_network(network)
                    self._waiting.clear()
            case effects:
                effect = next(effect for effect in effects if tensor.name in _named(effect))
                self._put(effect, tensor, values)

    def _put(self, effect: EffectSpec, tensor: TensorInfo, values: Array) -> None:
        match effect:
            case InputScaleSpec():
                self._put_vector(VectorKind.INPUT_SCALE, tensor, values - 1)
            case OutputScaleSpec():
                self._put_vector(VectorKind.OUTPUT_SCALE, tensor, values - 1)
            case BiasSpec(scale):
                self._put_vector(VectorKind.BIAS, tensor, values * np.float32(scale))
            case OwnWeightSpec(weight) if tensor.name == weight.name:
                self._put_vector(VectorKind.WEIGHT, tensor, values)
            case OwnWeightSpec():
                self._put_vector(VectorKind.WEIGHT_BIAS, tensor, values)
            # Added tokens, beyond the entry's widths, are not the pair's.
            case LoraSpec(_, scale, a) if tensor.name == a.name:
                self._put_rows(self._a, tensor, values[:, : self._entry.in_features])
            case LoraSpec(_, scale):
                self._put_rows(self._b, tensor, (values[: self._entry.out_features] * np.float32(scale)).T)

    def _put_dora(self, magnitude: TensorInfo, scale: np.float32, a: TensorInfo, b: TensorInfo) -> None:
        """With W + B A = V and lengths m: y = (m / |V|) (W x + B A x) + bias, the base's own."""
        if self._base is None:
            raise InternalError("DoRA needs the base model's weights, and the store was given none")
        base = self._base.projection(self._entry.path)
        a_rows = self._waiting[a.name]
        b_rows = self._waiting[b.name] * scale
        ratio = self._ratio(base, a_rows, b_rows, magnitude)
        self._put_rows(self._a, a, a_rows)
        self._put_rows(self._b, b, (b_rows * ratio[:, None]).T)
        self._put_vector(VectorKind.OUTPUT_SCALE, magnitude, ratio - 1)
        bias = base.bias()
        if VectorKind.BIAS in self._vector and bias is not None:
            self._put_vector(VectorKind.BIAS, magnitude, bias * (1 - ratio))

    def _put_network(self, network: BottleneckSpec) -> None:
        """The scale goes into the second half."""
        down, bias, up, up_bias = network.down, network.down_bias, network.up, network.up_bias
        scale = network.scale
        factor = self._waiting[scale.name] if isinstance(scale, TensorInfo) else np.float32(scale)
        self._put_vector(VectorKind.DOWN, down, self._waiting[down.name])
        self._put_vector(VectorKind.DOWN_BIAS, bias, self._waiting[bias.name])
        self._put_vector(VectorKind.UP, up, self._waiting[up.name].T * factor)
        self._put_vector(VectorKind.UP_BIAS, up_bias, self._waiting[up_bias.name] * factor)

    def _ratio(self, base: FrozenProjection, a: Array, b: Array, magnitude: TensorInfo) -> Array:
        """Magnitude over the length of each row of W + B A, [out]; b is scaled already."""
        wide = b.astype(np.float64)
        squares = base.squared_norms() + 2 * (base.project(a).T * wide).sum(1)
        squares += ((wide @ (a.astype(np.float64) @ a.T)) * wide).sum(1)
        if (squares <= 0).any():
            raise MalformedFileError(
                f"tensor {quoted(magnitude.name)} gives a length to a row of the adapted weight that is zero"
            )
        ratio: Array = (self._waiting[magnitude.name] / np.sqrt(squares)).astype(np.float32)
        return ratio

    def _put_rows(self, offset: int, tensor: TensorInfo, rows: Array) -> None:
        """Writes rank rows, in 8 bits with their part of the scales."""
        if self._scale is None:
            write(self._target[offset:], tensor, rows)
            return
        if not np.isfinite(rows).all():
            raise too_large(tensor)
        quantized, steps = quantize(rows)
        self._target[offset : offset + quantized.size] = quantized.ravel()
        scales = self._target[self._scale : self._scale + steps.nbytes].view(np.float32)
        # The first of a pair finds zeros; no step is zero.
        scales[:] = np.where(scales == 0, steps, scales * steps)

    def _put_vector(self, kind: VectorKind, tensor: TensorInfo, values: Array) -> None:
        write(self._target[self._vector[kind] :], tensor, values)


def _named(effect: EffectSpec) -> tuple[str, ...]:
    """Names of the tensors that an effect is made of."""
    match effect:
        case InputScaleSpec(scale) | OutputScaleSpec(scale):
            return (scale.name,)
        case MagnitudeSpec(magnitude):
            return (magnitude.name,)
        case LoraSpec(_, _, a, b):
            return (a.name, b.name)
        case BiasSpec(_, bias):
            return (bias.name,)
        case OwnWeightSpec(weight, None):
            return (weight.name,)
        case OwnWeightSpec(weight, bias):
            assert bias is not None
            return (weight.name, bias.name)
        case TokenRowsSpec(_, table, trained):
            return tuple(tensor.name for tensor in (table, trained) if tensor is not None)
        case BottleneckSpec(down, down_bias, up, up_bias, scale):
            named = (down, down_bias, up, up_bias, *((scale,) if isinstance(scale, TensorInfo) else ()))
            return tuple(tensor.name for tensor in named)
