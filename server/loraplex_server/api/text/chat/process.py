"""The parent's end of the renderer: starts it when it is needed, and kills it when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import msgspec

from loraplex_server.api.text.chat.renderer import Render, Rendered
from loraplex_server.core.errors import InternalError, UnavailableError

_START_S = 60.0
_RENDER_S = 2.0

_decoder = msgspec.msgpack.Decoder(Rendered)


class OverLimitError(Exception):
    """A template took more time or memory than any template needs."""


class RendererProcess:
    """One renderer, which answers one after the other. Belongs to one event loop.

    Args:
        render_s: longest time that one template may take.
    """

    def __init__(self, render_s: float = _RENDER_S) -> None:
        self._render_s = render_s
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._closed = False

    async def render(self, job: Render) -> Rendered:
        """Renders `job` in the process.

        Raises:
            OverLimitError: it took too much time or memory; the process has been ended.
            InternalError: no renderer could be started.
            UnavailableError: it is closed.
        """
        async with self._turn:
            if self._closed:
                raise UnavailableError("the engine has stopped", retry_after_s=1.0)
            process = self._process or await self._start()
            self._process = None
            try:
                answer = await asyncio.wait_for(_exchange(process, job), self._render_s)
            except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
                await _end(process)
                raise OverLimitError from error
            except BaseException:
                # The client is gone, and an answer that nobody takes would be the next one's.
                await _end(process)
                raise
            self._process = process
            return answer

    async def close(self) -> None:
        """Ends the process, if there is one; none is started again."""
        async with self._turn:
            self._closed = True
            process, self._process = self._process, None
            if process is not None:
                await _end(process)

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "loraplex_server.api.text.chat.renderer"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # None of the server's secrets.
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            # Ctrl-C is the server's to act on.
            start_new_session=True,
        )
        try:
            await asyncio.wait_for(_answer(process), _START_S)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            await _end(process)
            raise InternalError(f"the renderer of chat templates does not start: {error}") from error
        except BaseException:
            await _end(process)
            raise
        return process


async def _exchange(process: asyncio.subprocess.Process, job: Render) -> Rendered:
    assert process.stdin is not None
    body = msgspec.msgpack.encode(job)
    process.stdin.write(len(body).to_bytes(4, "big") + body)
    await process.stdin.drain()
    return await _answer(process)


async def _answer(process: asyncio.subprocess.Process) -> Rendered:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(4), "big")
    return _decoder.decode(await process.stdout.readexactly(length))


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # Shielded: a call that is cancelled must not leave a zombie.
    await asyncio.shield(asyncio.ensure_future(process.communicate()))
