"""Downloads over HTTP: resuming, verification, limits, redirects; the parts that all backends share."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.adapters.origins.resolver import AdapterSources
from loraplex_server.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AT = f"/a/sql/{WEIGHTS}"

MakeSources = Callable[..., AdapterSources]
Content = Callable[[Path], dict[str, bytes]]
pytest.importorskip("aiohttp")  # of the extra `remote`
pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture
def published(place: Any, adapter: Path) -> Any:
    place.publish(adapter, "/a/sql")
    return place


@pytest.fixture
def sources(published: Any, make_sources: MakeSources) -> AdapterSources:
    return make_sources(f"{published.url}/a")


def partials(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "partial").rglob("*.safetensors"))


def test_only_the_adapters_files_are_fetched_once(
    sources: AdapterSources, published: Any, adapter: Path, content: Content, tmp_path: Path
) -> None:
    published.files["/a/sql/README.md"] = b"not wanted"
    folder = sources.resolve(f"{published.url}/a/sql")
    assert content(folder) == content(adapter)
    assert folder.is_relative_to(tmp_path / "cache")
    assert any(folder.is_relative_to(root) for root in sources.roots)
    assert {path for path, _, _ in published.requests} == {f"/a/sql/{CONFIG}", AT}
    assert sources.resolve(f"{published.url}/a/sql/") == folder
    assert len(published.bodies(AT)) == 1, "the second was served from the cache"


def test_a_bottleneck_adapter_comes_with_its_interface(
    published: Any, make_sources: MakeSources, content: Content, tmp_path: Path
) -> None:
    saved = Path(__file__).parents[1] / "saved" / "bottleneck-qwen2"
    published.publish(saved, "/a/bottleneck")
    sources = make_sources(f"{published.url}/a")
    source = f"{published.url}/a/bottleneck"
    digest = hashlib.sha256((saved / "adapter.safetensors").read_bytes()).hexdigest()
    folder = sources.resolve(f"{source}#sha256={digest}")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {
        path.name: (folder / path.name).read_bytes() for path in saved.iterdir()
    }
    assert sources.resolve(source) == folder
    with pytest.raises(FailedPreconditionError, match="SHA-256"):
        sources.resolve(f"{source}#sha256={'0' * 64}")
    published.files["/a/bottleneck/model_head.safetensors"] = b"x"
    with pytest.raises(FailedPreconditionError, match="with_head=False"):
        sources.resolve(source)
    del published.files["/a/bottleneck/adapter.safetensors"]
    with pytest.raises(NotFoundError, match=WEIGHTS):
        sources.resolve(source)
    published.files["/a/bottleneck/pytorch_adapter.bin"] = b"x"
    with pytest.raises(FailedPreconditionError, match="use_safetensors=True"):
        sources.resolve(source)


def test_new_content_is_a_new_folder(
    sources: AdapterSources, published: Any, content: Content, tmp_path: Path, write_adapter: Any
) -> None:
    before = sources.resolve(f"{published.url}/a/sql")
    old = content(before)
    published.publish(write_adapter(tmp_path / "new", seed=7), "/a/sql")
    after = sources.resolve(f"{published.url}/a/sql")
    assert after != before
    assert content(after) == content(tmp_path / "new")
    assert content(before) == old, "what may be in use never changes"


def test_extra_files_come_along_if_they_are_there(published: Any, make_sources: MakeSources) -> None:
    published.files["/a/sql/chat_template.jinja"] = b"{{ messages }}"
    sources = make_sources(f"{published.url}/a", extra_files=("chat_template.jinja", "tokenizer_config.json"))
    folder = sources.resolve(f"{published.url}/a/sql")
    assert (folder / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert not (folder / "tokenizer_config.json").exists()


def test_a_broken_download_goes_on_where_it_broke(
    sources: AdapterSources, published: Any, adapter: Path, content: Content
) -> None:
    size = len(content(adapter)[WEIGHTS])
    published.break_after = [size, 40_000, 10_000]
    folder = sources.resolve(f"{published.url}/a/sql")
    assert content(folder) == content(adapter)
    assert published.bodies(AT) == ["", "bytes=40000-", "bytes=50000-"]


def test_what_is_left_of_a_failed_download_is_used_by_the_next(
    published: Any, make_sources: MakeSources, adapter: Path, content: Content, tmp_path: Path
) -> None:
    sources = make_sources(f"{published.url}/a")
    published.break_after = [1 << 20, 30_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(UnavailableError, match="a/sql"):
        sources.resolve(f"{published.url}/a/sql")
    [partial] = partials(tmp_path)
    assert partial.stat().st_size == 30_000
    assert list((tmp_path / "cache" / "entries").iterdir()) == [], "no half of it is seen"
    sources.close()
    published.break_after.clear()
    again = make_sources(f"{published.url}/a")
    folder = again.resolve(f"{published.url}/a/sql")
    assert content(folder) == content(adapter)
    assert published.bodies(AT)[-1] == "bytes=30000-"
    assert partials(tmp_path) == []


def test_a_spoilt_rest_is_found_out_and_replaced(
    published: Any, make_sources: MakeSources, adapter: Path, content: Content, tmp_path: Path
) -> None:
    digest = hashlib.sha256(content(adapter)[WEIGHTS]).hexdigest()
    sources = make_sources(f"{published.url}/a")
    published.break_after = [1 << 20, 30_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(UnavailableError):
        sources.resolve(f"{published.url}/a/sql")
    [partial] = partials(tmp_path)
    partial.write_bytes(b"x" * 30_000)
    published.break_after.clear()
    folder = sources.resolve(f"{published.url}/a/sql#sha256={digest}")
    assert content(folder) == content(adapter)
    assert published.bodies(AT)[-2:] == ["bytes=30000-", ""]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etags", [True, False])
def test_servers_without_ranges_or_etags(
    ranges: bool, etags: bool, sources: AdapterSources, published: Any, adapter: Path, content: Content
) -> None:
    published.ranges, published.etags = ranges, etags
    # Without ranges even a look at the size has a body.
    published.break_after = [1 << 20] * (1 if ranges else 3) + [40_000]
    folder = sources.resolve(f"{published.url}/a/sql")
    assert content(folder) == content(adapter)
    if ranges and not etags:
        assert published.bodies(AT) == ["", ""], "parts that may be of two versions are not joined"


def test_a_file_that_is_replaced_meanwhile_is_fetched_anew(
    sources: AdapterSources, published: Any, tmp_path: Path, write_adapter: Any, content: Content
) -> None:
    new = write_adapter(tmp_path / "new", rank=64, seed=3)

    def replace(path: str) -> None:
        if path == AT:
            published.publish(new, "/a/sql")

    published.on_body = replace
    published.break_after = [1 << 20, 40_000]
    folder = sources.resolve(f"{published.url}/a/sql")
    assert content(folder) == content(new)


def test_pins_are_checked_at_first_and_ever_after(
    sources: AdapterSources, published: Any, adapter: Path, content: Content, tmp_path: Path
) -> None:
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in content(adapter).items()}
    source = f"{published.url}/a/sql"
    wrong = "0" * 64
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match=wrong) as caught:
            sources.resolve(f"{source}#sha256={wrong}")
        assert caught.value.info.resource == ("source", source)
    assert not partials(tmp_path), "what is wrong is not kept"
    with pytest.raises(FailedPreconditionError, match=CONFIG):
        sources.resolve(f"{source}#config_sha256={wrong}")
    right = f"{source}#sha256={digests[WEIGHTS]}&config_sha256={digests[CONFIG]}"
    folder = sources.resolve(right)
    with pytest.raises(FailedPreconditionError, match=wrong):
        sources.resolve(f"{source}#sha256={wrong}")
    assert sources.resolve(source) == folder


def test_a_cached_copy_that_was_changed_is_not_served(
    sources: AdapterSources, published: Any, adapter: Path, content: Content
) -> None:
    source = f"{published.url}/a/sql"
    folder = sources.resolve(source)
    body = bytearray(content(folder)[WEIGHTS])
    body[-1] ^= 1
    (folder / WEIGHTS).write_bytes(body)
    with pytest.raises(FailedPreconditionError, match="changed on disk"):
        sources.resolve(source)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FailedPreconditionError, match="changed on disk"):
        sources.resolve(source)
    sources.release(folder)
    assert content(sources.resolve(source)) == content(adapter)


def test_sizes_are_checked_before_the_download(
    published: Any, make_sources: MakeSources, adapter: Path, content: Content
) -> None:
    total = sum(map(len, content(adapter).values()))
    sources = make_sources(f"{published.url}/a", download_max_bytes=total - 1)
    with pytest.raises(FailedPreconditionError, match=f"{total} bytes.*--adapter-download-max-bytes"):
        sources.resolve(f"{published.url}/a/sql")
    published.files[f"/a/big/{CONFIG}"] = b" " * ((1 << 20) + 1)
    published.files[f"/a/big/{WEIGHTS}"] = b"x"
    with pytest.raises(FailedPreconditionError, match=CONFIG):
        sources.resolve(f"{published.url}/a/big")
    sources.close()
    small = make_sources(f"{published.url}/a", cache_bytes=total - 1)
    with pytest.raises(FailedPreconditionError, match="--adapter-cache-bytes"):
        small.resolve(f"{published.url}/a/sql")
    assert published.bodies(AT) == published.bodies(f"/a/big/{CONFIG}") == []


def test_the_cache_keeps_what_is_held_and_evicts_the_rest(
    published: Any, make_sources: MakeSources, adapter: Path, content: Content, write_adapter: Any
) -> None:
    total = sum(map(len, content(adapter).values()))
    for seed, name in enumerate("bcd"):
        published.publish(write_adapter(adapter.parent / name, rank=64, seed=seed + 5), f"/a/{name}")
    sources = make_sources(f"{published.url}/a", cache_bytes=3 * total - 1000)
    sql, b = (sources.resolve(f"{published.url}/a/{name}") for name in ("sql", "b"))
    with pytest.raises(ResourceExhaustedError, match="--adapter-cache-bytes") as caught:
        sources.resolve(f"{published.url}/a/c")
    assert caught.value.info.retry_after_s
    sources.retain(b)
    sources.release(b)
    sources.release(sql)
    sources.resolve(f"{published.url}/a/c")
    assert b.is_dir()
    assert not sql.exists()
    with pytest.raises(NotFoundError, match="load it"):
        sources.retain(sql)
    with pytest.raises(NotFoundError, match="load it"):
        sources.find(sql)
    assert sources.find(b) == b


def test_loads_of_one_source_share_a_download(sources: AdapterSources, published: Any) -> None:
    published.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        folders = [pool.submit(sources.resolve, f"{published.url}/a/sql") for _ in range(8)]
        published.waiting.acquire()
        published.gate.set()
        found = {future.result(20) for future in folders}
    assert len(found) == 1
    assert len(published.bodies(AT)) == 1
    folder = found.pop()
    for _ in range(8):
        sources.release(folder)


def test_credentials_do_not_join_nor_show(
    sources: AdapterSources, published: Any, adapter: Path, content: Content
) -> None:
    source = published.url.replace("http://", "http://me:s3cret@") + "/a/sql?sig=t0ken"
    for name in content(adapter):
        published.files[f"/a/sql/{name}?sig=t0ken"] = published.files[f"/a/sql/{name}"]
    sources.resolve(source)
    path, _, authorization = published.requests[-1]
    assert path.endswith("?sig=t0ken")
    assert authorization == "Basic " + base64.b64encode(b"me:s3cret").decode()
    published.files.clear()
    with pytest.raises(NotFoundError) as caught:
        sources.resolve(source)
    for secret in ("s3cret", "t0ken"):
        assert secret not in repr(caught.value.info)


def test_redirects_stay_within_the_prefixes_and_keep_secrets_home(
    published: Any, make_place: Callable[[], Any], make_sources: MakeSources, adapter: Path, content: Content
) -> None:
    elsewhere = make_place()
    for name in content(adapter):
        published.redirects[f"/a/moved/{name}"] = f"../sql/{name}"
        published.redirects[f"/a/far/{name}"] = f"{elsewhere.url}/b/{name}"
        published.redirects[f"/a/out/{name}"] = f"{elsewhere.url}/secret/{name}"
        published.redirects[f"/a/up/{name}"] = f"/private/{name}"
        published.redirects[f"/a/loop/{name}"] = f"/a/loop/{name}"
        published.redirects[f"/a/file/{name}"] = f"file://{adapter}/{name}"
        published.redirects[f"/a/odd/{name}"] = f"{elsewhere.url}\\@{published.host}/a/{name}"
    elsewhere.publish(adapter, "/b")
    elsewhere.publish(adapter, "/secret")
    published.publish(adapter, "/private")
    sources = make_sources(f"{published.url}/a", f"{elsewhere.url}/b")
    assert content(sources.resolve(f"{published.url}/a/moved")) == content(adapter)
    login = published.url.replace("http://", "http://me:s3cret@")
    assert content(sources.resolve(f"{login}/a/far")) == content(adapter)
    assert {authorization for _, _, authorization in elsewhere.requests} == {""}
    seen = len(elsewhere.requests)
    for name in ("out", "up", "file", "odd"):
        with pytest.raises(PermissionDeniedError, match="redirected"):
            sources.resolve(f"{published.url}/a/{name}")
    assert len(elsewhere.requests) == seen, "nothing was sent to where it may not go"
    assert not any(path.startswith("/private") for path, _, _ in published.requests)
    with pytest.raises(FailedPreconditionError, match="more than 5"):
        sources.resolve(f"{published.url}/a/loop")


@pytest.mark.parametrize(
    ("fail", "expected", "attempts"),
    [
        ([403], PermissionDeniedError, 1),
        ([401], PermissionDeniedError, 1),
        ([410], NotFoundError, 1),
        ([418], FailedPreconditionError, 1),
        ([503] * 9, UnavailableError, 4),
        ([429, 500, 503], None, 0),
    ],
)
def test_statuses(
    fail: list[int],
    expected: type[ServerError] | None,
    attempts: int,
    sources: AdapterSources,
    published: Any,
) -> None:
    published.fail = list(fail)
    source = f"{published.url}/a/sql"
    if expected is None:
        sources.resolve(source)
        return
    with pytest.raises(expected) as caught:
        sources.resolve(source)
    assert source in str(caught.value)
    assert caught.value.info.resource == ("source", source)
    assert len(published.requests) == attempts


def test_what_is_missing_or_no_adapter_is_named(sources: AdapterSources, published: Any) -> None:
    with pytest.raises(NotFoundError, match=CONFIG):
        sources.resolve(f"{published.url}/a/nothing")
    del published.files[AT]
    with pytest.raises(NotFoundError, match=WEIGHTS):
        sources.resolve(f"{published.url}/a/sql")
    published.files["/a/sql/adapter_model.bin"] = b"pickle"
    with pytest.raises(FailedPreconditionError, match="pickle"):
        sources.resolve(f"{published.url}/a/sql")


def test_compressed_files_are_refused(sources: AdapterSources, published: Any) -> None:
    published.headers["Content-Encoding"] = "gzip"
    with pytest.raises(FailedPreconditionError, match="compressed"):
        sources.resolve(f"{published.url}/a/sql")


def test_nobody_there_is_unavailable(
    make_place: Callable[[], Any], make_sources: MakeSources, unused_address: str
) -> None:
    sources = make_sources(f"http://{unused_address}")
    with pytest.raises(UnavailableError, match=unused_address):
        sources.resolve(f"http://{unused_address}/a")


def test_only_what_is_allowed_is_asked_for(
    sources: AdapterSources, published: Any, make_sources: MakeSources, tmp_path: Path
) -> None:
    for source in (f"{published.url}/b", f"{published.url}/a2/sql", "s3://bucket/a", "https://127.0.0.1/a"):
        with pytest.raises(PermissionDeniedError, match="--adapter-source"):
            sources.resolve(source)
    with pytest.raises(InvalidArgumentError):
        sources.resolve(f"{published.url}/a/../b")
    assert published.requests == []
    closed = make_sources(cache_dir=tmp_path / "unused")
    with pytest.raises(PermissionDeniedError, match="operator"):
        closed.resolve(f"{published.url}/a/sql")
    assert not (tmp_path / "unused").exists(), "without sources there is no cache"


def test_downloads_are_limited_in_number(published: Any, make_sources: MakeSources, adapter: Path) -> None:
    published.publish(adapter, "/a/two")
    published.gate.clear()
    sources = make_sources(f"{published.url}/a", max_downloads=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sources.resolve, f"{published.url}/a/sql")
        published.waiting.acquire()
        second = pool.submit(sources.resolve, f"{published.url}/a/two")
        assert not published.waiting.acquire(timeout=0.3)
        assert not any("/two/" in path for path, _, _ in published.requests)
        published.gate.set()
        assert first.result(20) != second.result(20)


def test_closing_ends_what_is_under_way(published: Any, make_sources: MakeSources) -> None:
    sources = make_sources(f"{published.url}/a", max_downloads=1)
    published.gate.clear()
    errors: list[BaseException] = []

    def resolve() -> None:
        try:
            sources.resolve(f"{published.url}/a/sql")
        except ServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    published.waiting.acquire()
    sources.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [UnavailableError] * 2


def test_file_addresses_are_paths(make_sources: MakeSources, adapter: Path) -> None:
    sources = make_sources(roots=(adapter.parent,))
    assert sources.resolve(f"file://{adapter}") == adapter
    assert sources.resolve(f"FILE://localhost{str(adapter).replace('sql', '%73ql')}") == adapter
    assert sources.resolve(str(adapter)) == sources.find(adapter) == adapter
    with pytest.raises(PermissionDeniedError):
        sources.resolve("file:///etc")
    with pytest.raises(InvalidArgumentError):
        sources.resolve(f"file://elsewhere{adapter}")
