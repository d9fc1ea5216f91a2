"""`make tune-gpu`: measures which variants of the LoRA kernels the card at hand runs fastest.

    python -m loraplex_bench.tune_lora --time-limit 400

For each family of shapes it starts from the built-in row of the table and changes one group of its numbers at
a time, keeping what is faster: under CUDA graphs, with cold adapters, on the batches that the family is for.
A candidate that does not compile, does not fit, or computes something else is left out. Writes the table with
the card's name into the package, where it is read from then on for cards of that name.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex_bench.load.environment import environment
from loraplex_bench.ops.lora import COPIES, deltas, passes
from loraplex_bench.ops.lora_cases import MODELS, Case, Layers, activations, make_layers, workload
from loraplex_bench.ops.lora_contenders import OwnKernels, Reference
from loraplex_bench.ops.registry import TOLERANCE, largest_error
from loraplex_bench.ops.timers import sample_graph
from loraplex_kernels.lora import tiles
from loraplex_kernels.lora.tiles import Element, Family, LoraTiles, Table

MODEL = "llama-3-8b"
RANKS = "16"
REPLAYS = 7
LEAST_GAIN = 0.01
"""A candidate must be faster by this much; less is noise."""

BATCHES: dict[Family, tuple[tuple[int, str], ...]] = {
    "decode": ((64, "distinct"), (64, "zipf-1.5"), (16, "distinct"), (1, "identical")),
    "shared": ((64, "identical"), (256, "identical")),
    "prefill": ((1024, "identical"), (4096, "distinct")),
}
"""(tokens, mix) that each family is measured on."""


@dataclass(frozen=True)
class Group:
    """Numbers of a variant that are changed together."""

    name: str
    choices: tuple[dict[str, Any], ...]


def _product(**choices: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


GROUPS: dict[Family, tuple[Group, ...]] = {
    "decode": (
        Group("dependent launch", _product(pdl=(False, True))),
        Group(
            "shrink",
            (
                *_product(vector_k=(512,), shrink_warps=(2, 4), shrink_rank=(8, 16)),
                *_product(vector_k=(1024,), shrink_warps=(4, 8), shrink_rank=(8, 16)),
                *_product(vector_k=(256,), shrink_warps=(1, 2), shrink_rank=(16,)),
            ),
        ),
        Group("planes", _product(shrink_programs=(264, 528, 640, 1056, 2112))),
        Group(
            "expand",
            (
                *_product(expand_columns=(1024,), expand_warps=(4, 8), dot_columns=(128, 256)),
                *_product(expand_columns=(512,), expand_warps=(2, 4), dot_columns=(64, 128)),
                *_product(expand_columns=(256,), expand_warps=(1, 2), dot_columns=(64,)),
                *_product(expand_columns=(2048,), expand_warps=(8,), dot_columns=(256,)),
            ),
        ),
        Group("rows one by one", _product(vector_rows=(0, 1, 2, 4, 8))),
        Group("tensor cores", _product(shrink_k=(64, 128, 256), shrink_stages=(2, 3, 4))),
    ),
    "shared": (
        Group("dependent launch", _product(pdl=(False, True))),
        Group("shrink", _product(shrink_k=(64, 128), shrink_stages=(2, 3, 4), shrink_warps=(4, 8))),
        Group("planes", _product(shrink_programs=(32, 64, 132, 264))),
        Group("expand", _product(expand_columns=(64, 128, 256), expand_warps=(4, 8), expand_stages=(1, 2))),
    ),
    "prefill": (
        Group("dependent launch", _product(pdl=(False, True))),
        Group("shrink", _product(shrink_k=(64, 128), shrink_stages=(2, 3, 4), shrink_warps=(4, 8))),
        Group("planes", _product(shrink_programs=(32, 132, 264, 528))),
        Group("expand", _product(expand_columns=(64, 128, 256), expand_warps=(4, 8), expand_stages=(1, 2))),
    ),
}
"""The groups that are tried, in this order, each group from the best of the groups before it."""


def candidates(config: LoraTiles, group: Group) -> Iterator[LoraTiles]:
    """Variants of `config` that differ from it in `group`."""
    for choice in group.choices:
        changed = dataclasses.replace(config, **choice)
        if not changed.vector_rows:
            changed = dataclasses.replace(changed, vector_k=config.vector_k)
        if config.stacked:
            changed = dataclasses.replace(changed, dot_columns=changed.expand_columns)
        if changed != config:
            yield changed


Score = Callable[[LoraTiles], float]
"""Seconds, or infinity for a variant that cannot be used."""


def search(
    config: LoraTiles, groups: Sequence[Group], score: Score, deadline: float, say: Callable[[str], None]
) -> LoraTiles:
    """The fastest variant found from `config`, group by group, until `deadline` (`time.monotonic`)."""
    best, least = config, score(config)
    say(f"  built in: {least * 1e6:.1f} us")
    for group in groups:
        for candidate in candidates(best, group):
            if time.monotonic() > deadline:
                say("  time is up")
                return best
            found = score(candidate)
            if found < least * (1 - LEAST_GAIN):
                changed = {
                    field.name: getattr(candidate, field.name)
                    for field in dataclasses.fields(LoraTiles)
                    if getattr(candidate, field.name) != getattr(best, field.name)
                }
                say(f"  {group.name}: {found * 1e6:.1f} us with {changed}")
                best, least = candidate, found
    return best


def scorer(layers: Layers, family: Family, element: Element, say: Callable[[str], None]) -> Score:
    """Times a variant on the family's batches: the geometric mean of seconds a layer."""
    shape, device = MODELS[layers.model], layers.pool.arena.device
    own = OwnKernels(layers)
    batches = []
    for tokens, mix in BATCHES[family]:
        work = workload(Case(layers.model, tokens, mix, layers.ranks), shape, layers.copies)
        batches.append((work, activations(shape, tokens, layers.pool.dtype, device)))
    truth = Reference(layers)

    def score(config: LoraTiles) -> float:
        total = 0.0
        with tiles.using({**tiles.BUILT_IN, (family, element): config}):
            try:
                for work, data in batches:
                    error = largest_error(deltas(own, work, data), deltas(truth, work, data))
                    if not error <= TOLERANCE:
                        say(f"  wrong results, left out: {config}")
                        return math.inf
                    total += math.log(sample_graph(passes(own, work, data), REPLAYS).median_us * 1e-6)
            except Exception as error:
                # Whatever Triton raises for a variant that the card cannot run.
                reason = (str(error) or "no reason given").splitlines()[0][:120]
                say(f"  left out: {type(error).__name__}: {reason}")
                return math.inf
        return math.exp(total / len(batches))

    return score


