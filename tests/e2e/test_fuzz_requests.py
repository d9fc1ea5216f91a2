"""Random messages to every method of a real server: each gets an answer or a typed error, none harms others.

Messages are drawn from the descriptors, so a new field is covered on the day it is added; some are sent as
bytes that are no message, some calls are cancelled, some have a deadline of milliseconds. `make test` sends
2,000, `make fuzz` 100,000. Everything follows from the seed.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from loraplex import Client
from loraplex.cli.exposition import scrape
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2
from loraplex_bench.demo.tasks import TASKS, data_dir, expected, make_lines, prompt
from loraplex_bench.load.launcher import LaunchedServer, demo_flags

INPUTS = int(os.environ.get("LORAPLEX_FUZZ_INPUTS", "2000"))
CALLERS = 24
KEPT = "upper"
"""An adapter that no message may unload, so that there is something to serve at the end."""

SERVICES = [
    service
    for module in (generation_pb2, adapters_pb2, model_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
GENERATION = list(generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].methods)
METHODS = [method for service in SERVICES for method in service.methods]
BAD = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DATA_LOSS,
}

CLIENT_SIDE = "Internal error from Core"
"""The error of gRPC's own client for an answer that arrives while it is still sending."""

F = FieldDescriptor
INTEGERS = {
    F.TYPE_INT32: (-(2**31), 2**31 - 1),
    F.TYPE_UINT32: (0, 2**32 - 1),
    F.TYPE_INT64: (-(2**63), 2**63 - 1),
    F.TYPE_UINT64: (0, 2**64 - 1),
    F.TYPE_ENUM: (0, 6),
}
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, 2.0, float("nan"), float("inf"), float("-inf"))


class Draw:
    """Messages from one stream of random numbers. Every other one has plausible values: it may be served."""

    def __init__(self, seed: int, names: list[str], folders: list[str]) -> None:
        self.rng = random.Random(seed)
        self._sane = ["hello", "a line", *names]
        self._texts = [
            *self._sane,
            *folders,
            "",
            "x" * 5000,
            "\0",
            "../../etc/passwd",
            "ü€🙂\u202e",
            " ",
            "a b",
            "{}",
        ]
        self._texts += ["s3://bucket/key", "https://127.0.0.1/x", "hf://a/b@main", f"{folders[0]}/../..", "-"]
        self._wild = True
        self._left_out = 0.45

    def message(self, descriptor: Descriptor, depth: int = 0) -> Any:
        found = GetMessageClass(descriptor)()
        taken: set[str] = set()
        # What nothing can be served without.
        prompts = [field.name for field in descriptor.fields if _names_prompt(field)]
        wanted = {"request", "requests", self.rng.choice(prompts)} if prompts else {"request", "requests"}
        if self._wild:
            wanted = set()
        fields = list(descriptor.fields)
        self.rng.shuffle(fields)
        for field in fields:
            one_of = field.containing_oneof
            left_out = field.name not in wanted and self.rng.random() < self._left_out
            if left_out or (one_of is not None and one_of.name in taken):
                continue
            if one_of is not None:
                taken.add(one_of.name)
            if field.is_repeated:
                count = self.rng.choice([0, 1, 1, 2, 3, 40] if self._wild else [1])
                values = (self._value(field, depth) for _ in range(count))
                if field.message_type is not None and field.message_type.GetOptions().map_entry:
                    getattr(found, field.name).update({entry.key: entry.value for entry in values})
                else:
                    getattr(found, field.name).extend(values)
            elif field.message_type is not None:
                if depth < 4:
                    getattr(found, field.name).CopyFrom(self._value(field, depth))
            else:
                setattr(found, field.name, self._value(field, depth))
        return found

    def _value(self, field: FieldDescriptor, depth: int) -> Any:
        rng = self.rng
        if field.message_type is not None:
            return self.message(field.message_type, depth + 1)
        if field.type in INTEGERS:
            low, high = INTEGERS[field.type]
            near = [0, 1, 2, 5, 20]
            near += [100, 1000, low, high, rng.randint(low, high)] if self._wild else []
            return rng.choice([number for number in near if low <= number <= high])
        if field.type in (F.TYPE_FLOAT, F.TYPE_DOUBLE):
            return rng.choice(FLOATS) if self._wild else rng.uniform(0.01, 1)
        if field.type == F.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == F.TYPE_BYTES:
            return rng.randbytes(rng.choice([0, 1, 100, 5000]))
        return rng.choice(self._texts if self._wild else self._sane)

    def body(self, method: MethodDescriptor) -> bytes:
        """A message's bytes; every tenth one spoiled."""
        self._wild = self.rng.random() < 0.5
        # Many fields disagree with each other; with few there is an answer.
        self._left_out = 0.45 if self._wild else self.rng.choice([0.7, 0.85, 0.95])
        body: bytes = self.message(method.input_type).SerializeToString()
        if self.rng.random() < 0.1:
            at = self.rng.randrange(len(body) + 1)
            body = body[:at] + self.rng.randbytes(self.rng.choice([1, 3, 20])) + body[at + 1 :]
        return body


