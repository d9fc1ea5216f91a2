"""Speculation on a real engine: level (i), the same answers with it and without it, in fewer steps."""

from __future__ import annotations

import dataclasses
import random
import zlib
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from loraplex_server.core.request import Request, Structure
from loraplex_server.core.step import SampledToken, StepOutput, StepPlan
from loraplex_server.engine.sequence import Sequence
from loraplex_server.model.run import sampler

BLOCK = 4
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
PROMPT = tuple(random.Random(1).choices(range(3, 211), k=30))
GREEDY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
# With so few letters, each the more likely the more often it was there, the tiny model has to repeat itself.
FEW = tuple((token, 40.0) for token in (50, 60, 70))
REPEATS = {**GREEDY, "logit_bias": FEW, "frequency_penalty": -2.0}


@dataclasses.dataclass
class Ahead:
    """A runner that counts as asynchronous: a step is launched before the last one's tokens are known."""

    runner: Any
    asynchronous: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


@pytest.fixture
def make(harness: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """An engine on the tiny Llama; with `ahead` it is one step ahead."""

    def make(*, ahead: bool = False, quantization: str = "none", **scheduler: Any) -> Any:
        served = harness(tiny("Llama"), quantization, scheduler={"kv_block_size": BLOCK, **scheduler})
        if ahead:
            monkeypatch.setattr(served.engine, "_runner", Ahead(served.engine._runner))
        return served

    return make


def requests(rng: random.Random) -> list[dict[str, Any]]:
    """Whatever may be asked for, of short prompts that share beginnings."""
    roots = [[rng.randrange(3, 200) for _ in range(9)] for _ in range(2)]
    found = []
    for _ in range(14):
        tail = [rng.randrange(3, 200) for _ in range(rng.randrange(1, 4))]
        repeated = tail * rng.randrange(1, 4)
        found.append(
            {
                "prompt": [*rng.choice(roots)[: rng.randrange(10)], *repeated],
                "adapters": rng.choice([[], [("r6", 1.0)], [("r7", 0.5), ("r14", 1.0)]]),
                "max_tokens": rng.randrange(1, 28),
                "temperature": rng.choice([0.0, 0.7]),
                "seed": rng.randrange(100),
                "ignore_eos": rng.random() < 0.5,
                "stop_token_ids": tuple(rng.sample(range(3, 200), rng.choice([0, 8]))),
                "min_tokens": rng.choice([0, 0, 1]),
                "logprobs": rng.choice([None, None, 2]),
                "prompt_logprobs": (None, None, 1)[len(found) % 3],
                "frequency_penalty": rng.choice([0.0, 0.0, 0.3]),
                "repetition_penalty": rng.choice([1.0, 1.0, 0.9]),
                "logit_bias": rng.choice([(), FEW]),
                "bad_words": rng.choice([(), ((rng.randrange(3, 200),), (tail[0], tail[-1]))]),
                "speculative_tokens": rng.choice([0, 3, 16]),
                "priority": rng.choice([0, 0, 1]),
            }
        )
    return found


def ask(served: Any, wanted: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    # Whether an adapter is there yet is not what the steps shall depend on.
    for name in ("r6", "r7", "r14"):
        served.submit(name, (201,), [(name, 1.0)], max_tokens=1, speculative_tokens=0)
    served.run()
    for index, request in enumerate(wanted):
        request = {**request, **more}
        served.submit(str(index), request.pop("prompt"), request.pop("adapters"), **request)
        if index % 2:
            served.engine.step()
    served.run()
    served.assert_clean()
    return {
        name: (
            answer.tokens,
            answer.finish,
            [
                (entry.token_id, [top.token_id for top in entry.top])
                for entry in (*answer.prompt_logprobs, *answer.logprobs)
            ],
        )
        for name, answer in served.answers.items()
    }


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "a step ahead"])
def test_answers_are_those_without(ahead: bool, make: Any, draft_from: Any) -> None:
    """Random traffic in too little memory, drafts from the rows themselves and drafts often right."""
    seen = {"preemptions": 0, "drafted": 0, "accepted": 0, "hits": 0}
    for seed in range(2):
        rng = random.Random(seed)
        scheduler = {
            "max_num_requests": 10,
            "max_batch_tokens": rng.choice([9, 24]),
            "kv_cache_bytes": 13 * BLOCK * TOKEN_BYTES if seed % 2 else 0,
            "max_model_len": 44,
            "speculation_max_load": 1.0,
            # Whose turn it is shall not depend on the clock.
            "fair_aging_s": 1e6,
        }
        wanted = requests(rng)
        truth = ask(make(**scheduler), wanted, speculative_tokens=0)
        served = make(ahead=ahead, **scheduler)
        if seed:
            draft_from(served, lambda name, truth=truth: truth[name][0])
        assert ask(served, wanted) == truth
        assert {"stop", "length"} <= {finish for _, finish, _ in truth.values()}
        stats = served.engine.stats()
        seen["hits"] += stats.prefix_hits
        for step in stats.steps:
            seen["preemptions"] += step.preemptions
            seen["drafted"] += step.drafted_tokens
            seen["accepted"] += step.accepted_tokens
    assert seen["drafted"] > seen["accepted"] > 15, seen
    assert seen["preemptions"] > 0, seen
    assert seen["hits"] > 0, seen
    print(f"\nlevel (i), {'a step ahead' if ahead else 'step by step'}: answers as without, {seen}")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("owner", [[], [("r14", 1.0)], [("r6", 1.0), ("r16", -0.5)]], ids=len)
