"""The variants of the LoRA kernels: three families by the shape of the batch, one small table.

=========  ======================================  ==========================================================
family     batch                                   limited by
=========  ======================================  ==========================================================
`decode`   few rows for each adapter               reading adapters: a few rows are matrix-vector products, in
                                                   many programs with reads in flight
`shared`   many rows for each adapter, few in all  launches: one A for all slices, the inner dimension in many
                                                   planes, narrow column blocks
`prefill`  many rows for each adapter, and many    reading x and y: each once, tensor cores, wgmma
           of them
=========  ======================================  ==========================================================

Rows per tile are decided once a step, when the batch's metadata is built, since tiles are cut on the host;
the rest is looked up at launch, from numbers that the batch's buffers fix, so a CUDA graph keeps its
variants. Nothing is tuned at run time. The built-in table follows from the shapes and from what the compiler
makes of them for sm_90; ``make tune-gpu`` measures the card at hand and writes ``tuned/<card>.json``, which
is read instead for a card of that name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from loraplex_kernels.pool import DECODE_ROWS, PREFILL_ROWS

Family = Literal["decode", "shared", "prefill"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Element = Literal["half", "single", "int8"]
ELEMENTS: tuple[Element, ...] = get_args(Element)
"""Adapters in bfloat16 or float16; anything beside float32 activations; adapters in int8 with scales."""

PLANES = (1, 2, 4, 8, 16)
"""Partial sums of the shrink, powers of two: each number is a variant of the expand."""

TUNED = Path(__file__).parent / "tuned"
"""The folder of tables of particular cards."""

_SHARED_PAIRS = 512
"""Number of pairs, eight tiles of `PREFILL_ROWS`, above which reading x and y outweighs the launches."""

_MIN_K_PER_PLANE = 512
"""A plane of fewer inputs than this reads less of x than its partial sums cost."""

_STACKED_RANK = 64
"""Stacked rank rows of a step at least: a tensor core product's full width for the ranks that are usual."""


@dataclass(frozen=True)
class LoraTiles:
    """Sizes of one kernel variant, in elements, all powers of two.

    Attributes:
        rows: pairs (or tokens) of a tile.
        stacked: one program of the shrink computes all slices of a site, instead of one program per slice.
        vector_rows: tiles of at most this many rows run row by row, without tensor cores; 0 for none.
        vector_k: elements of x that such a row is multiplied with at once in the shrink.
        shrink_rank, shrink_k: the piece of A per step of the shrink.
        shrink_programs: number of programs up to which planes are added.
        expand_rank, expand_columns: the piece of B that a program of the expand holds or, for tiles of more
            rows, goes through `dot_columns` at a time.
        shrink_warps, shrink_stages, expand_warps, expand_stages: as Triton means them.
        pdl: programmatic dependent launch; needs Hopper or newer.
    """

    rows: int
    stacked: bool
    vector_rows: int
    vector_k: int
    shrink_rank: int
    shrink_k: int
    shrink_warps: int
    shrink_stages: int
    shrink_programs: int
    expand_rank: int
    expand_columns: int
    dot_columns: int
    expand_warps: int
    expand_stages: int
    pdl: bool = False

    @property
    def k_step(self) -> int:
        """Planes begin at multiples of this."""
        return max(self.shrink_k, self.vector_k)

    def stacked_rank(self, slices: int) -> int:
        """Stacked rank rows per step: room for `shrink_rank` of each slice."""
        wanted = self.shrink_rank * slices
        return min(max(_STACKED_RANK, self.shrink_rank), 1 << (wanted - 1).bit_length())


Table = Mapping[tuple[Family, Element], LoraTiles]

_override: Table | None = None


def _decode(
    *,
    vector_k: int,
    shrink_k: int = 128,
    shrink_warps: int = 4,
    shrink_stages: int = 3,
    expand_columns: int = 1024,
    dot_columns: int,
) -> LoraTiles:
    """Rows one by one; about five programs of the shrink for each multiprocessor keep reads in flight."""
    return LoraTiles(
        rows=DECODE_ROWS,
        stacked=False,
        vector_rows=4,
        vector_k=vector_k,
        shrink_rank=16,
        shrink_k=shrink_k,
        shrink_warps=shrink_warps,
        shrink_stages=shrink_stages,
        shrink_programs=640,
        expand_rank=16,
        expand_columns=expand_columns,
        dot_columns=dot_columns,
        expand_warps=4,
        expand_stages=1,
    )


