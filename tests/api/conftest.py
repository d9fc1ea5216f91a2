"""Tokenizers trained here, as real ones are built; texts that are hard to cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraplex.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from loraplex_server.api.app import serve
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.config import ApiConfig, EngineConfig, ModelConfig, ServerConfig
from loraplex_server.core.adapter_status import AdapterChanges
from loraplex_server.core.errors import ErrorInfo, InternalError, ServerError
from loraplex_server.core.request import Request
from loraplex_server.wire.commands import Answer, AnyCommand, Call, GetChatTemplate, Reply
from loraplex_server.wire.frames import decode_to_engine, encode
from loraplex_server.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    EngineInfo,
    FromEngine,
    Hello,
    Shutdown,
    Submit,
    ToEngine,
    TokenDelta,
    Tokens,
    UnwatchAdapters,
    WatchAdapters,
    Welcome,
)

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "SELECT name FROM users WHERE age > 30 ORDER BY name; -- it's only a query",
    "Zoë's naïve café: déjà vu, über, señor, façade. Grüße aus Köln!",
    "def f(x):\n    return x * 2  # two spaces  and\ttabs\n",
    "你好 世界 今天天气很好",
    "hello hello world world world the the the of of and and",
]
_SPECIAL = ["<s>", "</s>", "<unk>"]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_PIECES = [
    *(
        "the quick  brown",
        " fox",
        "x",
        "\n",
        "\t ",
        "  ",
        "don't",
        "1234",
        "café",
        "naïve",
        "e\u0301",
        "n\u0303o",
    ),
    *(
        "你好",
        "世界",
        "龘",
        "日本語テキスト",
        "한국어",
        "привет",
        "עברית",
        "€",
        "\U0001d4b3",
        "🙂",
        "🇩🇪",
        "\u200d",
    ),
    *("👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈"),
]


def _byte_level() -> Any:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace_bpe() -> Any:
    """As Llama 2 and Mistral: spaces are U+2581, one before the text; bytes for what is not known."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = RawTokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(_CORPUS * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in _BYTES:
        vocabulary[byte] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizer
    raw.add_special_tokens(_SPECIAL)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace_unigram() -> Any:
    """As T5 and Gemma: a unigram model, the metaspace pre-tokenizer, bytes for what is not known."""
    trained = RawTokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(_CORPUS * 4, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [(byte, -20.0) for byte in _BYTES]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    raw.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session", params=["byte_level_bpe", "metaspace_bpe", "metaspace_unigram"])
def hf_tokenizer(request: pytest.FixtureRequest) -> Any:
    """A transformers tokenizer of each family that models use."""
    build = {
        "byte_level_bpe": _byte_level,
        "metaspace_bpe": _metaspace_bpe,
        "metaspace_unigram": _metaspace_unigram,
    }
    return build[request.param]()


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer: Any) -> Tokenizer:
    return Tokenizer(hf_tokenizer)


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Any:
    return _byte_level()


@pytest.fixture(scope="session")
def random_text() -> Callable[[random.Random], str]:
    """Draws a text of words, code, CJK, combining marks and joined emoji."""

    def draw(rng: random.Random) -> str:
        return "".join(rng.choice(_PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, 25)))

    return draw


