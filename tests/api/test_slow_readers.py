"""Clients that do not read: what waits for them is bounded, and they are told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server.api.rpc.stalls import StallWatch
from loraplex_server.core.errors import ResourceExhaustedError
from loraplex_server.core.request import Request
from loraplex_server.wire.messages import TokenLogprobs, TopLogprob

# With twenty alternatives a token takes hundreds of bytes, so few of them fill what gRPC lets through unread.
ENTRY = TokenLogprobs(100, -1.0, tuple(TopLogprob(100 + index, -2.0) for index in range(20)))
BURST = 100


def reason(error: grpc.aio.AioRpcError) -> str:
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def talks_on(engine: Any, request: Request) -> None:
    """A script that generates until it is told not to."""
    while request.request_id not in engine.cancelled:
        engine.tokens(request, *[100] * BURST, logprobs=(ENTRY,) * BURST)
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_unread_tokens": 5 * BURST}, "tokens wait to be read"),
        ({"max_unread_tokens": 10**9, "stall_s": 0.3}, "was not read for 0.3 s"),
    ],
)
def test_a_client_that_does_not_read_is_cut_off_and_told(
    serving: Any, limits: dict[str, Any], told: str
) -> None:
    async def main() -> None:
        async with serving(talks_on, **limits) as server:
            message = generation_pb2.GenerateRequest(text="hello", logprobs=20)
            # As it is opened, a stream lets 64 KiB through unread; it should not grow.
            small = grpc.aio.insecure_channel(server.grpc_at, options=[("grpc.http2.bdp_probe", 0)])
            call = generation_pb2_grpc.GenerationServiceStub(small).Generate(message)
            # Nobody reads: the engine is told to stop all the same.
            async with asyncio.timeout(60):
                while not server.engine.cancelled:
                    await asyncio.sleep(0.01)
            found: list[int] = []

            async def read() -> None:
                async for each in call:
                    found.extend(each.token_ids)

            with pytest.raises(grpc.aio.AioRpcError, match=told) as caught:
                await read()
            await small.close()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason(caught.value) == "READER_TOO_SLOW"
            assert set(found) == {100}
            assert len(found) % BURST == 0
            assert len(server.engine.cancelled) == 1

    asyncio.run(main())


def test_only_what_is_written_for_too_long_is_given_up() -> None:
    async def main() -> None:
        watch = StallWatch(10.0)
        loop = asyncio.get_running_loop()

        class Stuck:
            async def write(self, message: bytes) -> None:
                await loop.create_future()

        async def write() -> None:
            task = asyncio.current_task()
            assert task is not None
            await watch.write(task, Stuck(), b"x")

        writing = [asyncio.ensure_future(write()) for _ in range(2)]
        await asyncio.sleep(0)
        began_s = loop.time()
        watch.look(began_s + 9.0)
        await asyncio.sleep(0)
        assert not any(task.done() for task in writing)
        # Cancelled by someone else: that stays what it is.
        writing[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing[1]
        watch.look(began_s + 10.0)
        watch.look(began_s + 11.0)
        with pytest.raises(ResourceExhaustedError, match="not read for 10 s"):
            await writing[0]
        assert not writing[0].cancelling()
        watch.look(began_s + 1000.0)

    asyncio.run(main())


def test_a_client_that_answers_no_ping_loses_its_connection(serving: Any) -> None:
    async def main() -> None:
        async with serving(keepalive_s=1.0, keepalive_timeout_s=1.0) as server:
            host, port = server.grpc_at.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            # HTTP/2 begins with this and an empty frame of settings; after it, not a word.
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 60)
            writer.close()

    asyncio.run(main())
