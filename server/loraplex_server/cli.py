"""`loraplex serve`: from the command line to a `ServerConfig`, and to a running server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loraplex_server import settings
from loraplex_server.config import (
    ADAPTER_DEVICE_DTYPES,
    CUDA_GRAPHS,
    DEVICES,
    DTYPES,
    GENERATION_CONFIGS,
    KERNELS,
    KV_CACHE_DTYPES,
    LOG_FORMATS,
    LOG_LEVELS,
    QUANTIZATIONS,
    AdapterConfig,
    ApiConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    TlsFiles,
    parse_size,
)
from loraplex_server.core import log
from loraplex_server.core.errors import InvalidArgumentError, ServerError
from loraplex_server.core.request import MAX_SPECULATIVE_TOKENS

EXIT_USAGE = 2

_DESCRIPTION = """\
Serves one base model and many PEFT adapters over gRPC, and over HTTP for OpenAI's clients. Each request
names its own adapters, or none, and all of them share every batch. Prints one line on stdout when it is
ready; ends in good order on SIGTERM or Ctrl-C, at once on the second."""

_EPILOG = """\
SIZE is bytes, or a number with a unit: 512MiB, 2GB, 1.5g.

  loraplex serve --model ./llama --adapters ./adapters
  loraplex serve --model ./llama --adapters ./adapters --http-port 8000
  loraplex serve --model ./llama --quantization int4 --device cpu --port 0 --metrics-port -1
  loraplex serve --model ./llama --host 0.0.0.0 --token-file tokens \\
      --tls-certificate tls.crt --tls-key tls.key"""


_CONFIG_DESCRIPTION = """\
Shows or checks the configuration that `loraplex serve` would run with, from the same flags, environment and
file. Every flag of `loraplex serve --help` is a setting:

  --max-batch-tokens 512                      on the command line, which beats
  LORAPLEX_SERVE_MAX_BATCH_TOKENS=512         in the environment, which beats
  max_batch_tokens = 512                      in the TOML file of --config (or LORAPLEX_SERVE_CONFIG)

Flags that may be repeated are arrays in the file, and separated by commas in the environment. What is called
like no flag is an error."""

_CONFIG_EPILOG = """\
  loraplex config show --model ./llama > loraplex.toml     every setting with its default, to begin from
  loraplex config check --config loraplex.toml             is it right? exit code 2 says no, and why
  loraplex config show --changed --config loraplex.toml    what differs from the defaults, and why"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; `argv` is what follows `loraplex serve`. Returns the exit code."""
    parser = build_parser()
    try:
        arguments, _ = settings.resolve(parser, sys.argv[1:] if argv is None else argv, os.environ)
        config = to_config(arguments)
    except ServerError as error:
        parser.error(str(error))
    log.configure(config.engine.log.level, config.engine.log.format)
    hide_torch()
    # Here, not above: `--help` should not wait for gRPC and a tokenizer library.
    from loraplex_server.api.app import serve

    return asyncio.run(serve(config))


def config_main(argv: Sequence[str] | None = None) -> int:
    """`loraplex config`: shows or checks what `loraplex serve` would run with; starts nothing."""
    parser = argparse.ArgumentParser(
        prog="loraplex config",
        usage="loraplex config {show,check} [--changed] [flags of loraplex serve]",
        description=_CONFIG_DESCRIPTION,
        epilog=_CONFIG_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("show", "check"))
    parser.add_argument("--changed", action="store_true", help="show only what is not the default")
    own, flags = parser.parse_known_args(argv)
    serve = build_parser()
    serve.prog, serve.usage = parser.prog, parser.usage
    try:
        arguments, origins = settings.resolve(serve, flags, os.environ)
        to_config(arguments)
    except ServerError as error:
        serve.error(str(error))
    if own.action == "show":
        print(settings.to_toml(arguments, origins, all_values=not own.changed))
    else:
        print("the configuration is right")
    return 0


