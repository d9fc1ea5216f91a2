"""Runs a real server as a process of its own: start, wait until ready, watch its memory, stop cleanly."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from loraplex_bench.demo.tasks import data_dir

READY = re.compile(r"^loraplex ready grpc=(?P<grpc>\S+) metrics=(?P<metrics>\S+)\s*$")

SERVE_COMMAND = (sys.executable, "-m", "loraplex_server")
"""Starts the server; the flags of `loraplex serve` follow."""


class LaunchError(RuntimeError):
    """The server did not start, or did not stop as it should; carries the end of its log."""


def demo_flags(*, quantization: str = "nf4", adapters: Path | None = None) -> list[str]:
    """Flags of `loraplex serve` that serve the embedded demo model on free ports.

    Raises:
        LaunchError: the demo model's data is not there.
    """
    base = data_dir() / "base"
    if not (base / "config.json").is_file():
        raise LaunchError("the demo model's weights are missing; check out bench/loraplex_bench/demo/data")
    return [
        *("--model", str(base)),
        *("--adapters", str(adapters or data_dir() / "adapters")),
        *("--quantization", quantization),
        *("--port", "0"),
        *("--metrics-port", "0"),
    ]


class LaunchedServer:
    """A running server process. A context manager: leaving it stops the server, and kills it if need be.

    Attributes:
        grpc: HOST:PORT of the API.
        metrics: HOST:PORT of the Prometheus endpoint; None without one.
        start_s: seconds from launch until it was ready.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        timeout_s: float = 180.0,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = SERVE_COMMAND,
    ) -> None:
        """Starts the server and returns once it is ready.

        Args:
            flags: of `loraplex serve`; port 0 picks a free port.
            timeout_s: how long it may take to become ready.
            env: variables beside those of this process.

        Raises:
            LaunchError: it ended, or was not ready in time.
        """
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        started = time.monotonic()
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order, and a
        # server that hangs can be killed with everything it started.
        self._process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(env),
            start_new_session=True,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_stdout, args=(lines,), daemon=True)
        self._reader.start()
        try:
            ready = self._wait_ready(lines, started + timeout_s)
        except BaseException:
            self.kill()
            raise
        self.grpc: str = ready["grpc"]
        self.metrics: str | None = ready["metrics"] if ":" in ready["metrics"] else None
        self.start_s = time.monotonic() - started

    def __enter__(self) -> LaunchedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            with contextlib.suppress(LaunchError):
                self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout_s: float = 60.0) -> int:
        """Asks the server to end (SIGTERM), waits, and returns its exit code; does nothing the second time.

        Raises:
            LaunchError: it did not end in time, and was killed, or it left processes behind, which were
                killed.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log = self.log_tail()
            self.kill()
            raise LaunchError(f"the server did not stop within {timeout_s:g} s of SIGTERM\n{log}") from None
        left = self._wait_group_gone(min(5.0, timeout_s))
        log = self.log_tail()
        self.kill()
        if left:
            raise LaunchError(f"the server left processes behind: {', '.join(map(str, left))}\n{log}")
        return code

    def kill(self) -> None:
        """Kills the server and all it started, and frees what belongs to it here."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._wait_group_gone(5.0)
        self._reader.join(timeout=10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def log_tail(self, size: int = 4000) -> str:
        """The last characters that the server wrote on stderr; empty after it has ended."""
        if self._log.closed:
            return ""
        # A duplicate shares the offset with the server's own descriptor: read at a position instead of
        # seeking.
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, max(0, end - size)).decode(errors="replace")

    def pids(self) -> list[int]:
        """The server's process and every one it started that still lives (Linux; elsewhere its own only)."""
        return process_group(self._process.pid) or ([self._process.pid] if self.running else [])

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of memory of all the server's processes: `rss`, and of that `anonymous`, not backed by files.

        Empty where /proc does not tell.
        """
        total = {"rss": 0, "anonymous": 0}
        pids = self.pids()
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            for key, field in (("rss", "VmRSS"), ("anonymous", "RssAnon")):
                if (match := re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)) is not None:
                    total[key] += int(match[1]) * 1024
        return total if total["rss"] else {}

    def _wait_ready(self, lines: queue.SimpleQueue[str | None], deadline: float) -> re.Match[str]:
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LaunchError(f"the server was not ready in time\n{self.log_tail()}") from None
            if line is None:
                code = self._process.wait()
                raise LaunchError(
                    f"the server ended with exit code {code} before it was ready\n{self.log_tail()}"
                )
            if (match := READY.match(line)) is not None:
                return match

    def _read_stdout(self, lines: queue.SimpleQueue[str | None]) -> None:
        """Reads to the end, so that a full pipe never stops the server."""
        assert self._process.stdout is not None
        waiting = True
        for raw in self._process.stdout:
            if waiting:
                line = raw.decode(errors="replace")
                lines.put(line)
                waiting = READY.match(line) is None
        lines.put(None)

    def _wait_group_gone(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while (left := process_group(self._process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a Python process that shall find the same modules as this one, installed or not."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


def process_group(group: int) -> list[int]:
    """Living processes of a process group, zombies left out; empty where there is no /proc."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        # The command's name, in parentheses, may itself hold spaces and parentheses.
        state, _parent, process_group_id = stat.rpartition(")")[2].split()[:3]
        if int(process_group_id) == group and state not in "ZX":
            members.append(int(entry.name))
    return members
