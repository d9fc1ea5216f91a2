"""The engine in a process of its own: spawned (never forked), watched, and ended with its parent."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from loraplex_server.config import EngineConfig
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InternalError, ServerError, from_info

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class EngineProcess:
    """A running engine process. Connect to it with `EngineClient.connect(socket_path, token)`."""

    socket_path: str
    token: str
    _process: BaseProcess
    _ready: Connection
    _folder: Path

    def wait_ready(self) -> None:
        """Returns once the model is loaded and the engine takes connections. Blocks.

        Raises:
            ServerError: the engine could not start; the text says why.
        """
        try:
            problem: ErrorInfo | None = self._ready.recv()
        except EOFError:
            self._process.join()
            raise InternalError(
                f"the engine died while starting, exit code {self._process.exitcode}"
            ) from None
        if problem is not None:
            self.terminate()
            raise from_info(problem)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def join(self, timeout_s: float) -> bool:
        """Waits for the process to end by itself; whether it has."""
        self._process.join(timeout_s)
        if self.alive:
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def terminate(self) -> None:
        """Ends the process, gently first."""
        if self.alive:
            self._process.terminate()
        if not self.join(5):
            self._process.kill()
            self.join(5)


def launch_engine(config: EngineConfig, *, progress: bool = True) -> EngineProcess:
    """Starts an engine process and returns at once; call `wait_ready` next.

    Args:
        progress: draw loading progress on stderr.
    """
    folder = Path(tempfile.mkdtemp(prefix="loraplex-"))
    socket_path = str(folder / "engine.sock")
    token = secrets.token_hex(32)
    spawn = multiprocessing.get_context("spawn")
    ready, child_end = spawn.Pipe(duplex=False)
    process = spawn.Process(
        target=_main,
        args=(config, socket_path, token, child_end, progress, os.getpid()),
        name="loraplex-engine",
        daemon=True,
    )
    process.start()
    child_end.close()
    return EngineProcess(socket_path, token, process, ready, folder)


def _main(
    config: EngineConfig, socket_path: str, token: str, ready: Connection, progress: bool, parent: int
) -> None:
    """The engine process. Heavy imports happen here, after the spawn."""
    # Ctrl-C reaches the whole process group; the API drains first and then tells the engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.configure(config.log.level, config.log.format)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from tqdm import tqdm

    from loraplex_server.engine.build import build_engine
    from loraplex_server.engine.host import EngineHost

    # Its own is shared by processes: a semaphore, which the exit below would leave behind.
    tqdm.set_lock(threading.RLock())
    host = EngineHost(socket_path, token)
    try:
        engine = build_engine(config, host.emit, wake=host.wake, progress=progress)
    except ServerError as error:
        ready.send(error.info)
        return
    except Exception as error:
        _log.exception("the engine could not start")
        ready.send(InternalError(f"the engine could not start: {error}").info)
        return
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    threading.Thread(target=_follow_parent, args=(parent,), name="parent-watch", daemon=True).start()
    ready.send(None)
    ready.close()
    code = 0
    try:
        host.run(engine)
    except BaseException:
        _log.critical("the engine ends", exc_info=True)
        code = 1
    # All is closed; what is left to torch's teardown takes seconds and frees what the exit frees; after a
    # fault of the device it may never come back.
    logging.shutdown()
    os._exit(code)


def _follow_parent(parent: int) -> None:
    """Ends this process when its parent is gone, so that no engine is left behind by a killed server."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