def hide_torch() -> None:
    """Keeps torch out of this process, which of transformers needs the tokenizers alone.

    That is 330 MB and seconds of start less. The engine, in its own process, is not concerned.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def build_parser() -> argparse.ArgumentParser:
    """Every option with its help and its default, which is the configuration's own."""
    model, scheduler = ModelConfig(model=""), SchedulerConfig()
    adapters, api, logs = AdapterConfig(), ApiConfig(), LogConfig()
    parser = argparse.ArgumentParser(
        prog="loraplex serve",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    settings.add_config_flag(parser)

    group = parser.add_argument_group("base model")
    group.add_argument("--model", required=True, metavar="PATH|HUB_ID", help="a Hugging Face checkpoint")
    _choice(group, "--quantization", QUANTIZATIONS, model.quantization, "type of the resident weights")
    group.add_argument(
        "--double-quant",
        action="store_true",
        help="quantise the scales of nf4 as well, which saves 0.4 bits a weight",
    )
    _choice(group, "--device", DEVICES, model.device, "where to compute; auto is cuda where there is one")
    _choice(group, "--dtype", DTYPES, model.dtype, "type of the activations")
    _choice(group, "--kernels", KERNELS, model.kernels, "auto is triton on cuda, torch on cpu")
    _choice(
        group,
        "--generation-config",
        GENERATION_CONFIGS,
        model.generation_config,
        "auto takes the defaults of sampling from the checkpoint's generation_config.json",
    )
    _count(group, "--threads", model.threads, "CPU threads of the engine; 0 is all cores but one")
    _choice(
        group,
        "--cuda-graphs",
        CUDA_GRAPHS,
        model.cuda_graphs,
        "record decode steps at start and replay them; auto is where the device can, on is that or no start",
    )
    group.add_argument(
        "--cuda-graph-sizes",
        type=_counts,
        default=model.cuda_graph_sizes,
        metavar="N,N,...",
        help="numbers of requests to record decode steps for (default: up to --max-num-requests)",
    )

    group = parser.add_argument_group("batching")
    _count(group, "--max-batch-tokens", scheduler.max_batch_tokens, "tokens computed in one step")
    _count(group, "--max-num-requests", scheduler.max_num_requests, "requests running at once")
    _count(
        group,
        "--max-scored-tokens",
        scheduler.max_scored_tokens,
        "tokens of prompts that get log-probabilities in one step",
    )
    _count(group, "--max-queue", scheduler.max_queue, "requests that may wait; more are refused")
    _count(
        group,
        "--max-model-len",
        scheduler.max_model_len,
        "tokens of prompt and answer together; 0 is the model's own limit",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=scheduler.gpu_memory_utilization,
        metavar="F",
        help="share of the GPU's memory for weights, steps, adapters and the KV cache, and for whatever else "
        "is on it (default: %(default)g)",
    )
    _size(
        group,
        "--kv-cache-bytes",
        scheduler.kv_cache_bytes,
        "memory of the KV cache; 0 takes what is left on a GPU, what is needed on a CPU",
    )
    _choice(
        group,
        "--kv-cache-dtype",
        KV_CACHE_DTYPES,
        scheduler.kv_cache_dtype,
        "type of the KV cache; auto is that of the activations, fp8 saves room and is less exact",
    )
    _count(group, "--kv-block-size", scheduler.kv_block_size, "tokens in a block of the KV cache")
    _choice(
        group,
        "--prefix-cache",
        ("on", "off"),
        "on" if scheduler.prefix_cache else "off",
        "keep the KV of prompts and answers, as room allows, for requests that begin alike",
    )
    _count(
        group,
        "--speculative-tokens",
        scheduler.speculative_tokens,
        f"tokens guessed in a step from a request's own text, where it does not say; 0 to "
        f"{MAX_SPECULATIVE_TOKENS}. Answers are the same",
    )
    group.add_argument(
        "--speculation-max-load",
        type=float,
        default=scheduler.speculation_max_load,
        metavar="F",
        help="share of --max-num-requests beyond which running requests get no guesses; 0 is never any "
        "(default: %(default)g)",
    )
    _seconds(
        group,
        "--max-adapter-wait",
        scheduler.max_adapter_wait_s,
        "for a request that has waited so long for room on the device, adapters in use are freed one by one",
    )
    _count(
        group,
        "--fair-quantum",
        scheduler.fair_quantum,
        "tokens of a tenant, and of an adapter within it, before it is the next one's turn",
    )
    _seconds(
        group,
        "--fair-aging",
        scheduler.fair_aging_s,
        "waiting time that counts as much as a quantum not given: more is fairer, less nearer to first come "
        "first served",
    )

    group = parser.add_argument_group("adapters")
    _folders(group, "--adapters", "each folder in DIR with an adapter_config.json is an adapter of that name")
    _folders(group, "--adapter-root", "adapters may be loaded from under DIR at run time")
    _size(group, "--adapter-device-bytes", adapters.device_bytes, "room for adapters on the device")
    _choice(
        group,
        "--adapter-device-dtype",
        ADAPTER_DEVICE_DTYPES,
        adapters.device_dtype,
        "type of adapters on the device; auto is that of the activations, int8 saves room and is less exact",
    )
    _size(group, "--adapter-host-bytes", adapters.host_bytes, "room for adapters in host memory")
    _size(
        group,
        "--adapter-max-bytes",
        adapters.max_bytes,
        "most of either that one adapter may take, with whole weights or tables of its own; 0 is no limit",
    )
    _count(
        group,
        "--max-adapters-on-device",
        adapters.max_on_device,
        "a cap on their number beyond the bytes; 0 is none",
    )
    _count(
        group,
        "--max-pinned-adapters",
        adapters.max_pinned,
        "a cap on pinned ones beyond being fewer than the slots; 0 is none",
    )
    _count(
        group,
        "--max-adapters-per-request",
        adapters.max_per_request,
        "most adapters that one request may name",
    )
    group.add_argument(
        "--watch-adapters",
        type=float,
        default=adapters.watch_s,
        metavar="S",
        help="every S seconds, follow what came to, changed in and went from --adapters (default: 0, never)",
    )

    group = parser.add_argument_group("adapters from elsewhere")
    _texts(
        group,
        "--adapter-source",
        "PREFIX",
        "adapters may be downloaded from under PREFIX: s3://, gs://, az://, https:// or hf://",
    )
    group.add_argument(
        "--adapter-cache-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where downloads are kept (default: loraplex/adapters in the user's cache folder)",
    )
    _size(group, "--adapter-cache-bytes", adapters.cache_bytes, "room for downloads")
    _size(
        group, "--adapter-download-max-bytes", adapters.download_max_bytes, "most that one adapter may have"
    )
    _count(group, "--max-adapter-downloads", adapters.max_downloads, "downloads that run at once")
    group.add_argument(
        "--require-adapter-commit",
        action="store_true",
        help="adapters from the Hugging Face hub must name a commit, not a branch or tag",
    )
    _texts(
        group,
        "--adapter-extra-file",
        "NAME",
        "a small text file that is downloaded along with an adapter that has it: chat_template.jinja, "
        "tokenizer.json",
    )

    group = parser.add_argument_group("adapters that clients send")
    group.add_argument(
        "--allow-uploads", action="store_true", help="clients may send adapters, which the cache keeps"
    )
    _size(group, "--upload-max-bytes", adapters.upload_max_bytes, "most that one of them may have")
    _count(group, "--max-uploads", adapters.max_uploads, "how many are received at once")
    _count(group, "--max-uploaded-adapters", adapters.max_uploaded, "how many may be registered")

    group = parser.add_argument_group("serving")
    group.add_argument("--host", default=api.host, help=f"address to listen on (default: {api.host})")
    _count(group, "--port", api.port, "gRPC port; 0 picks a free one")
    _count(
        group,
        "--http-port",
        api.http_port,
        "port of the OpenAI-compatible API; 0 picks a free one, -1 is none",
    )
    group.add_argument(
        "--model-name",
        default=api.model_name,
        metavar="NAME",
        help="what HTTP callers name the base model (default: the last part of its folder, or its hub id)",
    )
    group.add_argument(
        "--metrics-host",
        default=api.metrics_host,
        help=f"address of the metrics (default: {api.metrics_host})",
    )
    _count(
        group, "--metrics-port", api.metrics_port, "of Prometheus and a page; 0 picks a free one, -1 is none"
    )
    _size(group, "--max-message-bytes", api.max_message_bytes, "longest gRPC message or HTTP body")
    _count(
        group,
        "--max-tokens-per-message",
        api.max_tokens_per_message,
        "tokens that may come in one message while a client is behind; 1 never joins them",
    )
    _count(
        group,
        "--max-unread-tokens",
        api.max_unread_tokens,
        "where more tokens wait for a client that reads too slowly, its call ends with RESOURCE_EXHAUSTED",
    )
    _seconds(
        group,
        "--stall-seconds",
        api.stall_s,
        "a stream that its client has not read for so long ends with RESOURCE_EXHAUSTED; 0 is never",
    )
    _seconds(
        group,
        "--keepalive",
        api.keepalive_s,
        "a connection silent for so long is asked whether its client is there",
    )
    _seconds(
        group,
        "--keepalive-timeout",
        api.keepalive_timeout_s,
        "one that does not answer in so long is closed, and its calls are cancelled",
    )
    _seconds(group, "--drain-seconds", api.drain_s, "time that running calls have after SIGTERM")
    _seconds(
        group,
        "--max-connection-age",
        api.max_connection_age_s,
        "connections older than this are asked to come anew, calls under way go on; 0 is never",
    )
    _count(
        group,
        "--max-engine-restarts",
        api.max_engine_restarts,
        "how often in ten minutes an engine that died is started again; then the server ends",
    )
    group.add_argument("--no-reflection", action="store_true", help="clients may not list the services")
    group.add_argument(
        "--otlp-endpoint",
        default=api.otlp_endpoint,
        metavar="URL",
        help="send traces to the OpenTelemetry collector there (gRPC), http://127.0.0.1:4317 for one on this "
        "machine; needs loraplex[tracing] (default: none)",
    )
    _choice(group, "--log-level", LOG_LEVELS, logs.level, "least severe lines of the log on stderr")
    _choice(group, "--log-format", LOG_FORMATS, logs.format, "json is one object a line, for collectors")

    group = parser.add_argument_group("who may call")
    _file(group, "--tls-certificate", "PEM certificate chain of this server; read again when it changes")
    _file(group, "--tls-key", "its PEM key, without a password")
    _file(group, "--tls-client-ca", "clients need a certificate that an authority in this PEM file signed")
    _file(
        group,
        "--token-file",
        "clients need a bearer token whose hash is in this file (see loraplex token --help); read again when "
        "it changes",
    )
    group.add_argument(
        "--allow-insecure",
        action="store_true",
        help="listen without TLS on an address that other machines reach",
    )
    return parser


def to_config(arguments: argparse.Namespace) -> ServerConfig:
    """The configuration that parsed arguments describe.

    Raises:
        InvalidArgumentError: a value is out of range.
    """
    return ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(
                model=arguments.model,
                quantization=arguments.quantization,
                double_quant=arguments.double_quant,
                device=arguments.device,
                dtype=arguments.dtype,
                kernels=arguments.kernels,
                threads=arguments.threads,
                generation_config=arguments.generation_config,
                cuda_graphs=arguments.cuda_graphs,
                cuda_graph_sizes=arguments.cuda_graph_sizes,
            ),
            scheduler=SchedulerConfig(
                max_batch_tokens=arguments.max_batch_tokens,
                max_num_requests=arguments.max_num_requests,
                max_scored_tokens=arguments.max_scored_tokens,
                max_queue=arguments.max_queue,
                max_model_len=arguments.max_model_len,
                kv_cache_bytes=arguments.kv_cache_bytes,
                kv_cache_dtype=arguments.kv_cache_dtype,
                gpu_memory_utilization=arguments.gpu_memory_utilization,
                kv_block_size=arguments.kv_block_size,
                prefix_cache=arguments.prefix_cache == "on",
                speculative_tokens=arguments.speculative_tokens,
                speculation_max_load=arguments.speculation_max_load,
                max_adapter_wait_s=arguments.max_adapter_wait,
                fair_quantum=arguments.fair_quantum,
                fair_aging_s=arguments.fair_aging,
            ),
            adapters=AdapterConfig(
                folders=tuple(arguments.adapters),
                roots=tuple(arguments.adapter_root),
                device_bytes=arguments.adapter_device_bytes,
                device_dtype=arguments.adapter_device_dtype,
                host_bytes=arguments.adapter_host_bytes,
                max_bytes=arguments.adapter_max_bytes,
                max_on_device=arguments.max_adapters_on_device,
                max_pinned=arguments.max_pinned_adapters,
                max_per_request=arguments.max_adapters_per_request,
                sources=tuple(arguments.adapter_source),
                cache_dir=arguments.adapter_cache_dir,
                cache_bytes=arguments.adapter_cache_bytes,
                download_max_bytes=arguments.adapter_download_max_bytes,
                max_downloads=arguments.max_adapter_downloads,
                require_commit=arguments.require_adapter_commit,
                extra_files=tuple(arguments.adapter_extra_file),
                watch_s=arguments.watch_adapters,
                allow_uploads=arguments.allow_uploads,
                upload_max_bytes=arguments.upload_max_bytes,
                max_uploads=arguments.max_uploads,
                max_uploaded=arguments.max_uploaded_adapters,
            ),
            log=LogConfig(arguments.log_level, arguments.log_format),
        ),
        api=ApiConfig(
            host=arguments.host,
            port=arguments.port,
            http_port=arguments.http_port,
            model_name=arguments.model_name,
            metrics_host=arguments.metrics_host,
            metrics_port=arguments.metrics_port,
            drain_s=arguments.drain_seconds,
            max_message_bytes=arguments.max_message_bytes,
            tls=_tls(arguments),
            token_file=arguments.token_file,
            allow_insecure=arguments.allow_insecure,
            reflection=not arguments.no_reflection,
            max_connection_age_s=arguments.max_connection_age,
            max_engine_restarts=arguments.max_engine_restarts,
            otlp_endpoint=arguments.otlp_endpoint,
            max_tokens_per_message=arguments.max_tokens_per_message,
            max_unread_tokens=arguments.max_unread_tokens,
            stall_s=arguments.stall_seconds,
            keepalive_s=arguments.keepalive,
            keepalive_timeout_s=arguments.keepalive_timeout,
        ),
    )