@pytest.fixture(scope="session")
def checkpoint(byte_level_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of a checkpoint that the API reads: its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    byte_level_tokenizer.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ("system", "user", "assistant") %}
{{ raise_exception("who is " + message.role + "?") }}
{% endif %}<{{ message.role }}>{{ message.content | trim }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def chat_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "parrot"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


Script = Callable[["ScriptedEngine", Request], Awaitable[None]]


def no_adapters(command: AnyCommand) -> Answer:
    """The report of an engine without adapters, or with adapters that bring no tokenizer."""
    return "" if isinstance(command, GetChatTemplate) else ()


class ScriptedEngine:
    """Speaks the engine's protocol on a real socket; what it answers to a request is a test's to script.

    Also the handle that `serve` gets from launching it. Lives in the event loop of the test.
    """

    token = "secret"

    def __init__(self, socket_path: str, info: EngineInfo) -> None:
        self.socket_path = socket_path
        self.info = info
        self.script: Script = ScriptedEngine.never
        self.adapters: Callable[[AnyCommand], Answer | ErrorInfo] = no_adapters
        self.watched = AdapterChanges((), all=True)
        self.unwatched = False
        self.start_error: ServerError | None = None
        self.may_be_ready = threading.Event()
        self.may_be_ready.set()
        self.ended = threading.Event()
        self.launched = False
        self.terminated = False
        self.got_shutdown = False
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self._changed = asyncio.Condition()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ScriptedEngine:
        self._server = await asyncio.start_unix_server(self._talk, self.socket_path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def die(self) -> None:
        """Closes every connection, as a killed process does."""
        self._server.close()
        for writer in self._writers:
            writer.close()

    # What `serve` sees

    def launch(self, config: EngineConfig) -> ScriptedEngine:
        self.launched = True
        return self

    def wait_ready(self) -> None:
        self.may_be_ready.wait()
        if self.terminated:
            raise InternalError("the engine died while starting")
        if self.start_error is not None:
            raise self.start_error

    def join(self, timeout_s: float) -> bool:
        return self.ended.wait(timeout_s)

    def terminate(self) -> None:
        self.terminated = True
        self.may_be_ready.set()
        self.ended.set()

    # What a script sees

    def send(self, message: FromEngine) -> None:
        for writer in self._writers:
            writer.write(encode(message))

    def tokens(self, request: Request, *token_ids: int, **fields: Any) -> None:
        """One step's tokens of a request."""
        self.send(Tokens((TokenDelta(request.request_id, token_ids, **fields),)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what arrives from the API to make `condition` true."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), 10)

    async def never(self, request: Request) -> None:
        """A script that answers nothing."""

    # The protocol

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                await self._take(decode_to_engine(await reader.readexactly(length)), writer)
                async with self._changed:
                    self._changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _take(self, message: ToEngine, writer: asyncio.StreamWriter) -> None:
        match message:
            case Hello():
                assert message.token == self.token
                writer.write(encode(Welcome(PROTOCOL_VERSION, self.info)))
                self._writers.append(writer)
            case Submit():
                self.submitted.append(message.request)
                task = asyncio.create_task(self.script(self, message.request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Cancel():
                self.cancelled.append(message.request_id)
            case Call():
                answer = self.adapters(message.command)
                if isinstance(answer, ErrorInfo):
                    writer.write(encode(Reply(message.call_id, error=answer)))
                else:
                    writer.write(encode(Reply(message.call_id, answer)))
            case WatchAdapters():
                writer.write(encode(self.watched))
            case UnwatchAdapters():
                self.unwatched = True
            case Shutdown():
                self.got_shutdown = True
                self.ended.set()


class Serving:
    """A server that runs in this event loop, and a channel to it."""

    def __init__(
        self,
        engine: ScriptedEngine,
        task: asyncio.Task[int],
        grpc_at: str,
        metrics_at: str,
        http_at: str | None,
    ) -> None:
        self.engine = engine
        self.task = task
        self.grpc_at = grpc_at
        self.metrics_at = metrics_at
        self.http_at = http_at
        self.channel = grpc.aio.insecure_channel(grpc_at)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def scrape(self) -> dict[str, float]:
        """Samples of the metrics port as Prometheus reads them, by `name{label=value,...}`."""

        def get() -> str:
            with urllib.request.urlopen(f"http://{self.metrics_at}/metrics", timeout=10) as response:
                return str(response.read().decode())

        samples = {}
        for family in text_string_to_metric_families(await asyncio.to_thread(get)):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples


@pytest.fixture
def engine_info(byte_level_tokenizer: Any) -> EngineInfo:
    return EngineInfo(
        model="tiny",
        architecture="LlamaForCausalLM",
        quantization="nf4",
        dtype="float32",
        device="cpu",
        kernels="torch",
        vocab_size=len(byte_level_tokenizer) + 12,
        max_model_len=256,
        parameters=1_600_000,
        weight_bytes=900_000,
        weight_checksum="ab" * 32,
        max_batch_tokens=512,
        max_num_requests=64,
        kv_block_size=16,
        kv_blocks=100,
        adapter_device_bytes=1 << 20,
        adapter_host_bytes=1 << 22,
        max_adapters_on_device=3,
        adapter_slots=3,
        eos_token_ids=(1,),
    )


@pytest.fixture
def new_engine(engine_info: EngineInfo, tmp_path: Path) -> Callable[[], ScriptedEngine]:
    # A unix socket's path is short; pytest's folders may be long.
    folder = tempfile.TemporaryDirectory(prefix="loraplex-")
    yield lambda: ScriptedEngine(f"{folder.name}/engine.sock", engine_info)
    folder.cleanup()


@pytest.fixture
def _signal_handlers() -> Iterator[None]:
    """`serve` leaves the signals that end it ignored: put pytest's handlers back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def start_server(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], _signal_handlers: None
) -> Callable[..., tuple[asyncio.Task[int], Callable[[], Awaitable[re.Match[str]]]]]:
    """Starts `serve` on free ports with a given engine; gives its task, and a wait for its ready line."""

    def start(engine: ScriptedEngine, model: Path = checkpoint, launch: Any = None, **api: Any) -> Any:
        config = ServerConfig(
            EngineConfig(ModelConfig(model=str(model))),
            ApiConfig(**{"port": 0, "metrics_port": -1, **api}),
        )
        task = asyncio.create_task(serve(config, launch or engine.launch))

        async def ready() -> re.Match[str]:
            out = ""
            while not out.endswith("\n"):
                assert not task.done(), task.result()
                await asyncio.sleep(0.01)
                out += capsys.readouterr().out
            match = re.fullmatch(
                r"loraplex ready grpc=(127\.0\.0\.1:\d+) metrics=(127\.0\.0\.1:\d+|off)"
                r"(?: http=(127\.0\.0\.1:\d+))?\n",
                out,
            )
            assert match is not None, out
            return match

        return task, ready

    return start


@pytest.fixture
def serving(
    new_engine: Callable[[], ScriptedEngine], start_server: Callable[..., Any]
) -> Callable[..., contextlib.AbstractAsyncContextManager[Serving]]:
    """`async with serving(script) as server:` runs a whole server, which is ended by SIGTERM."""

    @contextlib.asynccontextmanager
    async def run(script: Script = ScriptedEngine.never, **api: Any) -> AsyncIterator[Serving]:
        async with new_engine() as engine:
            engine.script = script
            task, ready = start_server(engine, **api)
            match = await ready()
            server = Serving(engine, task, match[1], match[2], match[3])
            try:
                yield server
            finally:
                await server.channel.close()
                if not task.done():
                    os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(task, 10)

    return run
