"""The bench of what the API costs: its arithmetic, and all of it with a few streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.v1 import generation_pb2
from loraplex_bench.cli import main
from loraplex_bench.load.results import Distribution
from loraplex_bench.scenarios.api_cost.client import TEXTS_FILE, Order, Sample, _judge
from loraplex_bench.scenarios.api_cost.command import render
from loraplex_bench.scenarios.api_cost.engine import STAMPS_FILE, STRIDE, TOKENS_FILE


def sample(messages: int, tokens: int, held_s: float, joined: int = 0) -> Sample:
    held = Distribution(tokens, held_s, held_s, held_s, held_s, held_s)
    return Sample(2.0, tokens, messages, joined, 3, (0.8, 0.9, 0.1), held, 0)


def test_goals_are_held_against_the_median() -> None:
    samples = {
        "bare grpc.aio": [Sample(2.0, 24_000, 24_000, 0, 1, (0.6, 0.6), None, 0)],
        "one a message": [sample(n, n, 1.0) for n in (10_000, 40_000, 19_000)],
        "slow": [sample(5_000, 5_000, 0.01)],
        "pressed": [sample(20_000, 59_000, 0.051, joined=100)],
    }
    text = render(samples, 256)
    assert "one token a message: 9500 messages/s, 79% of bare grpc.aio (goal: 9000): met" in text
    assert "server CPU: 47.4 us a message (goal: 60): met" in text
    assert "not behind: 0 messages joined (goal: 0): met" in text
    assert "behind: 29500 tokens/s (goal: 30000): missed" in text
    assert "longest a token is held: 51.0 ms (goal: 50.0): missed" in text


@pytest.mark.parametrize("spoiled", ["", "token", "text"])
def test_answers_are_judged_and_tokens_timed(tmp_path: Path, spoiled: str) -> None:
    text = [5, 6, 7] * STRIDE
    (tmp_path / TOKENS_FILE).write_text(json.dumps(text))
    (tmp_path / TEXTS_FILE).write_text(json.dumps(["a", "bc", " d"] * STRIDE))
    (tmp_path / STAMPS_FILE).write_text(json.dumps([10.0, 11.0, 12.0]))
    order = Order("", streams=2, tokens=5, rate=0, pids=(), folder=str(tmp_path))

    def message(text: str, *token_ids: int) -> generation_pb2.GenerateResponse:
        return generation_pb2.GenerateResponse(text=text, token_ids=token_ids)

    first = [
        (9.0, message("a", 5)),
        (11.5, message("bc d", 6, 9 if spoiled == "token" else 7)),
        (12.25, message("" if spoiled == "text" else "a", 5)),
        (13.0, message("bc", 6)),
    ]
    # 97 tokens further on, which is one more than a multiple of three.
    second = [(9.0, message("bc", 6)), (14.0, message(" dabc", 7, 5, 6)), (15.0, message(" d", 7))]
    found = _judge(order, [first, second], 2.0, (0.1,))
    assert (found.tokens, found.messages, found.joined, found.most) == (6, 3, 2, 3)
    assert found.held_s is not None
    assert (found.held_s.max, found.held_s.mean) == (4.0, pytest.approx((1.5 + 0.5 + 0.25 + 4 + 3 + 2) / 6))
    assert found.wrong == bool(spoiled)


@pytest.mark.slow
def test_a_few_streams_through_the_real_server_and_a_bare_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ["--streams", "3", "--seconds", "1", "--repeat", "1", "--output", str(tmp_path)]
    assert main(["api-cost", *what, "--case", "one a message", "--case", "bare grpc.aio"]) == 0
    assert "streams with a wrong answer: 0" in capsys.readouterr().out
    document = json.loads(next(tmp_path.glob("api-cost-*.json")).read_text())
    for name, tokens in (("one a message", 9_000), ("bare grpc.aio", 12_000)):
        [found] = document["samples"][name]
        assert (found["tokens"], found["messages"], found["joined"]) == (tokens, tokens, 0)
    assert all(seconds > 0 for seconds in document["samples"]["one a message"][0]["cpu_s"][:2])