def _names_prompt(field: FieldDescriptor) -> bool:
    return field.containing_oneof is not None and field.containing_oneof.name == "prompt"


def harmless(method: MethodDescriptor, body: bytes) -> bool:
    """True if a message does not touch the kept adapter."""
    changing = ("UnloadAdapter", "LoadAdapter", "RegisterComposition", "UploadAdapter")
    return method.name not in changing or KEPT.encode() not in body


async def call(channel: grpc.aio.Channel, method: MethodDescriptor, draw: Draw) -> grpc.StatusCode:
    path = f"/{method.containing_service.full_name}/{method.name}"
    bodies = [draw.body(method) for _ in range(draw.rng.choice([0, 1, 3]) if method.client_streaming else 1)]
    bodies = [body for body in bodies if harmless(method, body)]
    if not bodies and not method.client_streaming:
        return grpc.StatusCode.OK
    # Everything ends: what asks for more than its share of time is cut.
    timeout_s = draw.rng.choice([0.002, 0.05, 2.0, 2.0, 2.0, 2.0])
    leaves = draw.rng.random() < 0.1

    async def stream() -> AsyncIterator[bytes]:
        for body in bodies:
            yield body

    request: Any = stream() if method.client_streaming else bodies[0]
    kind = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    running = getattr(channel, kind)(path)(request, timeout=timeout_s)
    try:
        if leaves:
            await asyncio.sleep(draw.rng.random() * 0.02)
            running.cancel()
        if method.server_streaming:
            async for _ in running:
                pass
        else:
            await running
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    except grpc.aio.AioRpcError as error:
        if error.code() in BAD and error.details() != CLIENT_SIDE:
            shown = [body.hex() for body in bodies]
            raise AssertionError(f"{method.name}: {error.code()}: {error.details()}: {shown}") from None
        return error.code()
    return grpc.StatusCode.OK


async def storm(address: str, seed: int, count: int) -> dict[str, collections.Counter[grpc.StatusCode]]:
    """Sends `count` messages from some callers at once; statuses by method."""
    names = list(TASKS)
    folders = [str(data_dir() / "adapters"), str(data_dir() / "adapters" / names[0])]
    seen: dict[str, collections.Counter[grpc.StatusCode]] = collections.defaultdict(collections.Counter)
    async with grpc.aio.insecure_channel(address) as channel:

        async def caller(number: int) -> None:
            draw = Draw(seed * 1000 + number, names, folders)
            for _ in range(number, count, CALLERS):
                # Generation is what most of the fields are for.
                method = draw.rng.choice(METHODS if draw.rng.random() < 0.7 else GENERATION)
                seen[method.name][await call(channel, method, draw)] += 1

        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return seen


@pytest.fixture
def seed() -> int:
    """LORAPLEX_FUZZ_SEED, or else another one each time; no parameter, since all workers name tests alike."""
    found = int(os.environ.get("LORAPLEX_FUZZ_SEED", time.time_ns() % 1_000_000))
    print(f"\nseed {found}")
    return found


def test_no_message_breaks_the_server(seed: int, tmp_path: Path) -> None:
    flags = [*demo_flags(), "--threads", "1", "--max-adapters-on-device", "4", "--max-num-requests", "16"]
    flags += ["--allow-uploads", "--adapter-cache-dir", str(tmp_path)]
    with LaunchedServer(flags) as server, Client(server.grpc) as client:
        assert server.metrics is not None
        seen = asyncio.run(storm(server.grpc, seed, INPUTS))
        for name, codes in sorted(seen.items()):
            print(f"{name:<16} " + ", ".join(f"{count} {code.name}" for code, count in codes.most_common()))
        # Valid messages are among them, and they were served.
        assert seen["Generate"][grpc.StatusCode.OK] + seen["GenerateUnary"][grpc.StatusCode.OK] > 0
        assert seen["GenerateUnary"][grpc.StatusCode.INVALID_ARGUMENT] > 0
        assert set(seen) == {method.name for method in METHODS}

        line = make_lines(1, 1)[0]
        answer = client.generate(prompt(line), adapter=KEPT, max_tokens=40)
        assert answer.text == expected(KEPT, line)
        end_s = time.monotonic() + 30
        while True:
            found = scrape(server.metrics)
            if not found.value("loraplex_requests_running") and found.value("loraplex_audits") > 0:
                break
            assert time.monotonic() < end_s
            time.sleep(0.2)
        assert found.value("loraplex_integrity_problems") == 0
        assert found.value("loraplex_weight_checksum_ok") == 1
        assert found.value("loraplex_kv_cache_blocks_used") == 0
        # gRPC logs traces of its own, without a frame of ours, where a caller left before its answer did.
        for trace in server.log_tail(1 << 20).split("Traceback (most recent call last):")[1:]:
            own, _, _ = trace.partition(" loraplex_server.")  # the next line of the log
            assert "loraplex_server" not in own, trace[:4000]
