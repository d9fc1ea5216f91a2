"""The cost in exactness of holding adapters, or the KV cache, in 8 bits, on the demo model.

    python -m loraplex_bench.scenarios.exactness adapters --lines 200
    python -m loraplex_bench.scenarios.exactness kv-cache

The same engine without and with `--adapter-device-dtype int8` or `--kv-cache-dtype fp8`: the logits of every
position of the right answers (teacher-forced) side by side, and how many greedy answers are exactly right.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer

from loraplex_bench.demo.tasks import (
    CHECK_SEED,
    MAX_ANSWER_TOKENS,
    TASKS,
    data_dir,
    expected,
    make_lines,
    prompt,
)
from loraplex_server.adapters.residency.record import Readiness
from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig
from loraplex_server.config.model_settings import Dtype, Quantization
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Sequence as EngineSequence
from loraplex_server.model.run.runner import ModelRunner
from loraplex_server.wire.messages import FromEngine, Tokens

_BLOCK = 16
_BATCH = 32
# Two servers stand side by side.
_CACHE_BYTES = 128 << 20

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "adapters": {"adapters": {"device_dtype": "int8"}},
    "kv-cache": {"scheduler": {"kv_cache_dtype": "fp8"}},
}
"""Settings by the part that is held in 8 bits."""


@dataclass(frozen=True)
class Exactness:
    """One adapter, or all together.

    `logit_error` is the root mean square of the difference between the logits of both servers, over the
    deviation of the logits; `tokens_differ` the share of positions, those of the random prompt included,
    whose most likely token differs; `right_*` the share of greedy answers that are exactly right.
    """

    adapter: str
    logit_error: float
    tokens_differ: float
    right_plain: float
    right_narrow: float


class _Server:
    """An engine on the demo model, stepped by the caller."""

    def __init__(self, settings: dict[str, dict[str, Any]], quantization: Quantization, dtype: Dtype) -> None:
        self._tokens: dict[str, list[int]] = {}
        data = data_dir()
        config = EngineConfig(
            model=ModelConfig(str(data / "base"), quantization=quantization, dtype=dtype, threads=1),
            scheduler=SchedulerConfig(
                max_batch_tokens=2048,
                kv_cache_bytes=_CACHE_BYTES,
                kv_block_size=_BLOCK,
                **settings.get("scheduler", {}),
            ),
            adapters=AdapterConfig(folders=(data / "adapters",), **settings.get("adapters", {})),
        )
        self.engine: Engine = build_engine(config, self._emit, wake=None, progress=False)

    def logits(self, adapter: str, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Of every position of every row, one after the other: float32 ``[positions, vocabulary]``."""
        store = self.engine.adapters
        requests = store.requests
        parts = []
        for first in range(0, len(rows), _BATCH):
            handles = requests.resolve([adapter])
            readiness = requests.reserve(handles)
            while readiness is Readiness.LOADING:
                store.wait_event(1.0)
                store.poll()
                readiness = requests.is_ready(handles)
            sequences = []
            block = 0
            for index, tokens in enumerate(rows[first : first + _BATCH]):
                request = Request(str(index), tokens, adapters=(AdapterUse(adapter),))
                sequence = EngineSequence(request, "exactness", handles)
                blocks = -(-len(tokens) // _BLOCK)
                sequence.block_table = list(range(block, block + blocks))
                block += blocks
                sequences.append(sequence)
            plan = build_plan([Scheduled(s, s.num_pending) for s in sequences], _BLOCK, requests.slot, ())
            plan = dataclasses.replace(plan, sample_row=np.arange(plan.num_tokens))
            parts.append(cast(ModelRunner, self.engine._runner).logits(plan).float().cpu())
            requests.release(handles)
        return torch.cat(parts)

    def answers(self, adapter: str, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Greedy answers, until the end token or the longest answer."""
        self._tokens = {str(index): [] for index in range(len(prompts))}
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS)
        for index, tokens in enumerate(prompts):
            request = Request(str(index), tokens, sampling, (AdapterUse(adapter),))
            self.engine.submit("exactness", request)
        while self.engine.has_work:
            if not self.engine.step():
                self.engine.adapters.wait_event(1.0)
        return list(self._tokens.values())

    def close(self) -> None:
        self.engine.adapters.close()

    def _emit(self, client: str, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            for delta in message.deltas:
                self._tokens[delta.request_id].extend(delta.token_ids)


def measure(
    option: str,
    num_lines: int,
    *,
    quantization: Quantization = "nf4",
    dtype: Dtype = "float32",
    names: Sequence[str] = tuple(TASKS),
) -> list[Exactness]:
    """One figure for each adapter in `names`, and last the one over all of them; `option` of `OPTIONS`."""
    lines = make_lines(CHECK_SEED, num_lines)
    tokenizer = AutoTokenizer.from_pretrained(data_dir() / "base")
    end = tokenizer.eos_token_id
    prompts = [tuple(tokenizer(prompt(line))["input_ids"]) for line in lines]
    servers = [_Server(settings, quantization, dtype) for settings in ({}, OPTIONS[option])]
    found = []
    squares, variances, differing, positions = 0.0, 0.0, 0, 0
    try:
        for name in names:
            answers = [expected(name, line) for line in lines]
            forced = [
                (*asked, *tokenizer(answer, add_special_tokens=False)["input_ids"])
                for asked, answer in zip(prompts, answers, strict=True)
            ]
            truth, ours = (server.logits(name, forced).double() for server in servers)
            right = [
                [tokenizer.decode([token for token in tokens if token != end]) for tokens in given]
                for given in (server.answers(name, prompts) for server in servers)
            ]
            plain, narrow = (
                sum(a == b for a, b in zip(texts, answers, strict=True)) / len(lines) for texts in right
            )
            square = float((ours - truth).square().mean())
            variance = float(truth.var())
            differ = int((ours.argmax(-1) != truth.argmax(-1)).sum())
            found.append(Exactness(name, (square / variance) ** 0.5, differ / len(truth), plain, narrow))
            squares, variances = squares + square * len(truth), variances + variance * len(truth)
            differing, positions = differing + differ, positions + len(truth)
    finally:
        for server in servers:
            server.close()
    plain = sum(each.right_plain for each in found) / len(found)
    narrow = sum(each.right_narrow for each in found) / len(found)
    return [*found, Exactness("all", (squares / variances) ** 0.5, differing / positions, plain, narrow)]


def main() -> None:
    """Print a line for each adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("option", choices=OPTIONS, help="what to hold in 8 bits")
    parser.add_argument("--lines", type=int, default=100, help="lines that each adapter is asked about")
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "int4", "none"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    print("adapter         logit error  tokens differ  right, plain  right, 8 bits")
    for each in measure(
        arguments.option, arguments.lines, quantization=arguments.quantization, dtype=arguments.dtype
    ):
        print(
            f"{each.adapter:15} {each.logit_error:11.2%} {each.tokens_differ:14.3%} {each.right_plain:13.2%} "
            f"{each.right_narrow:14.2%}"
        )


if __name__ == "__main__":
    main()