def test_a_row_that_repeats_itself_takes_fewer_steps(owner: Any, quantization: str, make: Any) -> None:
    plain, served = make(quantization=quantization), make(quantization=quantization)
    options = {**REPEATS, "logprobs": 2}
    truth = plain.submit("r", PROMPT, owner, **options)
    found = served.submit("r", PROMPT, owner, **options, speculative_tokens=8)
    for one in (plain, served):
        one.run()
    assert found.tokens == truth.tokens
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(
        [entry.logprob for entry in truth.logprobs], abs=1e-3
    )
    steps = served.engine.stats().steps
    assert len(plain.engine.stats().steps) == 60
    assert len(steps) == 60 - found.times.accepted_tokens < 40
    assert found.times.drafted_tokens == sum(step.drafted_tokens for step in steps)
    assert sum(step.decode_tokens for step in steps) == len(steps) - 1 + found.times.drafted_tokens
    assert truth.times.drafted_tokens == truth.times.accepted_tokens == 0


def test_a_step_ahead_it_takes_fewer_steps_too(make: Any) -> None:
    served = make(ahead=True)
    found = served.submit("r", PROMPT, **REPEATS, speculative_tokens=8)
    served.run()
    assert len(served.engine.stats().steps) == 60 - found.times.accepted_tokens < 40
    # Where nothing is drafted the engine is a step ahead as before.
    served.submit("r", PROMPT, max_tokens=40, ignore_eos=True, temperature=5.0, seed=1, speculative_tokens=8)
    fed, launch = 0, served.engine._runner.runner.launch

    def count(plan: StepPlan) -> Any:
        nonlocal fed
        fed += len(plan.fed_row)
        return launch(plan)

    served.engine._runner.runner.launch = count
    served.run()
    assert fed > 20


def test_the_server_may_say_what_a_request_leaves_open(make: Any) -> None:
    served = make(speculative_tokens=4)
    said = served.submit("said", PROMPT, **REPEATS, speculative_tokens=0)
    unsaid = served.submit("unsaid", PROMPT, **REPEATS)
    served.run()
    assert said.times.drafted_tokens == 0
    assert unsaid.times.accepted_tokens > 0
    assert said.tokens == unsaid.tokens


def test_answers_with_a_structure_are_not_drafted(make: Any) -> None:
    drafter = partial(make().engine._admission.drafter, ahead=False)
    request = Request("r", PROMPT, speculative_tokens=4)
    held = msgspec.structs.replace(request, structure=Structure("regex", "a+"))
    assert drafter(Sequence(request, "test", ())) is not None
    assert drafter(Sequence(held, "test", ())) is None


def drafted(served: Any, count: int, **options: Any) -> list[int]:
    """Draft tokens of each step of `count` requests that repeat themselves."""
    for index in range(count):
        served.submit(str(index), (7 + index, *PROMPT), **{**REPEATS, **options}, speculative_tokens=8)
    served.run()
    return [step.drafted_tokens for step in served.engine.stats().steps]


