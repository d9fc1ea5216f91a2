"""The ops between a layer's projections: sums and norms, rotations and KV writes, gates.

The peers do the same: `modules` is transformers' own code, `torch` adds and calls `F.rms_norm`, `compiled` is
`torch.compile` of the reference, for one number of tokens, as it compiles anew for each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from loraplex_bench.ops.registry import Contender, Op, Results, Setting
from loraplex_kernels import gated, norm
from loraplex_kernels.attention import AttentionBatch, kv_cache_shape, rotary, write_kv
from loraplex_kernels.attention.rotary.reference import rotate as plain_rotate
from loraplex_kernels.gated.reference import gated as plain_gated
from loraplex_kernels.norm import RmsNorm
from loraplex_kernels.norm.reference import add_rms_norm as plain_add_rms_norm
from loraplex_kernels.norm.reference import rms_norm as plain_rms_norm

BLOCK_SIZE = 16
COMPILED_TOKENS = 64

Call = Callable[[], Results]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's ops. `sandwich`: outputs are normed, too, before they are added."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    sandwich: bool = False


SHAPES = (
    Shape("llama-3-8b", hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336),
    Shape("gemma-2-9b", hidden=3584, heads=16, kv_heads=8, head_dim=256, intermediate=14336, sandwich=True),
)
TOKENS = (64, 1, 16, 256, 2048)
OPS = ("norm", "sum and norm", "rotation and write", "gate")


@dataclass(frozen=True)
class Case:
    """One row."""

    op: str
    shape: Shape
    tokens: int

    def __str__(self) -> str:
        return f"{self.op}, {self.shape.name}, {self.tokens} tokens"

    def least_bytes(self, element: int) -> int:
        """Inputs once, results once; cos and sin are computed for all layers, and read by each."""
        shape, tokens = self.shape, self.tokens
        if self.op == "norm":
            return (2 * tokens + 1) * shape.hidden * element
        if self.op == "sum and norm":
            return (4 * tokens + 1 + shape.sandwich) * shape.hidden * element
        if self.op == "gate":
            return 3 * tokens * shape.intermediate * element
        heads = 2 * (shape.heads + 2 * shape.kv_heads)
        return tokens * ((heads + 2) * shape.head_dim * element + 8)


def cases() -> list[Case]:
    """The most wanted first."""
    return [Case(op, shape, tokens) for tokens, shape, op in itertools.product(TOKENS, SHAPES, OPS)]


_TINY = Shape("tiny", hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=48)
TINY = [
    Case(op, dataclasses.replace(_TINY, sandwich=sandwich), COMPILED_TOKENS)
    for op in OPS
    for sandwich in (False, True)
]


class Inputs:
    """Random tensors of one case, and its op, and the same by other means."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        shape, tokens = case.shape, case.tokens
        form: norm.Form = "offset" if shape.sandwich else "rounded"

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, dtype=dtype, device=device)

        if case.op in ("norm", "sum and norm"):
            self.x, self.residual = draw(1, tokens, shape.hidden), draw(1, tokens, shape.hidden)
            self.norm = RmsNorm(draw(shape.hidden), 1e-5, form)
            self.after = RmsNorm(draw(shape.hidden), 1e-5, form) if shape.sandwich else None
        elif case.op == "gate":
            # As one projection leaves them.
            self.gate, self.up = draw(1, tokens, 2 * shape.intermediate).chunk(2, dim=-1)
            self.activation: gated.Activation = "gelu_tanh" if shape.sandwich else "silu"
        else:
            widths = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
            self.q, self.k, self.v = (
                part.view(tokens, -1, shape.head_dim) for part in draw(tokens, sum(widths)).split(widths, 1)
            )
            angle = draw(tokens, shape.head_dim // 2).repeat(1, 2)
            self.cos, self.sin = angle.cos(), angle.sin()
            blocks = -(-tokens // BLOCK_SIZE)
            self.cache = torch.zeros(
                kv_cache_shape(blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim), dtype=dtype, device=device
            )
            self.batch = AttentionBatch.build(
                [0, tokens],
                [tokens],
                [0, blocks],
                list(range(blocks)),
                list(range(tokens)),
                block_size=BLOCK_SIZE,
                device=device,
            )

    def copy(self) -> Inputs:
        """The same numbers; what a call changes is of its own."""
        copied = object.__new__(Inputs)
        copied.__dict__.update(self.__dict__)
        if self.case.op == "rotation and write":
            copied.q, copied.cache = self.q.clone(), self.cache.clone()
        return copied

    def own(self) -> Results:
        """The op."""
        if self.case.op == "norm":
            return (norm.rms_norm(self.x, self.norm),)
        if self.case.op == "sum and norm":
            return norm.add_rms_norm(self.x, self.residual, self.norm, after=self.after)
        if self.case.op == "gate":
            return (gated.gated(self.gate, self.up, self.activation),)
        rotary.rotate_and_write(self.q, self.k, self.v, self.cos, self.sin, self.cache, self.batch)
        return self.q, self.cache

    def reference(self) -> Results:
        """The specification in plain torch."""
        if self.case.op == "norm":
            return (plain_rms_norm(self.x, self.norm),)
        if self.case.op == "sum and norm":
            return plain_add_rms_norm(self.x, self.residual, self.norm, after=self.after)
        if self.case.op == "gate":
            return (plain_gated(self.gate, self.up, self.activation),)
        write_kv(plain_rotate(self.k, self.cos, self.sin), self.v, self.cache, self.batch)
        return plain_rotate(self.q, self.cos, self.sin), self.cache

    def peers(self) -> dict[str, Call]:
        """The same by other means, as far as this machine has them."""
        found: dict[str, Call] = {}
        if (modules := self._modules()) is not None:
            found["modules"] = modules
        if self.case.op in ("norm", "sum and norm"):
            found["torch"] = self._torch
        if self.case.tokens == COMPILED_TOKENS and self.case.op != "rotation and write":
            found["compiled"] = self._compiled()
        return found

    def _torch(self) -> Results:
        """Norms in one call, which round once; sums and weights offset by one in others."""

        def normed(x: torch.Tensor, by: RmsNorm) -> torch.Tensor:
            weight = 1.0 + by.weight if by.form == "offset" else by.weight
            return F.rms_norm(x, weight.shape, weight, by.eps)

        if self.case.op == "norm":
            return (normed(self.x, self.norm),)
        total = self.residual + (self.x if self.after is None else normed(self.x, self.after))
        return total, normed(total, self.norm)

    def _modules(self) -> Call | None:
        """transformers' own classes and functions."""
        try:
            from transformers.activations import ACT2FN
            from transformers.models.gemma2 import modeling_gemma2
            from transformers.models.llama import modeling_llama
        except ImportError:
            return None

        def module(by: RmsNorm) -> torch.nn.Module:
            kind = modeling_gemma2.Gemma2RMSNorm if by.form == "offset" else modeling_llama.LlamaRMSNorm
            made: torch.nn.Module = kind(len(by.weight), by.eps)
            made.weight = torch.nn.Parameter(by.weight, requires_grad=False)
            return made

        if self.case.op == "norm":
            alone = module(self.norm)
            return lambda: (alone(self.x),)
        if self.case.op == "sum and norm":
            following = module(self.norm)
            first = torch.nn.Identity() if self.after is None else module(self.after)

            def add() -> Results:
                total = self.residual + first(self.x)
                return total, following(total)

            return add
        if self.case.op == "gate":
            activate = ACT2FN["gelu_pytorch_tanh" if self.activation == "gelu_tanh" else self.activation]
            return lambda: (activate(self.gate) * self.up,)

        def rotate() -> Results:
            rows = (x.transpose(0, 1)[None] for x in (self.q, self.k))
            q, k = modeling_llama.apply_rotary_pos_emb(*rows, self.cos[None], self.sin[None])
            write_kv(k[0].transpose(0, 1), self.v, self.cache, self.batch)
            return q[0].transpose(0, 1), self.cache

        return rotate

    def _compiled(self) -> Call:
        make = functools.partial(_compile, device=self.device.type)
        if self.case.op == "norm":
            return lambda: (make(plain_rms_norm)(self.x, self.norm),)
        if self.case.op == "sum and norm":
            add: Callable[..., Results] = make(plain_add_rms_norm)
            return lambda: add(self.x, self.residual, self.norm, after=self.after)
        return lambda: (make(plain_gated)(self.gate, self.up, self.activation),)


@functools.cache
def _compile(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Once for each function; shapes are compiled for as they come. On a CPU, where the bench is only tried
    out, without a C++ compiler."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, backend=backend)
    return compiled


def prepare(case: Case, setting: Setting) -> Iterator[Contender]:
    """The op and its peers, in passes over several sets of inputs."""
    least = case.least_bytes(setting.dtype.itemsize)
    sets = [Inputs(case, setting.dtype, setting.device) for _ in range(setting.copies(least))]
    first = sets[0]
    yield Contender(
        "loraplex",
        lambda: [inputs.own for inputs in sets],
        lambda: first.copy().own(),
        lambda: first.copy().reference(),
        least_bytes=least,
        role="own",
    )
    for name in first.peers():
        yield Contender(
            name,
            functools.partial(_calls, sets, name),
            functools.partial(_results, first, name),
            lambda: first.copy().reference(),
        )


def _calls(sets: Sequence[Inputs], name: str) -> list[Call]:
    return [inputs.peers()[name] for inputs in sets]


def _results(inputs: Inputs, name: str) -> Results:
    return inputs.copy().peers()[name]()


OP = Op("fused", {"cuda": cases}, TINY, prepare, group=lambda case: case.op)
