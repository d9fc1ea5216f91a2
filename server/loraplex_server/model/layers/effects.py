"""Effects of adapters in a step.

The runner and the replaced modules use the protocols `Effect`, `EmbeddingEffect` and `NormEffect` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from loraplex_kernels import bottleneck, lora, replacement, vectors, vocabulary
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite
from loraplex_server.model.layers.residual import ResidualStream

if TYPE_CHECKING:
    from loraplex_server.model.layers.vocabulary import Vocabulary
    from loraplex_server.model.parts import NormSite


class Effect(Protocol):
    """One kind of adapter, applied to all tokens of a step that use it; other tokens stay unchanged.

    A site applies `before` of every effect in order, then the frozen weight, then `after` of every effect in
    order.
    """

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        """The input [T, in] of the frozen weight, from x [T, in]; must not change `x` itself."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output y [T, out] in place; `x` [T, in] is the input of the frozen weight."""


class EmbeddingEffect(Protocol):
    """An adapter's effect at the input embedding."""

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        """Changes the embeddings x [T, hidden] of the token ids [T] in place."""


class NormEffect(Protocol):
    """An adapter's effect at a norm."""

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output y [T, width] in place; x [T, width] is the input."""


Kinds = tuple[type[Effect], ...]


def kinds(effects: Iterable[Effect]) -> Kinds:
    """The key of a recorded step (`graphs`).

    A recording replays any step whose effects are of the same kinds, over the same pool and buffers. Effects
    that can be recorded read their batch on the device only.
    """
    return tuple(type(effect) for effect in effects)


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """Base class for the effects of adapters in a pool; does nothing itself."""

    pool: LoraPool
    batch: LoraBatch

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return x

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Does nothing."""


class LowRankAdd(_Pooled):
    """LoRA: y += weight * (x A^T) B, for each of a token's adapters (Hu et al., 2021)."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        lora.apply(x, y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vocabulary.add_low_rank(x, ids, self.pool, site.embedding, self.batch, site.scale)


class InputScale(_Pooled):
    """IA3 on a feed-forward's input: x * the token's vector."""

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return vectors.scale_input(x, self.pool, site, self.batch)


class OutputScale(_Pooled):
    """IA3 on keys and values, and DoRA's magnitudes: y * the token's vector."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.scale_output(y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vectors.scale_output(x, self.pool, site.embedding, self.batch)


class BiasAdd(_Pooled):
    """A LoRA pair's bias: y += weight * b."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.add_bias(y, self.pool, site, self.batch)


class OwnWeights(_Pooled):
    """modules_to_save: projections and norms whose weights the adapter replaces."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        replacement.linear(x, y, self.pool, site, self.batch)

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        for own in replacement.own_weights(self.pool, self.batch, site.entry, 1, site.width):
            rows = site.compute(x.index_select(0, own.tokens), own.weight[0], own.bias)
            y.index_copy_(0, own.tokens, rows)


class TokenRows(_Pooled):
    """Rows of the embedding and of the head that the adapter replaces or adds."""

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vocabulary.place_rows(x, ids, self.pool, site.embedding, self.batch, site.scale)

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vocabulary.replace_logits(x, y, self.pool, site, self.batch)


@dataclasses.dataclass(frozen=True)
class Bottlenecks(_Pooled):
    """Bottleneck adapters: y += a small network of y, of the residual stream, or of their sum."""

    residual: ResidualStream | None

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        stream: torch.Tensor | None = None
        if self.residual is not None and bottleneck.reads_residual(self.pool, self.batch, site):
            stream = self.residual.at(site)
        bottleneck.add(y, stream, self.pool, site, self.batch)


def effects_of(
    pool: LoraPool, batch: LoraBatch, residual: ResidualStream | None = None
) -> tuple[Effect, ...]:
    """The effects of a batch's adapters at projections, in order.

    Args:
        residual: the residual stream, for the adapters that read it.
    """
    pairs = LowRankAdd(pool, batch)
    if not vectors.any_vectors(pool, batch):
        return (pairs,)
    # DoRA's magnitude scales the base's output only; its low-rank pair, scaled at load, comes after.
    effects: tuple[Effect, ...] = (
        InputScale(pool, batch),
        OutputScale(pool, batch),
        pairs,
        BiasAdd(pool, batch),
    )
    if replacement.any_weights(pool, batch):
        effects = (OwnWeights(pool, batch), *effects)
    if not bottleneck.any_networks(pool, batch):
        return effects
    if residual is not None:
        residual.watch()
    return (*effects, Bottlenecks(pool, batch, residual))


def acts_outside(pool: LoraPool, batch: LoraBatch) -> bool:
    """True if an adapter of the batch acts at a norm, the embedding or the head."""
    return bool(pool.host.outside[batch.host.segment[:, 0]].any())


def norm_effects(pool: LoraPool, batch: LoraBatch) -> tuple[NormEffect, ...]:
    """The effects of a batch's adapters at norms."""
    return (OwnWeights(pool, batch),) if replacement.any_weights(pool, batch) else ()


def acts_between(effects: Iterable[Effect], norms: Iterable[NormEffect]) -> bool:
    """True if an effect of the step acts or reads between the projections, which rules out fusion there."""
    return any(norms) or any(isinstance(effect, Bottlenecks) for effect in effects)


def embedding_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[EmbeddingEffect, ...]:
    """The effects of a batch's adapters at the embedding, in order."""
    if not vocabulary.acts_at(pool, batch, site.embedding.first_entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch))


def head_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[Effect, ...]:
    """The effects, at the head, of the adapters of a batch of sampled rows, in order."""
    entry = site.head.first_entry
    if not vocabulary.acts_at(pool, batch, entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch), BiasAdd(pool, batch))