def test_a_full_batch_gets_no_drafts(make: Any) -> None:
    """As many rows are sampled as there may be requests, and no draft is made where half of these run."""
    assert sum(drafted(make(max_num_requests=8), 4)) > 0
    assert sum(drafted(make(max_num_requests=8), 5, max_tokens=12)) == 0
    assert sum(drafted(make(max_num_requests=8, speculation_max_load=0.0), 1)) == 0
    everyone = drafted(make(max_num_requests=4, speculation_max_load=1.0), 4, max_tokens=12)
    assert sum(everyone) == 0
    assert max(drafted(make(max_num_requests=4, speculation_max_load=1.0), 1)) == 3
    assert max(drafted(make(max_num_requests=8, max_batch_tokens=3), 1)) == 2


def test_wrong_drafts_leave_no_block_behind(make: Any, draft_from: Any) -> None:
    """After each step a request holds the blocks of the tokens that it has."""
    served = make()
    draft_from(served, lambda name: [9] * 60)
    answer = served.submit("r", PROMPT, **GREEDY, speculative_tokens=8)
    most = 0
    while served.engine.has_work:
        served.engine.step()
        for sequence in served.engine.scheduler.running:
            tokens = len(sequence.token_ids)
            assert -(-(tokens - 1) // BLOCK) <= len(sequence.block_table) <= -(-tokens // BLOCK)
            assert sequence.num_pending == 1
        most = max(most, served.engine.stats().steps[-1].drafted_tokens)
    assert most == 4
    assert answer.times.accepted_tokens < answer.times.drafted_tokens
    plain = make()
    plain.submit("r", PROMPT, **GREEDY)
    plain.run()
    assert answer.tokens == plain.answers["r"].tokens


def test_an_end_among_the_right_drafts_is_the_end(make: Any, draft_from: Any) -> None:
    plain = make()
    whole = plain.submit("r", PROMPT, max_tokens=12, ignore_eos=True)
    plain.run()
    served = make()
    draft_from(served, lambda name: whole.tokens)
    for place in range(1, 12):
        stop = whole.tokens[place]
        options = {"max_tokens": 12, "ignore_eos": True, "stop_token_ids": (stop,), "min_tokens": place}
        again = plain.submit("again", PROMPT, **options)
        found = served.submit("r", PROMPT, **options, logprobs=0, speculative_tokens=8)
        for one in (plain, served):
            one.run()
        assert (found.tokens, found.finish) == (again.tokens, again.finish)
        assert [entry.token_id for entry in found.logprobs] == found.tokens


class Memory:
    """A model that is nothing but its memory: the next token depends on all those whose cells it reads."""

    def __init__(self, runner: Any, *, asynchronous: bool) -> None:
        self._runner = runner
        self.asynchronous = asynchronous
        self._cells: dict[int, int] = {}
        self._last: list[int] = []
        self.draft_rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @staticmethod
    def next_token(tokens: list[int]) -> int:
        """Mostly what two tokens say, and so a row often has been there before; but not always."""
        whole = zlib.crc32(array("i", tokens).tobytes())
        return 50 + (whole // 4 % 3 if whole % 4 == 0 else (2 * tokens[-1] + sum(tokens[-2:-1])) % 3)

    def launch(self, plan: StepPlan) -> Any:
        tokens = plan.token_ids.copy()
        for row, place in zip(plan.fed_row.tolist(), plan.fed_from.tolist(), strict=True):
            tokens[row] = self._last[place]
        self._cells.update(zip(plan.slot_mapping.tolist(), tokens.tolist(), strict=True))
        owner = np.searchsorted(plan.query_start, plan.sample_row, "right") - 1
        self.draft_rows += len(owner) - len(set(owner.tolist()))
        self._last = []
        for row, sequence in zip(plan.sample_row.tolist(), owner.tolist(), strict=True):
            table = plan.blocks[plan.block_start[sequence] :]
            places = range(plan.positions[row] + 1)
            seen = [self._cells[int(table[at // BLOCK]) * BLOCK + at % BLOCK] for at in places]
            self._last.append(self.next_token(seen))
        return Known(StepOutput(tuple(map(SampledToken, self._last))))


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "a step ahead"])
def test_nothing_is_read_but_what_is_known(ahead: bool, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random traffic that shares prompts and answers, is cancelled and preempted, over simulated memory."""
    seen = {"drafted": 0, "right": 0, "preempted": 0, "hits": 0}
    for seed in range(6):
        rng = random.Random(seed)
        served = make(
            max_num_requests=rng.choice([6, 12]),
            max_batch_tokens=rng.choice([8, 40]),
            kv_cache_bytes=rng.choice([14, 14, 100]) * BLOCK * TOKEN_BYTES,
            max_model_len=50,
            speculation_max_load=1.0,
            fair_aging_s=1e6,
        )
        memory = Memory(served.engine._runner, asynchronous=ahead)
        monkeypatch.setattr(served.engine, "_runner", memory)
        rows: list[list[int]] = []
        expected: dict[str, list[int]] = {}
        gone = set()
        for index in range(40):
            prompt = [50 + rng.randrange(3) for _ in range(rng.randrange(1, 12))]
            if rows and rng.random() < 0.6:
                # The next turn of an earlier request, or of its beginning.
                before = rng.choice(rows)
                prompt = [*before[: rng.randrange(1, min(len(before), 36) + 1)], *prompt[:2]]
            count = min(rng.randrange(1, 30), 49 - len(prompt))
            row = list(prompt)
            while len(row) < len(prompt) + count:
                row.append(Memory.next_token(row))
            rows.append(row)
            expected[str(index)] = row[len(prompt) :]
            options = {"max_tokens": count, "ignore_eos": True, "speculative_tokens": rng.choice([0, 2, 16])}
            served.submit(str(index), prompt, **options)
            for _ in range(rng.choice([0, 0, 1, 5])):
                served.engine.step()
            if rng.random() < 0.1:
                gone.add(str(index))
                served.engine.cancel("test", str(index))
        served.run()
        served.assert_clean()
        for name, answer in served.answers.items():
            end = len(answer.tokens) if name in gone else None
            assert answer.tokens == expected[name][:end]
        stats = served.engine.stats()
        assert memory.draft_rows == sum(step.drafted_tokens for step in stats.steps)
        seen["drafted"] += memory.draft_rows
        seen["right"] += sum(step.accepted_tokens for step in stats.steps)
        seen["preempted"] += sum(step.preemptions for step in stats.steps)
        seen["hits"] += stats.prefix_hits
    print(f"\n{seen}")
    assert seen["drafted"] > seen["right"] > 100, seen
    assert seen["preempted"] > 10, seen
    assert seen["hits"] > 100, seen


@dataclasses.dataclass
class Known:
    """A step that is computed."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class Chain:
    """A model of one token's memory: the next one's logits are a row of a table. The real sampler draws."""

    asynchronous = False

    def __init__(self, logits: torch.Tensor, runner: Any) -> None:
        self._logits = logits
        self.weight_checksum = runner.weight_checksum

    def launch(self, plan: StepPlan) -> Any:
        sampling = sampler.launch(self._logits[torch.from_numpy(plan.token_ids[plan.sample_row])], plan)

        return Known(StepOutput(sampling.result()))


def test_what_is_drawn_follows_the_distribution(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 tokens with drafts, half of them right, against the chain that they are drawn from."""
    letters = 5
    logits = torch.full((211, 211), -1e9)
    generator = torch.Generator().manual_seed(2)
    logits[:letters, :letters] = torch.randn(letters, letters, generator=generator) * 1.5
    served = make(max_num_requests=512, max_batch_tokens=1024, kv_cache_bytes=16 << 20)
    monkeypatch.setattr(served.engine, "_runner", Chain(logits, served.engine._runner))
    options = {"max_tokens": 100, "ignore_eos": True, "temperature": 0.8, "speculative_tokens": 4}
    for seed in range(200):
        served.submit(str(seed), (seed % letters,), **options, seed=seed)
    served.run()
    counts = np.zeros((letters, letters))
    for seed, answer in enumerate(served.answers.values()):
        np.add.at(counts, ([seed % letters, *answer.tokens[:-1]], answer.tokens), 1)
    assert counts.sum() == 20_000
    expected = (logits[:letters, :letters].double() / 0.8).softmax(-1).numpy() * counts.sum(1, keepdims=True)
    steps = served.engine.stats().steps
    accepted = sum(step.accepted_tokens for step in steps)
    assert 2_000 < accepted < sum(step.drafted_tokens for step in steps) - 2_000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    print(f"\nchi-square {chi_square:.1f} of 20 degrees of freedom; {accepted} of 20,000 tokens were drafted")
    # Exceeded once in 10,000 times.
    assert chi_square < 52.4
