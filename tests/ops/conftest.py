"""Random LoRA problems with a float64 oracle written token by token, and everything around them poisoned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from loraplex_kernels import lora
from loraplex_kernels.pool import (
    AdapterLayout,
    EntryShape,
    LoraBatch,
    LoraPool,
    LoraSite,
    Run,
    adapter_layout,
    extent_alignment,
)

NAN = float("nan")


@dataclass
class LoraCase:
    """One site, a pool with some adapters, and a batch.

    The arena is NaN wherever no adapter of the batch lies, in slots that no run names too, and y and x are
    windows of NaN-filled buffers, so that a read out of range shows in the result and a write out of range in
    `check_poison`. With `scaled`, adapters are int8: the poison is then -1, which is NaN read as a scale.
    """

    in_features: int
    widths: tuple[int, ...]
    ranks: Sequence[Sequence[int]]
    runs: list[Run]
    num_tokens: int
    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0
    first_entry: int = 2
    gap: int = 0
    scaled: bool = False
    pool: LoraPool = field(init=False)
    site: LoraSite = field(init=False)
    batch: LoraBatch = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        column, slices = 0, []
        for width in self.widths:
            slices.append((column, width))
            column += width + self.gap
        self.site = LoraSite(self.first_entry, self.in_features, tuple(slices))
        self.columns = column
        self._make_pool()
        self.batch = LoraBatch.build(self.runs, self.device)
        self.x_buffer = torch.full((self.num_tokens, self.in_features + 8), NAN, dtype=self.dtype)
        self.x_buffer[:, : self.in_features] = self.normal(self.num_tokens, self.in_features)
        self.x_buffer = self.x_buffer.to(self.device)
        self.x = self.x_buffer[:, : self.in_features]
        self.y_buffer = torch.full((self.num_tokens, self.columns + 16), NAN, dtype=self.dtype)
        self.y_buffer[:, 8 : 8 + self.columns] = self.normal(self.num_tokens, self.columns)
        self.y_buffer[:, 8 : 8 + self.columns : 5] = -0.0
        self.y_buffer = self.y_buffer.to(self.device)
        self.before = self.y_buffer.clone()
        self.y = self.y_buffer[:, 8 : 8 + self.columns]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def _make_pool(self) -> None:
        multiple = extent_alignment([self.in_features, *self.widths])
        layouts = [
            adapter_layout(
                [
                    EntryShape(self.first_entry + s, self.in_features, width, rank)
                    for s, (width, rank) in enumerate(zip(self.widths, slot_ranks, strict=True))
                ],
                multiple,
                scaled=self.scaled,
            )
            for slot_ranks in self.ranks
        ]
        starts, end = [], multiple
        for layout in layouts:
            starts.append(end)
            end = -(-(end + layout.num_elements + 1) // multiple) * multiple
        self.pool = LoraPool.allocate(
            num_elements=end + multiple,
            num_slots=max(len(layouts), 1),
            num_entries=self.first_entry + len(self.widths) + 1,
            dtype=self.dtype,
            device=self.device,
            max_rank=max([1, *(max(slot_ranks) for slot_ranks in self.ranks)]),
            scaled=self.scaled,
        )
        poison = -1 if self.scaled else NAN
        arena = torch.full((self.pool.arena.numel(),), poison, dtype=self.pool.arena.dtype)
        self.matrices: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        used = {slot for _, _, adapters in self.runs for slot, _ in adapters}
        for slot, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
            if slot not in used:
                continue
            if self.scaled:
                self._write_scaled(arena, slot, start, layout)
                continue
            offsets = zip(layout.entries, layout.a_offset, layout.b_offset, strict=True)
            for shape, a_offset, b_offset in offsets:
                a = self.normal(shape.rank, self.in_features) / math.sqrt(self.in_features)
                b = self.normal(shape.rank, shape.width)
                for offset, rows in ((a_offset, a), (b_offset, b)):
                    first = start + offset
                    arena[first : first + shape.rank_padded * rows.shape[1]] = 0
                    arena[first : first + rows.numel()] = rows.flatten()
                self.matrices[slot, shape.entry - self.first_entry] = (a.double(), b.double())
        self.pool.arena.copy_(arena)
        for slot, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
            self.pool.bind(slot, start, layout)

    def _write_scaled(self, arena: Tensor, slot: int, start: int, layout: AdapterLayout) -> None:
        """Random bytes, zero rows past the rank, and scales with which h is about as large as x."""
        offsets = zip(layout.entries, layout.a_offset, layout.b_offset, layout.scale_offset, strict=True)
        for shape, *starts in offsets:
            padded = shape.rank_padded
            parts = []
            for first, width in zip(starts, (shape.in_features, shape.width), strict=False):
                rows = torch.zeros(padded, width, dtype=torch.int8)
                rows[: shape.rank].random_(-127, 128, generator=self.generator)
                arena[start + first : start + first + rows.numel()] = rows.flatten()
                parts.append(rows[: shape.rank].double())
            scale = torch.zeros(padded)
            scale[: shape.rank].uniform_(0.5, 2.0, generator=self.generator)
            scale /= math.sqrt(self.in_features) * 75 * 75
            first = start + starts[2]
            arena[first : first + 4 * padded] = scale.view(torch.int8)
            a, b = parts
            self.matrices[slot, shape.entry - self.first_entry] = (a, b * scale[: shape.rank, None].double())

    def oracle(self) -> tuple[Tensor, Tensor]:
        """The right y in float64, and how far from it one rounding of h and one of y may lead,
        elementwise.
        """
        x = self.x.cpu().double()
        y = self.before[:, 8 : 8 + self.columns].cpu().double()
        exact = y.clone()
        rounded = torch.zeros_like(y)
        summed = y.abs()
        for start, end, adapters in self.runs:
            for token in range(start, end):
                for slot, weight in adapters:
                    for s, (column, width) in enumerate(self.site.slices):
                        if (slot, s) in self.matrices:
                            a, b = self.matrices[slot, s]
                            h = a @ x[token]
                            window = slice(column, column + width)
                            weight_32 = float(torch.tensor(weight, dtype=torch.float32))
                            exact[token, window] += weight_32 * (h @ b)
                            rounded[token, window] += abs(weight_32) * (h.abs() @ b.abs())
                            summed[token, window] += abs(weight_32) * ((a.abs() @ x[token].abs()) @ b.abs())
        epsilon = torch.finfo(self.dtype).eps
        tolerance = epsilon * (exact.abs() + rounded) + 4e-6 * summed
        if self.dtype == torch.float64:
            tolerance = 1e-12 * summed
        return exact, tolerance

    def run(self, apply: Callable[..., None] = lora.apply) -> None:
        apply(self.x, self.y, self.pool, self.site, self.batch)

    def check(self) -> None:
        """y is right, no bit changed that should not have, nothing came out of the poison."""
        exact, tolerance = self.oracle()
        error = (self.y.cpu().double() - exact).abs()
        worst = (error / tolerance).nan_to_num(nan=float("inf")).max()
        assert bool((error <= tolerance).all()), f"an error is {worst} times the tolerance"
        self.check_poison()

    def check_poison(self) -> None:
        """Bits stay; in rows that some adapter touches, a slice that none touches keeps its values."""
        may_change = torch.zeros(self.y_buffer.shape, dtype=torch.bool)
        may_lose_sign_of_zero = may_change.clone()
        for start, end, adapters in self.runs:
            slices = range(len(self.widths))
            touched = [s for slot, _ in adapters for s in slices if (slot, s) in self.matrices]
            for s, (column, width) in enumerate(self.site.slices):
                window = slice(8 + column, 8 + column + width)
                may_lose_sign_of_zero[start:end, window] = bool(touched)
                may_change[start:end, window] = s in touched
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]
        after, before = self.y_buffer.cpu(), self.before.cpu()
        same = (after.view(bits) == before.view(bits)) | (may_lose_sign_of_zero & (after == before))
        assert bool(same[~may_change].all()), "an element changed that no adapter touches"


@dataclass(frozen=True)
class LoraCaseMaker:
    """Makes `LoraCase`s, and random runs for them."""

    def __call__(self, **arguments: object) -> LoraCase:
        return LoraCase(**arguments)  # type: ignore[arg-type]

    def random_runs(self, seed: int, num_tokens: int, num_slots: int, longest: int) -> list[Run]:
        """Runs over `num_tokens` tokens: some with no adapter, some absent, most with one to four
        adapters.
        """
        generator = torch.Generator().manual_seed(seed)

        def below(bound: int) -> int:
            return int(torch.randint(bound, (1,), generator=generator))

        runs: list[Run] = []
        token = 0
        while token < num_tokens:
            end = min(num_tokens, token + 1 + below(longest))
            kind = below(10)
            if kind and num_slots:
                count = min(num_slots, 1 if kind < 7 else 2 + below(3))
                slots = torch.randperm(num_slots, generator=generator)[:count].tolist()
                weights = [1.0 if kind < 5 else (below(400) - 200) / 100 for _ in slots]
                runs.append((token, end, tuple(zip(slots, weights, strict=True))))
            elif below(2):
                runs.append((token, end, ()))
            token = end
        return runs


@pytest.fixture(scope="session")
def lora_case() -> LoraCaseMaker:
    """A maker of random LoRA problems with an oracle."""
    return LoraCaseMaker()
