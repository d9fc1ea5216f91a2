"""What adapters do in a step. The runner and the model's stand-ins know only `Effect` and its two kin."""

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
    """One kind of adapter, for all tokens of a step that use it; tokens that do not stay as they are.

    A site's input passes `before` of every effect in order, then the frozen weight, then `after` of
    every effect in order.
    """

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        """The input [T, in] that the frozen weight sees; `x` itself must stay as it is."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output [T, out] in place; `x` is what the frozen weight saw."""


class EmbeddingEffect(Protocol):
    """What an adapter does where token ids become vectors."""

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        """Changes the embeddings x [T, hidden] of the token ids [T] in place."""


class NormEffect(Protocol):
    """What an adapter does at a norm."""

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output y [T, width] in place; x is the input."""


Kinds = tuple[type[Effect], ...]


def kinds(effects: Iterable[Effect]) -> Kinds:
    """What a recorded step (`graphs`) is known by: a step with effects of the same kinds, over the same pool
    and buffers, can be replayed from it. A kind that is to be recorded reads its batch on the device alone.
    """
    return tuple(type(effect) for effect in effects)


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """An effect of adapters in a pool; of its own it does nothing."""

    pool: LoraPool
    batch: LoraBatch

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return x

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Nothing."""


class LowRankAdd(_Pooled):
    """LoRA: y += weight * (x A^T) B, for each of a token's adapters (Hu et al., 2021)."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        lora.apply(x, y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vocabulary.add_low_rank(x, ids, self.pool, site.embedding, self.batch, site.scale)


class InputScale(_Pooled):
    """IA3 on a feed-forward's input: x times the token's vector."""

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return vectors.scale_input(x, self.pool, site, self.batch)


class OutputScale(_Pooled):
    """IA3 on keys and values, DoRA's magnitudes: y times the token's vector."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.scale_output(y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vectors.scale_output(x, self.pool, site.embedding, self.batch)


class BiasAdd(_Pooled):
    """A LoRA pair's bias: y += weight * b."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.add_bias(y, self.pool, site, self.batch)


class OwnWeights(_Pooled):
    """modules_to_save: projections and norms with weights of the adapter's own."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        replacement.linear(x, y, self.pool, site, self.batch)

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        for own in replacement.own_weights(self.pool, self.batch, site.entry, 1, site.width):
            rows = site.compute(x.index_select(0, own.tokens), own.weight[0], own.bias)
            y.index_copy_(0, own.tokens, rows)


class TokenRows(_Pooled):
    """Rows of the embedding and of the head that are the adapter's own: trained, or of added tokens."""

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
    """What the adapters of a batch do, in order; without vectors among them a low-rank pair is all.

    Args:
        residual: for the adapters that read it.
    """
    pairs = LowRankAdd(pool, batch)
    if not vectors.any_vectors(pool, batch):
        return (pairs,)
    # The magnitude of DoRA scales the base's output alone: its pair, scaled at load, comes after.
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
    """Whether an adapter of the batch acts at a norm, the embedding or the head."""
    return bool(pool.host.outside[batch.host.segment[:, 0]].any())


def norm_effects(pool: LoraPool, batch: LoraBatch) -> tuple[NormEffect, ...]:
    """What the adapters of a batch do at norms."""
    return (OwnWeights(pool, batch),) if replacement.any_weights(pool, batch) else ()


def acts_between(effects: Iterable[Effect], norms: Iterable[NormEffect]) -> bool:
    """Whether an effect of a step acts, or reads, between the projections: nothing is fused there then."""
    return any(norms) or any(isinstance(effect, Bottlenecks) for effect in effects)


def embedding_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[EmbeddingEffect, ...]:
    """What the adapters of a batch do at the embedding, in order."""
    if not vocabulary.acts_at(pool, batch, site.embedding.first_entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch))


def head_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[Effect, ...]:
    """What the adapters of a batch of sampled rows do at the head, in order."""
    entry = site.head.first_entry
    if not vocabulary.acts_at(pool, batch, entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch), BiasAdd(pool, batch))
