"""The other end of `loraplex bench api-cost`: one process with all the streams on one channel.

    python -m loraplex_bench.scenarios.api_cost.client ORDER

`ORDER` is an `Order` as JSON, a `Sample` is printed as JSON. grpc.aio, since 256 streams would be 256 threads
otherwise; messages are parsed as any client does and judged only afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from loraplex.v1 import generation_pb2
from loraplex_bench.load.results import Distribution
from loraplex_bench.scenarios.api_cost.engine import STAMPS_FILE, STRIDE, TOKENS_FILE
from loraplex_bench.scenarios.api_cost.servers import METHOD

TEXTS_FILE = "texts.json"
"""In the bench's folder, beside the text's token ids: the text of each."""


@dataclasses.dataclass(frozen=True)
class Order:
    """Settings of a measurement.

    Attributes:
        tokens: of each stream; its first and its last are not measured.
        rate: tokens per second, of all streams together; 0 is as fast as can be.
        pids: of the server, and of its engine if it has one.
        folder: of the bench; "" where the answers are no text.
    """

    address: str
    streams: int
    tokens: int
    rate: float
    pids: tuple[int, ...]
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The figures, from the first step to the last token but one of the slowest stream.

    Attributes:
        joined: messages with more than one token.
        most: tokens of the longest of them.
        cpu_s: of the client, and of each process of `Order.pids`.
        held_s: from the engine's step to the client, of every token; None where nothing is known of steps.
        wrong: streams whose tokens or text were not the right ones.
    """

    seconds: float
    tokens: int
    messages: int
    joined: int
    most: int
    cpu_s: tuple[float, ...]
    held_s: Distribution | None
    wrong: int

    @property
    def messages_per_s(self) -> float:
        return self.messages / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class _Stream:
    """One call: its messages as they come."""

    def __init__(self, length: int, note: Callable[[int], None]) -> None:
        self._length = length
        self._note = note
        self.arrivals: list[tuple[float, generation_pb2.GenerateResponse]] = []

    async def read(self, call: Any) -> None:
        count = 0
        while (message := await call.read()) is not grpc.aio.EOF:
            self.arrivals.append((time.perf_counter(), message))
            count += len(message.token_ids)
            if count == 1 or count == self._length - 1:
                self._note(count)


class _Tally:
    """Tells when every stream has got so many tokens."""

    def __init__(self, streams: int, length: int) -> None:
        self._left = {1: streams, length - 1: streams}
        self._reached = {count: asyncio.Event() for count in self._left}

    def note(self, count: int) -> None:
        self._left[count] -= 1
        if not self._left[count]:
            self._reached[count].set()

    async def reached(self, count: int) -> None:
        await self._reached[count].wait()


async def measure(order: Order) -> Sample:
    """Runs all streams to their end."""
    tally = _Tally(order.streams, order.tokens)
    streams = [_Stream(order.tokens, tally.note) for _ in range(order.streams)]
    async with grpc.aio.insecure_channel(order.address) as channel:
        method = channel.unary_stream(
            METHOD,
            request_serializer=generation_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generation_pb2.GenerateResponse.FromString,
        )

        async def go(period_us: int) -> None:
            call: Any = method(_request(0, 1, priority=period_us))
            while await call.read() is not grpc.aio.EOF:
                pass

        reading = asyncio.gather(
            *(stream.read(method(_request(i, order.tokens))) for i, stream in enumerate(streams))
        )
        await _or_failure(reading, tally.reached(1))
        cpu_s, begun_s = _cpu_s(order.pids), time.perf_counter()
        await go(round(order.streams / order.rate * 1e6) if order.rate else 0)
        await _or_failure(reading, tally.reached(order.tokens - 1))
        ended_s, end_cpu_s = time.perf_counter(), _cpu_s(order.pids)
        await go(0)
        await reading
    used_s = tuple(end - begin for begin, end in zip(cpu_s, end_cpu_s, strict=True))
    return _judge(order, [stream.arrivals for stream in streams], ended_s - begun_s, used_s)


async def _or_failure(reading: asyncio.Future[Any], event: Any) -> None:
    """Waits for `event`; a call that fails meanwhile is raised."""
    waiting = asyncio.ensure_future(event)
    await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        await reading
        raise RuntimeError("the streams ended before they had all their tokens")


def _request(index: int, tokens: int, priority: int = 0) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[0]),
        sampling=generation_pb2.SamplingParams(seed=index),
        stopping=generation_pb2.StoppingCriteria(max_tokens=tokens, ignore_eos=True),
        priority=priority,
    )


def _cpu_s(pids: Sequence[int]) -> tuple[float, ...]:
    """Processor time that this process and those of `pids` have used; Linux only."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = [time.process_time()]
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used.append((int(fields[11]) + int(fields[12])) / ticks)
    return tuple(used)


def _judge(
    order: Order,
    streams: Sequence[Sequence[tuple[float, generation_pb2.GenerateResponse]]],
    seconds: float,
    cpu_s: tuple[float, ...],
) -> Sample:
    stamps: list[float] = []
    tokens: list[int] = []
    texts: list[str] = []
    if order.folder:
        folder = Path(order.folder)
        stamps = json.loads((folder / STAMPS_FILE).read_text())
        tokens = json.loads((folder / TOKENS_FILE).read_text())
        texts = json.loads((folder / TEXTS_FILE).read_text())
    counts: list[int] = []
    held: list[float] = []
    wrong = 0
    for index, arrivals in enumerate(streams):
        position = 0
        for at_s, message in arrivals:
            count = len(message.token_ids)
            if 0 < position < order.tokens - 1:
                counts.append(count)
                if stamps:
                    held += [at_s - stamp for stamp in stamps[position - 1 : position - 1 + count]]
            position += count
        if tokens:
            places = [(index * STRIDE + step) % len(tokens) for step in range(order.tokens)]
            got = [token for _, message in arrivals for token in message.token_ids]
            text = "".join(message.text for _, message in arrivals)
            right = got == [tokens[place] for place in places] and text == "".join(texts[p] for p in places)
            wrong += not right
        else:
            wrong += position != order.tokens
    return Sample(
        seconds=seconds,
        tokens=sum(counts),
        messages=len(counts),
        joined=sum(count > 1 for count in counts),
        most=max(counts, default=0),
        cpu_s=cpu_s,
        held_s=Distribution.of(held),
        wrong=wrong,
    )


def main(arguments: Sequence[str]) -> int:
    order = Order(**json.loads(arguments[0]))
    # All that comes is kept until the end: collections would find nothing, and take ever longer.
    gc.disable()
    print(json.dumps(dataclasses.asdict(asyncio.run(measure(order)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