def _stacked(*, shrink_programs: int, single: bool) -> LoraTiles:
    """Tensor cores, all slices in one program; narrow tiles with float32 activations, which have none."""
    columns = 64 if single else 128
    return LoraTiles(
        rows=PREFILL_ROWS,
        stacked=True,
        vector_rows=0,
        vector_k=0,
        shrink_rank=16,
        shrink_k=32 if single else 64,
        shrink_warps=8 if single else 4,
        shrink_stages=2 if single else 3,
        shrink_programs=shrink_programs,
        expand_rank=16,
        expand_columns=columns,
        dot_columns=columns,
        expand_warps=4 if single else 8,
        expand_stages=2,
    )


_PROCESSORS = 132
"""Multiprocessors of an H100: one program of the shrink for each in prefill, two where rows are few."""

BUILT_IN: Table = {
    ("decode", "half"): _decode(vector_k=512, shrink_warps=2, dot_columns=256),
    ("decode", "int8"): _decode(vector_k=1024, dot_columns=128),
    ("decode", "single"): _decode(
        vector_k=256, shrink_k=64, shrink_stages=2, expand_columns=256, dot_columns=64
    ),
    ("shared", "half"): _stacked(shrink_programs=2 * _PROCESSORS, single=False),
    ("shared", "int8"): _stacked(shrink_programs=2 * _PROCESSORS, single=False),
    ("shared", "single"): _stacked(shrink_programs=2 * _PROCESSORS, single=True),
    ("prefill", "half"): _stacked(shrink_programs=_PROCESSORS, single=False),
    ("prefill", "int8"): _stacked(shrink_programs=_PROCESSORS, single=False),
    ("prefill", "single"): _stacked(shrink_programs=_PROCESSORS, single=True),
}


def family(rows: int, num_pairs: int) -> Family:
    """The family of a batch with tiles of `rows` rows."""
    if rows == DECODE_ROWS:
        return "decode"
    return "shared" if num_pairs <= _SHARED_PAIRS else "prefill"


def element(adapters: torch.dtype, compute: torch.dtype) -> Element:
    """The table's key for adapters of dtype `adapters`, beside activations of dtype `compute`."""
    if compute == torch.float32:
        return "single"
    return "int8" if adapters == torch.int8 else "half"


def choose(
    rows: int, num_pairs: int, adapters: torch.dtype, compute: torch.dtype, device: torch.device
) -> LoraTiles:
    """The variant for tiles of `rows` rows, `num_pairs` pairs, adapters held in `adapters` and activations of
    `compute`.
    """
    table = _override or (BUILT_IN if device.type != "cuda" else _table_of(device))
    return table[family(rows, num_pairs), element(adapters, compute)]


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Take variants from `table` inside a ``with`` block, on every device: for measuring and testing them."""
    global _override
    before, _override = _override, table
    try:
        yield
    finally:
        _override = before


def planes(config: LoraTiles, programs: int, in_features: int) -> int:
    """Partial sums to split `in_features` into, one of `PLANES`: few programs are split further, as far as
    each part stays worth one.
    """
    enough = next((planes for planes in PLANES if programs * planes >= config.shrink_programs), PLANES[-1])
    worth = max(_MIN_K_PER_PLANE, config.k_step)
    while enough > 1 and in_features < enough * worth:
        enough //= 2
    return enough


def card_file(card: str) -> Path:
    """The file of the table for the card of that name, as the driver gives it."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")


def load(path: Path) -> Table:
    """A table from a file that `dump` wrote; what it leaves out is as in the built-in one.

    Raises `ValueError` for a file that is not such a table; the text names the problem.
    """
    try:
        rows = json.loads(path.read_text())["tiles"]
        names = {field.name for field in fields(LoraTiles)}
        table = dict(BUILT_IN)
        for row in rows:
            key = (row.pop("family"), row.pop("element"))
            if key not in BUILT_IN or set(row) != names:
                raise ValueError(f"{path.name}: no variant {key}, or fields other than {sorted(names)}")
            config = LoraTiles(**row)
            if config.rows != BUILT_IN[key].rows:
                raise ValueError(f"{path.name}: rows of {key} are {BUILT_IN[key].rows}, not {config.rows}")
            table[key] = config
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no table of tiles: {error!r}") from error
    return table


def dump(path: Path, table: Table, about: dict[str, Any]) -> None:
    """Write `table` for `load`, with `about` (the card's name, versions, figures) beside it."""
    rows = [
        {"family": of_family, "element": of_element, **asdict(config)}
        for (of_family, of_element), config in table.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "tiles": rows}, indent=1) + "\n")


def _table_of(device: torch.device) -> Table:
    index = torch.cuda.current_device() if device.index is None else device.index
    return _table_of_card(torch.cuda.get_device_name(index))


@functools.cache
def _table_of_card(card: str) -> Table:
    path = card_file(card)
    return load(path) if path.exists() else BUILT_IN
