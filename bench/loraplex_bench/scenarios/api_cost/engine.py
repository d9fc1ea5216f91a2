"""An engine that computes nothing: it speaks the engine's protocol over the engine's own socket, from a
process of its own, and has every token ready at once. What is left of the time is the API's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraplex_server.adapters.residency.registry import Registry
from loraplex_server.config import EngineConfig
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.engine.host import EngineHost
from loraplex_server.engine.process import EngineProcess
from loraplex_server.wire.messages import EngineInfo, FromEngine, Times, TokenDelta, Tokens
from loraplex_server.wire.stats import Stats, StepRecord

TOKENS_FILE = "tokens.json"
"""In the bench's folder: the token ids of a text, over and over the answer to every stream."""

STAMPS_FILE = "stamps.json"
"""Written there when the streams end: `time.perf_counter()` of each step's tokens, the first ones' apart."""

PID_FILE = "engine.pid"

STRIDE = 97
"""Streams begin so many tokens apart in the text."""

_TIMES = Times(queue_s=0.0, adapter_wait_s=0.0, first_token_s=0.0, total_s=0.0, preemptions=0)


class _NoAdapters:
    """As much of an adapter store as a host asks of one where there are none."""

    def __init__(self) -> None:
        self.registry = Registry()

    def close(self) -> None:
        pass


class InstantEngine:
    """Answers each stream's first token when it is asked, and the others when it is told to go.

    A request for a single token tells it: the first such one begins the steps, each of which gives every
    stream one token, `priority` microseconds apart (0 is as fast as can be), up to the last token but one;
    the second one has the last token sent. So whoever measures can leave the beginnings and ends of calls
    out. A stream's seed is its number.
    """

    def __init__(self, folder: Path, info: EngineInfo, emit: Callable[[str, FromEngine], None]) -> None:
        self.info = info
        self.adapters = _NoAdapters()
        self._folder = folder
        self._emit = emit
        self._text: Sequence[int] = json.loads((folder / TOKENS_FILE).read_text())
        # Position in the text of each stream's first token, by client and request id.
        self._streams: dict[tuple[str, str], int] = {}
        self._length = 0
        self._stamps: list[float] = []
        self._period_s = 0.0
        self._due_s: float | None = None
        self._records: list[StepRecord] = []

    def submit(self, client: str, request: Request) -> None:
        """Takes a stream in, or goes."""
        if request.sampling.max_tokens > 1:
            self._length = request.sampling.max_tokens
            position = STRIDE * request.sampling.seed
            self._streams[client, request.request_id] = position
            delta = TokenDelta(request.request_id, (self._token(position),), times=_TIMES)
            self._emit(client, Tokens((delta,)))
            return
        if not self._stamps:
            self._period_s = request.priority / 1e6
            self._due_s = time.perf_counter()
        else:
            self._finish()
        last = TokenDelta(request.request_id, (self._token(0),), finish=FinishReason.LENGTH, times=_TIMES)
        self._emit(client, Tokens((last,)))

    def step(self) -> bool:
        """Gives every stream a token once that is due; whether it has."""
        if self._due_s is None:
            return False
        if (early_s := self._due_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        now_s = time.perf_counter()
        self._stamps.append(now_s)
        self._give(len(self._stamps), None)
        self._due_s += self._period_s
        if len(self._stamps) == self._length - 2:
            self._due_s = None
        taken_s = time.perf_counter() - now_s
        streams = len(self._streams)
        self._records.append(
            StepRecord(
                seconds=taken_s,
                plan_seconds=0.0,
                requests=streams,
                prefill_tokens=0,
                decode_tokens=streams,
                adapters=0,
                preemptions=0,
            )
        )
        return True

    def _finish(self) -> None:
        stamps, self._stamps = self._stamps, []
        (self._folder / STAMPS_FILE).write_text(json.dumps(stamps))
        self._give(self._length - 1, FinishReason.LENGTH)
        self._streams.clear()

    def _give(self, index: int, finish: FinishReason | None) -> None:
        found: dict[str, list[TokenDelta]] = {}
        times = None if finish is None else _TIMES
        for (client, request_id), position in self._streams.items():
            delta = TokenDelta(request_id, (self._token(position + index),), finish=finish, times=times)
            found.setdefault(client, []).append(delta)
        for client, deltas in found.items():
            self._emit(client, Tokens(tuple(deltas)))

    def _token(self, position: int) -> int:
        return self._text[position % len(self._text)]

    def cancel(self, client: str, request_id: str) -> None:
        self._streams.pop((client, request_id), None)

    def cancel_client(self, client: str) -> None:
        for key in [key for key in self._streams if key[0] == client]:
            del self._streams[key]

    def idle(self) -> bool:
        return False

    def stats(self) -> Stats:
        steps, self._records = tuple(self._records), []
        return Stats(
            steps=steps,
            swaps=(),
            waiting=0,
            running=len(self._streams),
            waiting_for_adapter=0,
            kv_blocks_used=0,
            kv_blocks=self.info.kv_blocks,
            adapter_device_bytes_used=0,
            adapter_host_bytes_used=0,
            adapters_on_device=(),
            adapters_on_host=(),
            adapter_hits=0,
            adapter_misses=0,
        )


def launch(folder: Path, config: EngineConfig) -> EngineProcess:
    """Starts such an engine in a process of its own, as `engine.process.launch_engine` does a real one."""
    home = Path(tempfile.mkdtemp(prefix="loraplex-"))
    socket_path, token = str(home / "engine.sock"), secrets.token_hex(32)
    spawn = multiprocessing.get_context("spawn")
    ready, child_end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_main, args=(folder, config, socket_path, token, child_end), daemon=True)
    process.start()
    child_end.close()
    return EngineProcess(socket_path, token, process, ready, home)


def _main(folder: Path, config: EngineConfig, socket_path: str, token: str, ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = EngineHost(socket_path, token)
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    engine: Any = InstantEngine(folder, _info(config), host.emit)
    (folder / PID_FILE).write_text(str(os.getpid()))
    ready.send(None)
    ready.close()
    host.run(engine)


def _info(config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        model="instant",
        architecture="none",
        quantization="none",
        dtype="none",
        device="none",
        kernels="none",
        vocab_size=1 << 20,
        max_model_len=1 << 20,
        parameters=0,
        weight_bytes=0,
        weight_checksum="0" * 64,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        max_num_requests=config.scheduler.max_num_requests,
        kv_block_size=config.scheduler.kv_block_size,
        kv_blocks=1,
        adapter_device_bytes=0,
        adapter_host_bytes=0,
        max_adapters_on_device=0,
        adapter_slots=0,
        eos_token_ids=(),
    )
