"""The public surface: its names, their agreement, and the cost of importing them."""

from __future__ import annotations

import inspect
import re
from typing import Any, Unpack, get_type_hints

import pytest

import loraplex
from loraplex import (
    AsyncClient,
    AsyncGenerationBatch,
    AsyncGenerationMap,
    AsyncGenerationStream,
    Client,
    GenerateOptions,
    GenerationBatch,
    GenerationMap,
    GenerationStream,
)
from loraplex._async.adapters import AsyncAdapters
from loraplex._async.streams import AsyncAdapterWatch
from loraplex._sync.adapters import Adapters
from loraplex._sync.streams import AdapterWatch


def test_the_public_names() -> None:
    assert loraplex.__all__ == [
        "AdapterChanges",
        "AdapterInfo",
        "AdapterState",
        "AsyncClient",
        "AsyncGenerationBatch",
        "AsyncGenerationMap",
        "AsyncGenerationStream",
        "BatchResult",
        "CallHook",
        "CallInfo",
        "Choice",
        "Client",
        "Conversation",
        "FinishReason",
        "GenerateOptions",
        "Generation",
        "GenerationBatch",
        "GenerationChunk",
        "GenerationMap",
        "GenerationStream",
        "Grammar",
        "JsonObject",
        "JsonSchema",
        "Keepalive",
        "LoraplexError",
        "ModelInfo",
        "Regex",
        "RetryPolicy",
        "Timeouts",
        "Timing",
        "TlsConfig",
        "TokenLogprobs",
        "TopLogprob",
        "Usage",
        "__version__",
        "errors",
    ]
    assert all(getattr(loraplex, name) is not None for name in loraplex.__all__)
    assert set(loraplex.__all__) <= set(dir(loraplex))
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        loraplex.Klient  # noqa: B018


def public(kind: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") or name in ("__init__",)
    }


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [
        (Client, AsyncClient),
        (Adapters, AsyncAdapters),
        (GenerationStream, AsyncGenerationStream),
        (GenerationMap, AsyncGenerationMap),
        (GenerationBatch, AsyncGenerationBatch),
        (AdapterWatch, AsyncAdapterWatch),
    ],
)
def test_both_clients_have_one_shape(blocking: type, awaited: type) -> None:
    ours, theirs = public(blocking), public(awaited)
    assert ours.keys() == theirs.keys()
    for name, member in ours.items():
        if not callable(member) or name == "__init__":
            continue
        mine, other = inspect.signature(member), inspect.signature(theirs[name])
        assert mine.parameters == other.parameters, name
        assert str(mine.return_annotation) == str(other.return_annotation).replace("Async", ""), name
        assert inspect.getdoc(member) == inspect.getdoc(theirs[name]), name
        assert inspect.iscoroutinefunction(theirs[name]) is (
            not name.startswith(("stream", "watch", "map"))
        ), name


def test_options_are_the_arguments_of_the_request() -> None:
    for method in (Client.generate, Client.stream, Client.chat, Client.map, Client.stream_batch):
        assert get_type_hints(method)["options"] == Unpack[GenerateOptions]
    arguments = get_type_hints(GenerateOptions)
    documented = inspect.getdoc(Client.generate) or ""
    assert all(f"{name}," in documented or f"{name};" in documented for name in arguments)


def test_the_documentation_names_every_option(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs/how-to/generate.md").read_text()
    section = page.split("## Options\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)", " ".join(cells)))
    assert named == get_type_hints(GenerateOptions).keys()


def test_there_are_no_other_options() -> None:
    options: dict[str, Any] = {"temprature": 0.5}
    with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="'temprature'"):
            client.generate("x", **options)
        with pytest.raises(TypeError, match="'temprature'"):
            client.stream_batch(["x"], **options)


HEAVY = ("torch", "transformers", "numpy", "loraplex_server")


def test_works_without_torch_transformers_numpy(new_process: Any) -> None:
    done = new_process(
        """
from loraplex import *
from loraplex import AsyncClient, Client, errors
client = Client("127.0.0.1:1", retry=None)
try:
    client.generate("x", timeout=5)
except errors.UnavailableError:
    print("no server")
client.close()
""",
        blocked=HEAVY,
    )
    assert (done.returncode, done.stdout) == (0, "no server\n"), done.stderr


def test_importing_the_package_loads_no_grpc(new_process: Any) -> None:
    done = new_process("import loraplex, loraplex.cli; print(*sys.modules)", blocked=HEAVY)
    loaded = done.stdout.split()
    assert "loraplex" in loaded
    assert not {"grpc", "google.protobuf", "importlib.metadata"} & set(loaded)
