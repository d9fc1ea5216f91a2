"""What the server is told to be: frozen, complete and validated before anything is built."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from pathlib import Path

from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.core.request import MAX_SPECULATIVE_TOKENS
from loraplex_server.core.source_uri import AllowedSources

QUANTIZATIONS = ("nf4", "int4", "none")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
GENERATION_CONFIGS = ("auto", "none")
KERNELS = ("auto", "torch", "triton")
CUDA_GRAPHS = ("auto", "on", "off")
KV_CACHE_DTYPES = ("auto", "fp8")
ADAPTER_DEVICE_DTYPES = ("auto", "int8")

# gRPC counts milliseconds in 32 bits.
_MAX_KEEPALIVE_S = 2_000_000

_ENDPOINT = re.compile(r"https?://[^\s/@]+/?")
_EXTRA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(json|jinja|txt)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "2GB", "1.5g" or "1048576". A bare k, m, g or t is a power of 1024.

    Raises:
        ValueError: `text` is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 512MiB, 2GB or 1048576")
    number, unit, binary = match.groups()
    base = 1000 if unit and not binary and text.strip().lower().endswith("b") else 1024
    return int(float(number) * base ** " kmgt".index(unit.lower() or " "))


def is_loopback(host: str) -> bool:
    """Whether `host` surely is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError.field(field, f"{value!r} is none of {', '.join(allowed)}")


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidArgumentError.field(field, f"{value} is less than {least}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model.

    Attributes:
        model: a folder with a Hugging Face checkpoint, or a hub id.
        double_quant: quantise the scales of nf4 as well.
        threads: CPU threads of the engine; 0 is all cores but one.
        generation_config: whether the checkpoint's generation_config.json has the defaults of sampling.
        cuda_graphs: whether decode steps are recorded at start and replayed: "auto" where the Triton kernels
            run on CUDA, "on" or not at all, also under Triton's interpreter.
        cuda_graph_sizes: numbers of requests to record them for; none leaves the choice open.
    """

    model: str
    quantization: str = "nf4"
    double_quant: bool = False
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    threads: int = 0
    generation_config: str = "auto"
    cuda_graphs: str = "auto"
    cuda_graph_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kernels", self.kernels, KERNELS)
        _at_least("threads", self.threads, 0)
        _one_of("generation_config", self.generation_config, GENERATION_CONFIGS)
        _one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        for size in self.cuda_graph_sizes:
            _at_least("cuda_graph_sizes", size, 1)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, of the queue, and of the KV cache.

    Attributes:
        max_batch_tokens: tokens computed in one step, prefill and decode together.
        max_num_requests: requests running at once.
        max_scored_tokens: tokens of prompts whose log-probabilities are computed in one step: each takes a
            row of logits as wide as the vocabulary. Prompts that ask for them are computed in smaller chunks.
        max_queue: requests that may wait; more are refused with RESOURCE_EXHAUSTED.
        max_model_len: prompt and answer together; 0 takes the model's own limit.
        kv_cache_bytes: 0 takes all that is left on a GPU, and on a CPU what `max_num_requests` of moderate
            length need, within reason.
        kv_cache_dtype: "auto" is the type of the activations, "fp8" (e4m3) takes less room and is less exact.
        gpu_memory_utilization: share of the GPU's memory that may be used, whatever else is on it included.
        prefix_cache: keep keys and values of answered requests for others that begin alike.
        max_adapter_wait_s: for a request that has waited this long for room on the device, an adapter in use
            gets no new requests until it can be evicted; the longer the wait, the more adapters.
        fair_quantum: tokens that a tenant, and an adapter within it, gets before it is the next one's turn.
        fair_aging_s: waiting time that counts as much as a quantum not given.
        speculative_tokens: most tokens guessed in a step for a request that does not say.
        speculation_max_load: share of `max_num_requests` beyond which running requests get no guesses.
    """

    max_batch_tokens: int = 512
    max_num_requests: int = 64
    max_scored_tokens: int = 128
    max_queue: int = 1024
    max_model_len: int = 0
    kv_cache_bytes: int = 0
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_block_size: int = 16
    prefix_cache: bool = True
    max_adapter_wait_s: float = 5.0
    fair_quantum: int = 512
    fair_aging_s: float = 5.0
    speculative_tokens: int = 0
    speculation_max_load: float = 0.5

    def __post_init__(self) -> None:
        _at_least("max_batch_tokens", self.max_batch_tokens, 1)
        _at_least("max_num_requests", self.max_num_requests, 1)
        _at_least("max_scored_tokens", self.max_scored_tokens, 1)
        _at_least("max_queue", self.max_queue, 1)
        _at_least("max_model_len", self.max_model_len, 0)
        _at_least("kv_cache_bytes", self.kv_cache_bytes, 0)
        _at_least("kv_block_size", self.kv_block_size, 1)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidArgumentError.field(
                "gpu_memory_utilization", f"{self.gpu_memory_utilization} is no share above 0 and up to 1"
            )
        _at_least("fair_quantum", self.fair_quantum, 1)
        if not 0 < self.fair_aging_s < math.inf:
            raise InvalidArgumentError.field("fair_aging_s", f"{self.fair_aging_s} is no positive number")
        if not 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise InvalidArgumentError.field(
                "speculative_tokens", f"{self.speculative_tokens} is none of 0 to {MAX_SPECULATIVE_TOKENS}"
            )
        if not 0 <= self.speculation_max_load <= 1:
            raise InvalidArgumentError.field(
                "speculation_max_load", f"{self.speculation_max_load} is no share from 0 to 1"
            )

    @property
    def max_samples(self) -> int:
        """Most rows of a step after which a token is sampled."""
        return min(self.max_num_requests, self.max_batch_tokens)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The adapter cache.

    Attributes:
        folders: each folder in them that holds an `adapter_config.json` is registered at start.
        roots: folders from which adapters may be loaded at run time, beside `folders`.
        device_bytes: room for adapters on the device.
        device_dtype: what adapters are held in on the device and in host memory: "auto" is the type of the
            activations, "int8" takes less room and is less exact.
        host_bytes: room for adapters in host memory.
        max_on_device: a cap on their number beyond the bytes; 0 is none.
        max_pinned: most adapters pinned at once; 0 is one fewer than the slots, which is the most.
        max_per_request: most adapters that one request may name.
        sources: prefixes of addresses from which adapters may be downloaded; none, and none are.
        cache_dir: where downloads are kept; None is the user's cache folder.
        cache_bytes: room for them there.
        max_bytes: most that one adapter may take on the device, or in host memory; 0 is no limit but theirs.
        download_max_bytes: most that one adapter may have.
        max_downloads: how many run at once.
        require_commit: adapters from the Hugging Face hub must name a commit.
        extra_files: names of text files that come along with an adapter if it has them.
        watch_s: seconds between looks for changes in `folders`; 0 is never.
        allow_uploads: clients may send adapters.
        upload_max_bytes: most that one of those may have.
        max_uploads: how many are received at once.
        max_uploaded: how many may be registered.
    """

    folders: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()
    device_bytes: int = 256 << 20
    host_bytes: int = 1 << 30
    max_on_device: int = 0
    max_pinned: int = 0
    max_per_request: int = 8
    device_dtype: str = "auto"
    sources: tuple[str, ...] = ()
    cache_dir: Path | None = None
    cache_bytes: int = 16 << 30
    max_bytes: int = 0
    download_max_bytes: int = 4 << 30
    max_downloads: int = 4
    require_commit: bool = False
    extra_files: tuple[str, ...] = ()
    watch_s: float = 0.0
    allow_uploads: bool = False
    upload_max_bytes: int = 1 << 30
    max_uploads: int = 4
    max_uploaded: int = 256

    def __post_init__(self) -> None:
        _one_of("device_dtype", self.device_dtype, ADAPTER_DEVICE_DTYPES)
        _at_least("device_bytes", self.device_bytes, 1)
        _at_least("host_bytes", self.host_bytes, 1)
        _at_least("max_on_device", self.max_on_device, 0)
        _at_least("max_pinned", self.max_pinned, 0)
        _at_least("max_per_request", self.max_per_request, 1)
        _at_least("cache_bytes", self.cache_bytes, 1)
        _at_least("max_bytes", self.max_bytes, 0)
        _at_least("download_max_bytes", self.download_max_bytes, 1)
        _at_least("max_downloads", self.max_downloads, 1)
        _at_least("upload_max_bytes", self.upload_max_bytes, 1)
        _at_least("max_uploads", self.max_uploads, 1)
        _at_least("max_uploaded", self.max_uploaded, 1)
        if not 0 <= self.watch_s < math.inf:
            raise InvalidArgumentError.field("watch_s", f"{self.watch_s} is no number of seconds")
        AllowedSources(self.sources)
        for name in self.extra_files:
            if _EXTRA_FILE.fullmatch(name) is None or name.startswith("adapter_"):
                raise InvalidArgumentError.field(
                    "extra_files", f"{name!r} is no name of a .json, .jinja or .txt file beside the adapter's"
                )

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Every folder under which an adapter's source may lie."""
        return self.folders + self.roots


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files of both ports. With `client_ca`, clients need a certificate that one of it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Where the server listens, and for whom.

    Attributes:
        port: of gRPC; 0 picks a free one.
        http_port: of the OpenAI-compatible API; 0 picks a free one, -1 is none.
        model_name: what HTTP callers name the base model; "" is the last part of its folder, or its hub id.
        metrics_host: the metrics are plain HTTP and ask no one who they are.
        metrics_port: 0 picks a free one, -1 is no metrics.
        tls: None is plain text, which only loopback addresses may have, or who sets `allow_insecure`.
        token_file: bearer tokens, see `api.authentication`; None asks for none.
        reflection: clients may list the services and their messages.
        max_engine_restarts: how often in ten minutes an engine that died is started again; once more, and the
            server ends.
        max_connection_age_s: connections older than this are asked to come anew, so that load balancers can
            spread them; calls under way go on. 0 is never.
        otlp_endpoint: URL of a collector's OTLP port for gRPC; "" traces nothing.
        max_tokens_per_message: while a client is behind, so many tokens may come in one message.
        max_unread_tokens: where more tokens than this wait for a client that reads too slowly, its call ends.
        stall_s: a stream that has not been read for so long ends; 0 is never.
        keepalive_s: a connection that has been silent for so long is asked whether its client is there.
        keepalive_timeout_s: one that does not answer in so long is closed, and its calls are cancelled.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int = -1
    model_name: str = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9400
    drain_s: float = 30.0
    max_message_bytes: int = 16 << 20
    tls: TlsFiles | None = None
    token_file: Path | None = None
    allow_insecure: bool = False
    reflection: bool = True
    max_connection_age_s: float = 0.0
    max_engine_restarts: int = 3
    otlp_endpoint: str = ""
    max_tokens_per_message: int = 256
    max_unread_tokens: int = 4096
    stall_s: float = 60.0
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        _at_least("port", self.port, 0)
        _at_least("http_port", self.http_port, -1)
        _at_least("metrics_port", self.metrics_port, -1)
        _at_least("max_engine_restarts", self.max_engine_restarts, 0)
        _at_least("max_tokens_per_message", self.max_tokens_per_message, 1)
        _at_least("max_unread_tokens", self.max_unread_tokens, 1)
        if not 0 <= self.stall_s < math.inf:
            raise InvalidArgumentError.field("stall_seconds", f"{self.stall_s} is no number of seconds")
        for field, value in (
            ("keepalive", self.keepalive_s),
            ("keepalive_timeout", self.keepalive_timeout_s),
        ):
            if not 0 < value < _MAX_KEEPALIVE_S:
                raise InvalidArgumentError.field(
                    field, f"{value} is no number of seconds above 0 and below {_MAX_KEEPALIVE_S}"
                )
        if not 0 <= self.max_connection_age_s < math.inf:
            raise InvalidArgumentError.field(
                "max_connection_age", f"{self.max_connection_age_s} is no number of seconds"
            )
        if self.otlp_endpoint and _ENDPOINT.fullmatch(self.otlp_endpoint) is None:
            raise InvalidArgumentError.field(
                "otlp_endpoint", f"{self.otlp_endpoint!r} is no URL such as http://127.0.0.1:4317"
            )
        if self.tls is None and not self.allow_insecure and not is_loopback(self.host):
            raise InvalidArgumentError.field(
                "host",
                f"{self.host} is no loopback address, and calls would not be encrypted; give "
                "--tls-certificate and --tls-key, or --allow-insecure where the network itself is trusted",
            )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The log on stderr, of the server and its engine alike."""

    level: str = "info"
    format: str = "text"

    def __post_init__(self) -> None:
        _one_of("log_level", self.level, LOG_LEVELS)
        _one_of("log_format", self.format, LOG_FORMATS)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """All that the engine process needs to know."""

    model: ModelConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    adapters: AdapterConfig = AdapterConfig()
    log: LogConfig = LogConfig()


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    engine: EngineConfig
    api: ApiConfig = ApiConfig()