def tune(
    families: Sequence[Family],
    elements: Sequence[Element],
    device: torch.device,
    time_limit_s: float,
    say: Callable[[str], None],
) -> Table:
    """The table for the card at hand; what there was no time for is as built in."""
    table = dict(tiles.BUILT_IN)
    wanted = [(family, element) for element in elements for family in families]
    started = time.monotonic()
    for index, (family, element) in enumerate(wanted):
        deadline = started + time_limit_s * (index + 1) / len(wanted)
        say(f"{family}, {element}:")
        layers = make_layers(MODEL, RANKS, COPIES, torch.bfloat16, device, scaled=element == "int8")
        score = scorer(layers, family, element, say)
        table[family, element] = search(table[family, element], GROUPS[family], score, deadline, say)
        del layers, score
        torch.cuda.empty_cache()
    return table


def main() -> int:
    """Returns 0, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="file of the table (default: into the package)")
    parser.add_argument("--family", action="append", choices=tiles.FAMILIES, help="default: all")
    parser.add_argument(
        "--element", action="append", choices=("half", "int8"), help="default: half, then int8"
    )
    parser.add_argument("--time-limit", type=float, default=500.0, metavar="S", help="seconds in all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: `make tune-gpu` needs one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()

    def say(line: str) -> None:
        print(line, flush=True)

    say(card)
    with torch.inference_mode():
        table = tune(
            arguments.family or tiles.FAMILIES,
            arguments.element or ("half", "int8"),
            torch.device("cuda"),
            arguments.time_limit,
            say,
        )
    path = arguments.output or tiles.card_file(card)
    tiles.dump(path, table, {"card": card, "environment": environment()})
    say(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
