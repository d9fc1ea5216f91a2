"""The servers that `loraplex bench api-cost` compares: the real one on an engine that computes nothing, and a
bare grpc.aio server that sends as many messages of the same size.

    python -m loraplex_bench.scenarios.api_cost.servers real FOLDER [FLAG VALUE ...]
    python -m loraplex_bench.scenarios.api_cost.servers bare TEXT
"""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from loraplex.v1 import generation_pb2

METHOD = "/loraplex.v1.GenerationService/Generate"


class _BareService:
    """The same calls as of the real server, with nothing behind them: each message is the same bytes."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._begin, self._end = asyncio.Event(), asyncio.Event()

    async def generate(self, request: bytes, context: Any) -> None:
        length = generation_pb2.GenerateRequest.FromString(request).stopping.max_tokens
        if length == 1:
            self._go()
            await context.write(self._message)
            return
        begin, end = self._begin, self._end
        await context.write(self._message)
        await begin.wait()
        for _ in range(length - 2):
            await context.write(self._message)
        await end.wait()
        await context.write(self._message)

    def _go(self) -> None:
        if self._begin.is_set():
            self._end.set()
            self._begin, self._end = asyncio.Event(), asyncio.Event()
        else:
            self._begin.set()


async def serve_bare(text: str) -> int:
    """Serves until SIGTERM; every message carries `text` and one token."""
    message = generation_pb2.GenerateResponse(text=text, token_ids=[4000]).SerializeToString()
    handler: Any = grpc.unary_stream_rpc_method_handler(_BareService(message).generate)
    _, service, method = METHOD.split("/")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(f"loraplex ready grpc=127.0.0.1:{port} metrics=off", flush=True)
    await ended.wait()
    await server.stop(1.0)
    return 0


def serve_real(folder: Path, flags: Sequence[str]) -> int:
    """The whole server, but for what computes. `folder` has the tokenizer and the text of the answers."""
    from loraplex_bench.scenarios.api_cost.engine import launch
    from loraplex_server.api.app import serve
    from loraplex_server.cli import hide_torch
    from loraplex_server.config.cli import resolve
    from loraplex_server.core import log

    hide_torch()
    arguments = ["--model", str(folder), "--port", "0", "--metrics-port", "-1", "--log-level", "warning"]
    config = resolve([*arguments, *flags], environ={}).to_config()
    log.configure(config.engine.log.level, config.engine.log.format)
    return asyncio.run(serve(config, functools.partial(launch, folder)))


def main(arguments: Sequence[str]) -> int:
    kind, where, *flags = arguments
    return asyncio.run(serve_bare(where)) if kind == "bare" else serve_real(Path(where), flags)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
