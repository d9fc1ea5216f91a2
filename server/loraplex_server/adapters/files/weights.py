"""An adapter's weights as the device pool wants them: one flat host tensor, laid out, scaled and checked.

The file is read once, front to back, one tensor at a time. What is hashed is what is served, and a file that
is cut while it is read cannot kill the process as a memory map would.

The arithmetic is NumPy's: it runs on the loader's thread beside the engine's steps, and a torch operation
there would wake a second team of worker threads on the engine's cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from loraplex_kernels.pool import SCALE_BYTES, AdapterLayout, VectorKind, adapter_layout
from loraplex_server.adapters.files.tensor_file import (
    ITEM_BYTES,
    MalformedFileError,
    TensorInfo,
    decode,
    header_digest,
    read_header_bytes,
)
from loraplex_server.adapters.files.token_tables import blocks, check_unchanged
from loraplex_server.adapters.origins.sources import open_file
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
from loraplex_server.adapters.spec.manifest import AdapterManifest, refusal
from loraplex_server.adapters.spec.sites import Entry, SiteKind
from loraplex_server.core.errors import InternalError
from loraplex_server.core.frozen_base import Array, FrozenBase, FrozenProjection
from loraplex_server.core.text import quoted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class HostBlob:
    """One adapter in host memory.

    Attributes:
        data: `[num_elements]` in the arena's dtype, pinned when the pool is on a GPU; blocks as in the
            layout, B scaled, everything else zero.
        content_hash: SHA-256 over the configuration and the weight file, in hex.
    """

    data: torch.Tensor
    content_hash: str


def lay_out(manifest: AdapterManifest, alignment: int, *, scaled: bool = False) -> AdapterLayout:
    """The layout of an adapter for a pool whose extents all begin at multiples of `alignment`; `scaled` for a
    pool in 8 bits.
    """
    return adapter_layout(
        manifest.shapes, alignment, manifest.vectors, scaled=scaled, bottleneck=manifest.bottleneck
    )


def read_weights(
    manifest: AdapterManifest,
    layout: AdapterLayout,
    dtype: torch.dtype,
    roots: Iterable[Path],
    base: FrozenBase | None = None,
    *,
    pin_memory: bool = False,
) -> HostBlob:
    """Reads, checks, scales and casts the weights that `manifest` describes.

    Alpha (and rsLoRA's root) is multiplied into B in float32 before the cast, and so is DoRA's magnitude over
    the norm of the adapted weight, which is worked out here, from `base`. Where the layout has scales,
    `dtype` is int8: each rank row of A and of B becomes integers of at most 127 in absolute value, rounded to
    nearest, and the product of the two rows' steps is the rank row's scale; vectors stay float32.

    Raises:
        FailedPreconditionError: the file is not the one the manifest was read from, or a tensor holds NaN or
            infinity, or would in `dtype`.
        PermissionDeniedError, UnavailableError: as for `read_manifest`.
    """
    if layout.entries and bool(layout.scale_offset) != (dtype == torch.int8):
        raise ValueError(f"the layout has {len(layout.scale_offset)} blocks of scales, but dtype is {dtype}")
    data = torch.zeros(layout.num_elements, dtype=dtype, pin_memory=pin_memory)
    elements = data.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else data.numpy()
    takers: dict[str, list[_Taker]] = {}
    for effects in manifest.sites:
        for taker, names in _takers(elements, layout, effects, base):
            for name in names:
                takers.setdefault(name, []).append(taker)
    for entry, table in manifest.base_tables:
        takers.setdefault(table.name, []).append(_BaseTable(entry, base))
    match manifest.prompt:
        case SoftPromptSpec(tensor) | PrefixSpec(tensor):
            takers[tensor.name] = [_Prompt(elements, layout)]
    content = hashlib.sha256(manifest.config.encode() + b"\0")
    file, size = open_file(manifest.folder, manifest.weights_file, roots)
    try:
        with file:
            header, header_bytes = manifest.header, read_header_bytes(file, size)
            if header_digest(header_bytes) != header.digest or size != header.file_bytes:
                raise MalformedFileError(
                    f"{manifest.weights_file} was changed since it was registered; load it anew"
                )
            content.update(header_bytes)
            for tensor in header.tensors:
                raw = _read(file, tensor.end - tensor.begin)
                content.update(raw)
                for taker in takers.get(tensor.name, (_Unused(),)):
                    taker.take(tensor, raw)
    except MalformedFileError as error:
        raise refusal(manifest.name, str(error)) from error
    return HostBlob(data, content.hexdigest())


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise MalformedFileError("the weight file ended while it was read")
    return data


class _Taker(Protocol):
    """Puts tensors where they belong."""

    def take(self, tensor: TensorInfo, raw: bytes) -> None: ...


def _takers(
    target: np.ndarray[Any, Any], layout: AdapterLayout, site: SiteSpec, base: FrozenBase | None
) -> Iterator[tuple[_Taker, Iterable[str]]]:
    """Who takes the tensors of one entry, and their names."""
    rows = next((effect for effect in site.effects if isinstance(effect, TokenRowsSpec)), None)
    others = tuple(effect for effect in site.effects if effect is not rows)
    if others:
        taken = [name for effect in others for name in _named(effect)]
        yield _Site(target, layout, SiteSpec(site.entry, others), base), taken
    if rows is not None:
        pair = next((effect for effect in others if isinstance(effect, LoraSpec)), None)
        yield (
            _Rows(target, layout, site.entry, rows, pair, base),
            [
                *_named(rows),
                *(_named(pair) if pair is not None else ()),
            ],
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
            self._put(tensor, self._trained, _finite(tensor, raw))
        elif self._pair is not None:
            values = _finite(tensor, raw)
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
            block = _finite(
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
        encoded = _encode(np.ascontiguousarray(values), self._target.dtype)
        if _overflowed(encoded):
            raise _too_large(tensor)
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


class _Unused:
    """A tensor without effect, which must be whole all the same."""

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        _finite(tensor, raw)


class _Prompt:
    """A soft prompt's rows, or a prefix's."""

    def __init__(self, target: np.ndarray[Any, Any], layout: AdapterLayout) -> None:
        self._target = target[layout.vector_offset[0] :]

    def take(self, tensor: TensorInfo, raw: bytes) -> None:
        _write(self._target, tensor, _finite(tensor, raw))


class _Site:
    """What becomes of one entry's tensors."""

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
        values = _finite(tensor, raw)
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
            _write(self._target[offset:], tensor, rows)
            return
        if not np.isfinite(rows).all():
            raise _too_large(tensor)
        quantized, steps = _quantize(rows)
        self._target[offset : offset + quantized.size] = quantized.ravel()
        scales = self._target[self._scale : self._scale + steps.nbytes].view(np.float32)
        # The first of a pair finds zeros; no step is zero.
        scales[:] = np.where(scales == 0, steps, scales * steps)

    def _put_vector(self, kind: VectorKind, tensor: TensorInfo, values: Array) -> None:
        _write(self._target[self._vector[kind] :], tensor, values)


def _finite(tensor: TensorInfo, raw: bytes) -> Array:
    values = decode(tensor.dtype, raw)
    if not np.isfinite(values).all():
        raise MalformedFileError(f"tensor {quoted(tensor.name)} holds NaN or infinity")
    return values.reshape(tensor.shape)


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


def _write(target: np.ndarray[Any, Any], tensor: TensorInfo, values: Array) -> None:
    """Encodes `values` at the beginning of `target`."""
    if target.dtype == np.int8:
        target = target[: values.size * SCALE_BYTES].view(np.float32)
    with np.errstate(over="ignore"):
        encoded = _encode(np.ascontiguousarray(values), target.dtype)
    if _overflowed(encoded):
        raise _too_large(tensor)
    target[: encoded.size] = encoded.ravel()


def _too_large(tensor: TensorInfo) -> MalformedFileError:
    return MalformedFileError(
        f"tensor {quoted(tensor.name)} has values too large for the server's dtype; use --dtype float32"
    )


def _quantize(rows: Array) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Array]:
    """Each row as int8 times a step, which is positive: 1 for a row of zeros."""
    steps = np.abs(rows).max(axis=1) / np.float32(127)
    # So small a row that its step is no normal number counts as zero.
    steps[steps < np.finfo(np.float32).tiny] = 1
    return np.rint(rows / steps[:, None]).astype(np.int8), steps


def _encode(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Finite float32 as float32, float16, or the bits of bfloat16 (uint16), rounded to nearest even."""
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _overflowed(encoded: np.ndarray[Any, Any]) -> bool:
    if encoded.dtype == np.uint16:
        return bool(((encoded & 0x7F80) == 0x7F80).any())
    return not bool(np.isfinite(encoded).all())