def _tls(arguments: argparse.Namespace) -> TlsFiles | None:
    certificate, key, client_ca = arguments.tls_certificate, arguments.tls_key, arguments.tls_client_ca
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is not None or key is not None or client_ca is not None:
        raise InvalidArgumentError.field("tls", "give both --tls-certificate and --tls-key")
    return None


def _choice(
    group: argparse._ArgumentGroup, flag: str, choices: tuple[str, ...], default: str, help_text: str
) -> None:
    group.add_argument(flag, choices=choices, default=default, help=f"{help_text} (default: {default})")


def _count(group: argparse._ArgumentGroup, flag: str, default: int, help_text: str) -> None:
    group.add_argument(flag, type=int, default=default, metavar="N", help=f"{help_text} (default: {default})")


def _seconds(group: argparse._ArgumentGroup, flag: str, default: float, help_text: str) -> None:
    group.add_argument(
        flag, type=float, default=default, metavar="S", help=f"{help_text} (default: {default:g})"
    )


def _size(group: argparse._ArgumentGroup, flag: str, default: int, help_text: str) -> None:
    shown = f"{default >> 20}MiB" if default else "0"
    group.add_argument(
        flag, type=_parse_size, default=default, metavar="SIZE", help=f"{help_text} (default: {shown})"
    )


def _folders(group: argparse._ArgumentGroup, flag: str, help_text: str) -> None:
    group.add_argument(
        flag, type=_folder, action="append", default=[], metavar="DIR", help=f"{help_text}; may be repeated"
    )


def _file(group: argparse._ArgumentGroup, flag: str, help_text: str) -> None:
    group.add_argument(flag, type=Path, default=None, metavar="FILE", help=help_text)


def _texts(group: argparse._ArgumentGroup, flag: str, metavar: str, help_text: str) -> None:
    group.add_argument(
        flag, action="append", default=[], metavar=metavar, help=f"{help_text}; may be repeated"
    )


def _parse_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; write for example 1,2,4,8"
        ) from error


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


if __name__ == "__main__":
    sys.exit(main())
