"""Uploads: the server keeps announced content only and refuses the rest."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.v1 import adapters_pb2
from loraplex_server.api.requests import uploads
from loraplex_server.api.requests.check_adapters import check_upload_header
from loraplex_server.api.requests.uploads import MAX_CHUNK_BYTES, Upload, UploadDesk
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_cache import cache_folder, staging_folder
from loraplex_server.core.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)

Request = adapters_pb2.UploadAdapterRequest
BODY = bytes(range(256)) * 10


def header(**changed: Any) -> adapters_pb2.UploadHeader:
    fields = {"name": "x", "config": "{}", "sha256": hashlib.sha256(BODY).hexdigest(), "size": len(BODY)}
    return adapters_pb2.UploadHeader(**{**fields, **changed})


async def sent(*chunks: bytes | Request) -> AsyncIterator[Request]:
    for chunk in chunks:
        yield chunk if isinstance(chunk, Request) else Request(chunk=chunk)


@pytest.fixture
def desk(tmp_path: Path) -> UploadDesk:
    (tmp_path / "staging").mkdir()
    return UploadDesk(
        AdapterConfig(cache_dir=tmp_path, allow_uploads=True, upload_max_bytes=5000, max_uploads=2)
    )


@pytest.fixture
def receive(desk: UploadDesk, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Receives an upload whole; gives its files. Afterwards nothing is left of it."""

    def run(announced: adapters_pb2.UploadHeader, *chunks: bytes | Request) -> dict[str, bytes]:
        async def main() -> dict[str, bytes]:
            async with desk.receive(announced, sent(*chunks)) as upload:
                files = {path.name: path.read_bytes() for path in upload.folder.iterdir()}
                assert {n: hashlib.sha256(f).hexdigest() for n, f in files.items()} == upload.sha256
                return files

        try:
            return asyncio.run(main())
        finally:
            assert list((tmp_path / "staging").iterdir()) == []

    return run


