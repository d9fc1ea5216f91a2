"""Adapters that clients send: received in chunks, checked against what was announced, given to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from loraplex.v1 import adapters_pb2
from loraplex_server.api.requests.check_adapters import check_upload_header
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_cache import staging_folder
from loraplex_server.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_server.core.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    disk_error,
)

MAX_CHUNK_BYTES = 1 << 20
CHUNK_WAIT_S = 60.0
"""A client that sends nothing for so long is given up."""

Requests = AsyncIterator[adapters_pb2.UploadAdapterRequest]


@dataclasses.dataclass(frozen=True)
class Upload:
    """An adapter that was received whole; its files are in `folder`, by the names that PEFT gives them."""

    header: adapters_pb2.UploadHeader
    folder: Path
    sha256: dict[str, str]


class UploadDesk:
    """Receives uploads, a few at a time, in the staging folder of the engine's cache."""

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._folder = staging_folder(config.cache_dir)
        self._under_way = 0

    def check_allowed(self) -> None:
        """Raises: PermissionDeniedError unless the operator takes uploads."""
        if not self._config.allow_uploads:
            raise PermissionDeniedError(
                "this server takes no adapters from clients; its operator allows it with --allow-uploads",
                resource=("adapter", "upload"),
                reason=Reason.UPLOADS_NOT_ALLOWED,
            )

    async def header(self, requests: Requests) -> adapters_pb2.UploadHeader:
        """The first message of an upload.

        Raises:
            InvalidArgumentError: it is no header, or a bad one.
        """
        first = await _next(requests)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgumentError.field("header", "has to be the first message of an upload")
        check_upload_header(first.header, self._config.upload_max_bytes)
        return first.header

    @contextlib.asynccontextmanager
    async def receive(self, header: adapters_pb2.UploadHeader, requests: Requests) -> AsyncIterator[Upload]:
        """Receives the files that `header` announced; at the end they are gone unless the engine took them.

        Raises:
            ResourceExhaustedError: too many uploads are under way.
            InvalidArgumentError: what came is not what was announced.
            DeadlineExceededError: the client fell silent.
            UnavailableError: the disk failed; ResourceExhaustedError: it is full.
        """
        if self._under_way >= self._config.max_uploads:
            raise ResourceExhaustedError(
                f"{self._under_way} uploads are under way, which is the most (--max-uploads)",
                resource=("jobs", "uploads"),
                retry_after_s=1.0,
                reason=Reason.TOO_MANY_JOBS,
            )
        self._under_way += 1
        folder: Path | None = None
        try:
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._folder))
            yield Upload(header, folder, await _write(folder, header, requests))
        except OSError as error:
            raise disk_error("--adapter-cache-dir", error) from error
        finally:
            self._under_way -= 1
            if folder is not None:
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


async def _write(folder: Path, header: adapters_pb2.UploadHeader, requests: Requests) -> dict[str, str]:
    """Writes all files; the SHA-256 of each by name."""
    config = header.config.encode()
    await asyncio.to_thread((folder / CONFIG_FILE).write_bytes, config)
    digests = {CONFIG_FILE: hashlib.sha256(config).hexdigest()}
    weights = adapters_pb2.UploadedFile(name=WEIGHTS_FILE, sha256=header.sha256, size=header.size)
    digests[WEIGHTS_FILE] = await _write_file(folder, weights, "", requests)
    for index, file in enumerate(header.files):
        digests[file.name] = await _write_file(folder, file, f"files[{index}].", requests)
    if await _next(requests) is not None:
        raise InvalidArgumentError.field("chunk", "is beyond the bytes announced")
    return digests


async def _write_file(
    folder: Path, announced: adapters_pb2.UploadedFile, fields: str, requests: Requests
) -> str:
    """Writes the file that is announced; its SHA-256. `fields`: where the header says of it."""
    digest, received = hashlib.sha256(), 0
    with (folder / announced.name).open("wb") as file:
        while received < announced.size:
            request = await _next(requests)
            if request is None:
                raise InvalidArgumentError.field(
                    f"{fields}size", f"{announced.size} bytes were announced, {received} came"
                )
            if request.WhichOneof("part") != "chunk" or not 1 <= len(request.chunk) <= MAX_CHUNK_BYTES:
                raise InvalidArgumentError.field(
                    "chunk", f"has to have 1 to {MAX_CHUNK_BYTES} bytes in every message after the first"
                )
            received += len(request.chunk)
            if received > announced.size:
                raise InvalidArgumentError.field(
                    "chunk",
                    f"is beyond the {announced.size} bytes announced; a message has bytes of one file",
                )
            await asyncio.to_thread(_take, file, digest, request.chunk)
    if digest.hexdigest() != announced.sha256.lower():
        raise InvalidArgumentError.field(
            f"{fields}sha256",
            f"{announced.sha256} was announced, but what came has {digest.hexdigest()}; send it again",
        )
    return digest.hexdigest()


def _take(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    file.write(chunk)
    digest.update(chunk)


async def _next(requests: Requests) -> adapters_pb2.UploadAdapterRequest | None:
    """The next message, None after the last.

    Raises:
        DeadlineExceededError: none came in time.
    """
    try:
        # Not `wait_for`, which before Python 3.12 may lose a cancellation.
        async with asyncio.timeout(CHUNK_WAIT_S):
            return await anext(requests, None)
    except TimeoutError as error:
        raise DeadlineExceededError(f"nothing came for {CHUNK_WAIT_S:g} s; send the upload again") from error
