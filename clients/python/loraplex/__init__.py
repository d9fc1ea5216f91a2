r"""Python client of loraplex, which serves many adapters on one language model.

>>> from loraplex import Client
>>> with Client("127.0.0.1:50051") as client:
...     print(client.generate("hello world 42\n", adapter="upper", max_tokens=64).text)
HELLO WORLD 42

AsyncClient is the same for asyncio. Errors are in `loraplex.errors`. Importing this package loads
nothing: each name brings its module when it is first used.

The examples here and below are run by the tests, against a server with the demo's model and adapters.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex import errors
    from loraplex._async.client import AsyncClient
    from loraplex._async.maps import AsyncGenerationMap
    from loraplex._async.streams import AsyncGenerationBatch, AsyncGenerationStream
    from loraplex._batch import BatchResult
    from loraplex._config import Keepalive, RetryPolicy, Timeouts, TlsConfig
    from loraplex._hooks import CallHook, CallInfo
    from loraplex._options import Conversation, GenerateOptions
    from loraplex._structure import Choice, Grammar, JsonObject, JsonSchema, Regex
    from loraplex._sync.client import Client
    from loraplex._sync.maps import GenerationMap
    from loraplex._sync.streams import GenerationBatch, GenerationStream
    from loraplex._types import (
        AdapterChanges,
        AdapterInfo,
        AdapterState,
        FinishReason,
        Generation,
        GenerationChunk,
        ModelInfo,
        Timing,
        TokenLogprobs,
        TopLogprob,
        Usage,
    )
    from loraplex._version import __version__
    from loraplex.errors import LoraplexError

__all__ = [
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

_HOMES = {
    "_async.client": ("AsyncClient",),
    "_async.maps": ("AsyncGenerationMap",),
    "_async.streams": ("AsyncGenerationBatch", "AsyncGenerationStream"),
    "_batch": ("BatchResult",),
    "_config": ("Keepalive", "RetryPolicy", "Timeouts", "TlsConfig"),
    "_hooks": ("CallHook", "CallInfo"),
    "_options": ("Conversation", "GenerateOptions"),
    "_structure": ("Choice", "Grammar", "JsonObject", "JsonSchema", "Regex"),
    "_sync.client": ("Client",),
    "_sync.maps": ("GenerationMap",),
    "_sync.streams": ("GenerationBatch", "GenerationStream"),
    "_types": (
        "AdapterChanges",
        "AdapterInfo",
        "AdapterState",
        "FinishReason",
        "Generation",
        "GenerationChunk",
        "ModelInfo",
        "Timing",
        "TokenLogprobs",
        "TopLogprob",
        "Usage",
    ),
    "_version": ("__version__",),
    "errors": ("LoraplexError",),
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("loraplex.errors")
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"loraplex.{module}"), name)
            return value
    raise AttributeError(f"module 'loraplex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