def test_a_relative_cache_folder_is_one_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """API and engine compare paths in it: an upload lies where the engine looks for it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert staging_folder(Path("../cache")) == cache_folder(Path("../cache")) / "staging"
    assert cache_folder(Path("../cache")) == tmp_path.resolve() / "cache"


def test_an_upload_is_received_whole(receive: Any) -> None:
    files = receive(header(config='{"r": 4}'), BODY[:7], BODY[7:2000], BODY[2000:])
    assert files == {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": BODY}
    assert receive(header(sha256=hashlib.sha256(BODY).hexdigest().upper()), BODY)


def text_file(body: bytes, name: str = "tokenizer.json", **changed: Any) -> adapters_pb2.UploadedFile:
    fields = {"name": name, "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
    return adapters_pb2.UploadedFile(**{**fields, **changed})


def test_what_an_adapter_brings_for_text_comes_along(receive: Any) -> None:
    texts = {"tokenizer.json": b"tokens", "chat_template.jinja": b"{{ x }}"}
    announced = header(files=[text_file(body, name) for name, body in texts.items()])
    check_upload_header(announced, 5000)
    files = receive(announced, BODY, b"tok", b"ens", b"{{ x }}")
    assert files == {"adapter_config.json": b"{}", "adapter_model.safetensors": BODY, **texts}


@pytest.mark.parametrize(
    ("announced", "chunks", "field"),
    [
        ({}, [BODY[:-1]], "size"),
        ({}, [BODY, b"x"], "chunk"),
        ({}, [BODY[:9], b"", BODY[9:]], "chunk"),
        ({}, [BODY[:9], Request(header=header())], "chunk"),
        ({"size": 2 * MAX_CHUNK_BYTES}, [b"x" * (MAX_CHUNK_BYTES + 1)], "chunk"),
        ({}, [b"!" + BODY[1:]], "sha256"),
        ({}, [], "size"),
        ({"files": [text_file(b"abc")]}, [BODY], "files[0].size"),
        ({"files": [text_file(b"abc")]}, [BODY + b"abc"], "chunk"),
        ({"files": [text_file(b"abc")]}, [BODY, b"abd"], "files[0].sha256"),
        ({"files": [text_file(b"abc")]}, [BODY, b"abc", b"d"], "chunk"),
    ],
)
def test_what_was_not_announced_is_refused(
    receive: Any, announced: dict[str, Any], chunks: list[Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        receive(header(**announced), *chunks)
    assert [violation.field for violation in caught.value.info.violations] == [field]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"name": "../x"}, "header.name"),
        ({"config": ""}, "header.config"),
        ({"config": " " * ((1 << 20) + 1)}, "header.config"),
        ({"sha256": "ab"}, "header.sha256"),
        ({"size": 0}, "header.size"),
        ({"size": 5001}, "header.size"),
        ({"files": [text_file(b"x", "../tokenizer.json")]}, "header.files[0].name"),
        ({"files": [text_file(b"x", "adapter_model.safetensors")]}, "header.files[0].name"),
        ({"files": [text_file(b"x"), text_file(b"x")]}, "header.files[1].name"),
        ({"files": [text_file(b"x", sha256="")]}, "header.files[0].sha256"),
        ({"files": [text_file(b"x", size=0)]}, "header.files[0].size"),
        ({"files": [text_file(b"x", size=4000)]}, "header.files"),
    ],
)
def test_bad_headers_are_refused_before_anything_is_read(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_upload_header(header(**changed), 5000)
    assert [violation.field for violation in caught.value.info.violations] == [field]


def test_the_header_comes_first(desk: UploadDesk) -> None:
    async def first(*parts: Any) -> Any:
        return await desk.header(sent(*parts))

    assert asyncio.run(first(Request(header=header()))) == header()
    for parts in ([], [BODY], [Request()]):
        with pytest.raises(InvalidArgumentError, match="first message"):
            asyncio.run(first(*parts))


def test_uploads_are_off_unless_allowed(desk: UploadDesk) -> None:
    desk.check_allowed()
    with pytest.raises(PermissionDeniedError, match="--allow-uploads"):
        UploadDesk(AdapterConfig()).check_allowed()


def test_only_so_many_at_once(desk: UploadDesk) -> None:
    async def main() -> None:
        async with desk.receive(header(), sent(BODY)), desk.receive(header(), sent(BODY)):
            with pytest.raises(ResourceExhaustedError, match="--max-uploads"):
                async with desk.receive(header(), sent(BODY)):
                    pass
        async with desk.receive(header(), sent(BODY)) as upload:
            assert isinstance(upload, Upload)

    asyncio.run(main())


def test_a_client_that_falls_silent_is_given_up(
    desk: UploadDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "CHUNK_WAIT_S", 0.05)

    async def silent() -> AsyncIterator[Request]:
        yield Request(chunk=BODY[:5])
        await asyncio.sleep(60)

    async def main() -> None:
        async with desk.receive(header(), silent()):
            pass

    with pytest.raises(DeadlineExceededError):
        asyncio.run(main())
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_cancelled_upload_leaves_nothing(desk: UploadDesk, tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[Request]:
        yield Request(chunk=BODY[:5])
        await asyncio.Event().wait()

    async def main() -> None:
        async def receive() -> None:
            async with desk.receive(header(), endless()):
                pass

        task = asyncio.create_task(receive())
        while not list((tmp_path / "staging").glob("*/adapter_model.safetensors")):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with desk.receive(header(), sent(BODY)), desk.receive(header(), sent(BODY)):
            pass

    asyncio.run(main())
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_disk_that_fails_is_said_to(desk: UploadDesk, tmp_path: Path) -> None:
    (tmp_path / "staging").rmdir()

    async def main() -> None:
        async with desk.receive(header(), sent(BODY)):
            pass

    with pytest.raises(UnavailableError) as caught:
        asyncio.run(main())
    assert isinstance(caught.value, ServerError)
