"""The effects of adapters in a step.

The runner and the modules in the model use only the protocols `Effect`, `EmbeddingEffect` and `NormEffect`.
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
    """One kind of adapter, applied to all tokens of a step that use it; other tokens do not change.

    At each site, the input passes through `before` of every effect in order, then the frozen weight, then
    `after` of every effect in order.
    """

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        """The input [T, in] for the frozen weight; must not change `x` itself."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output y [T, out] in place; x [T, in] was the frozen weight's input."""


class EmbeddingEffect(Protocol):
    """One kind of adapter at the input embedding."""

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        """Changes the embeddings x [T, hidden] of the token ids (int64 [T]) in place."""


class NormEffect(Protocol):
    """One kind of adapter at a norm."""

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the norm's output y [T, width] in place; x [T, width] is its input."""


Kinds = tuple[type[Effect], ...]


def kinds(effects: Iterable[Effect]) -> Kinds:
    """The key of a recorded step (`run/graphs`): the classes of its effects, in order.

    A step with effects of the same kinds, over the same pool and buffers, can replay the recording. An effect
    can be recorded only if it reads its batch from device memory alone.
    """
    return tuple(type(effect) for effect in effects)


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """Base class of the effects: adapters of a pool, applied to the runs of a batch. It changes nothing."""

    pool: LoraPool
    batch: LoraBatch

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return x

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Nothing."""


class LowRankAdd(_Pooled):
    """LoRA (Hu et al., 2021): y += weight * (x A^T) B for each of a token's adapters."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        lora.apply(x, y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vocabulary.add_low_rank(x, ids, self.pool, site.embedding, self.batch, site.scale)


class InputScale(_Pooled):
    """IA3 on a feed-forward's input: x times a vector [in] of the token's adapter (Liu et al., 2022)."""

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return vectors.scale_input(x, self.pool, site, self.batch)


class OutputScale(_Pooled):
    """IA3 on keys and values, and DoRA's magnitudes (Liu et al., 2024): y times an adapter's vector [out]."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.scale_output(y, self.pool, site, self.batch)

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vectors.scale_output(x, self.pool, site.embedding, self.batch)


class BiasAdd(_Pooled):
    """The bias of a LoRA pair: y += weight * b, b [out]."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vectors.add_bias(y, self.pool, site, self.batch)


class OwnWeights(_Pooled):
    """PEFT's `modules_to_save`: the adapter's weights replace those of projections and norms."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        replacement.linear(x, y, self.pool, site, self.batch)

    def norm(self, site: NormSite, x: torch.Tensor, y: torch.Tensor) -> None:
        for own in replacement.own_weights(self.pool, self.batch, site.entry, 1, site.width):
            rows = site.compute(x.index_select(0, own.tokens), own.weight[0], own.bias)
            y.index_copy_(0, own.tokens, rows)


class TokenRows(_Pooled):
    """The adapter's rows of the embedding and the head: trained tokens and added tokens."""

    def embed(self, site: Vocabulary, ids: torch.Tensor, x: torch.Tensor) -> None:
        vocabulary.place_rows(x, ids, self.pool, site.embedding, self.batch, site.scale)

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        vocabulary.replace_logits(x, y, self.pool, site, self.batch)


@dataclasses.dataclass(frozen=True)
class Bottlenecks(_Pooled):
    """Bottleneck adapters (Houlsby et al., 2019): y += network(y, the residual stream, or their sum)."""

    residual: ResidualStream | None

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        stream: torch.Tensor | None = None
        if self.residual is not None and bottleneck.reads_residual(self.pool, self.batch, site):
            stream = self.residual.at(site)
        bottleneck.add(y, stream, self.pool, site, self.batch)


def effects_of(
    pool: LoraPool, batch: LoraBatch, residual: ResidualStream | None = None
) -> tuple[Effect, ...]:
    """The effects of a batch's adapters at projections, in the order in which they apply.

    Args:
        residual: the residual stream, for adapters that read it.
    """
    pairs = LowRankAdd(pool, batch)
    if not vectors.any_vectors(pool, batch):
        return (pairs,)
    # DoRA's magnitude scales only the base's output: its pair was scaled at load and is added afterwards.
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
    """True if an effect acts or reads between the projections, so that nothing may be fused there."""
    return any(norms) or any(isinstance(effect, Bottlenecks) for effect in effects)


def embedding_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[EmbeddingEffect, ...]:
    """The effects of a batch's adapters at the embedding, in the order in which they apply."""
    if not vocabulary.acts_at(pool, batch, site.embedding.first_entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch))


def head_effects(pool: LoraPool, batch: LoraBatch, site: Vocabulary) -> tuple[Effect, ...]:
    """The effects at the head, in the order in which they apply, for a batch of rows with logits."""
    entry = site.head.first_entry
    if not vocabulary.acts_at(pool, batch, entry):
        return ()
    return (TokenRows(pool, batch), OutputScale(pool, batch), LowRankAdd(pool, batch), BiasAdd(pool, batch))
