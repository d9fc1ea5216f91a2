"""The commands of the shell that ask a server, and `token` and `version`. Each returns an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex import errors
from loraplex.cli.output import (
    print_adapters,
    print_progress,
    print_stats,
    print_stream,
    print_table,
    state_text,
)

if TYPE_CHECKING:
    from loraplex import AdapterInfo, Client, GenerateOptions
    from loraplex._structure import Structure

AdapterAction = Callable[["Client", argparse.Namespace], "AdapterInfo | list[AdapterInfo]"]
"""One call about adapters; the adapters of its answer are shown."""


def connect(args: argparse.Namespace) -> Client:
    from loraplex import Client, TlsConfig  # here, so that --help does not wait for grpc

    own = (args.tls_ca, args.tls_cert, args.tls_key, args.tls_server_name)
    return Client(
        args.server,
        token=args.token or None,
        tls=TlsConfig(*own) if any(own) else args.tls,
        timeout=args.timeout,
        allow_insecure_token=args.allow_insecure_token,
    )


def generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.system is not None and not args.chat:
        raise errors.InvalidRequestError.for_field("--system", "goes with --chat")
    options = _options(args)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    with (
        connect(args) as client,
        client.stream_chat(messages, **options) if args.chat else client.stream(prompt, **options) as stream,
    ):
        if args.json:
            print(json.dumps(dataclasses.asdict(stream.collect()), ensure_ascii=False))
            return 0
        last = print_stream(stream)
    if args.stats and last is not None:
        print_stats(last)
    return 0


def _options(args: argparse.Namespace) -> GenerateOptions:
    return {
        "adapters": args.adapter,
        "max_tokens": args.max_tokens,
        "min_tokens": args.min_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "bad_words": args.bad_word,
        "seed": args.seed,
        "stop": args.stop,
        "include_stop": args.include_stop,
        "ignore_eos": args.ignore_eos,
        "n": args.n,
        "echo": args.echo,
        "logprobs": args.logprobs,
        "prompt_logprobs": args.prompt_logprobs,
        "priority": args.priority,
        "structure": _structure(args),
        "speculative_tokens": args.speculative_tokens,
    }


def _structure(args: argparse.Namespace) -> Structure | None:
    from loraplex import Choice, Grammar, JsonObject, JsonSchema, Regex

    if args.json_schema is not None:
        return JsonSchema(_text_of("--json-schema", args.json_schema))
    if args.grammar is not None:
        return Grammar(_text_of("--grammar", args.grammar))
    if args.regex is not None:
        return Regex(args.regex)
    if args.choice is not None:
        return Choice(args.choice)
    return JsonObject() if args.json_object else None


def _text_of(flag: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidRequestError.for_field(flag, f"{file} cannot be read: {error}") from error


def manage_adapters(action: AdapterAction, args: argparse.Namespace) -> int:
    """Runs one of the actions below and shows the adapters that it answers with."""
    with connect(args) as client:
        found = action(client, args)
    if args.json:
        print(json.dumps(_plain(found)))
    else:
        print_adapters(found if isinstance(found, list) else [found])
    return 0


def _plain(found: AdapterInfo | list[AdapterInfo]) -> object:
    if isinstance(found, list):
        return [dataclasses.asdict(adapter) for adapter in found]
    return dataclasses.asdict(found)


def list_(client: Client, args: argparse.Namespace) -> list[AdapterInfo]:
    return client.adapters.list()


def get(client: Client, args: argparse.Namespace) -> AdapterInfo:
    return client.adapters.get(args.name)


def load(client: Client, args: argparse.Namespace) -> AdapterInfo:
    source = _seen_from_the_server(args.source, client.server)
    return client.adapters.load(args.name, source, load_inplace=args.load_inplace)


def _seen_from_the_server(source: str, server: str) -> str:
    """A path to a folder of this machine as an absolute one, for a server here that runs in another folder.

    Other sources are the server's to find: a name under its own roots, on the hub, in a store.
    """
    from loraplex._channel import is_local

    is_path = "/" in source and os.path.isdir(source)
    return os.path.abspath(source) if is_path and is_local(server) else source


def compose(client: Client, args: argparse.Namespace) -> AdapterInfo:
    return client.adapters.register_composition(
        args.name,
        args.type,
        args.member,
        density=args.density,
        majority_sign=args.majority_sign,
        svd_rank=args.svd_rank,
        seed=args.seed,
        load_inplace=args.load_inplace,
    )


def upload(client: Client, args: argparse.Namespace) -> AdapterInfo:
    progress = print_progress if sys.stderr.isatty() else None
    return client.adapters.upload(args.name, args.folder, load_inplace=args.load_inplace, progress=progress)


def unload(client: Client, args: argparse.Namespace) -> list[AdapterInfo]:
    return client.adapters.unload(args.name, grace_seconds=args.grace)


def pin(client: Client, args: argparse.Namespace) -> AdapterInfo:
    return client.adapters.pin(args.name, not args.off)


def prefetch(client: Client, args: argparse.Namespace) -> list[AdapterInfo]:
    return client.adapters.prefetch(args.names, host_only=args.host_only)


def watch(args: argparse.Namespace) -> int:
    with connect(args) as client, client.adapters.watch(args.names) as changes_of:
        for changes in changes_of:
            if args.json:
                print(json.dumps(dataclasses.asdict(changes)), flush=True)
                continue
            for adapter in changes.adapters:
                line = f"{adapter.name}  {state_text(adapter)}  {adapter.content_hash[:12]}"
                print(line.rstrip(), flush=True)
            for name in changes.removed:
                print(f"{name}  removed", flush=True)
    return 0


def model(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = dataclasses.asdict(client.model())
    if args.json:
        print(json.dumps(found))
    else:
        print_table(
            [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in found.items()]
        )
    return 0


def token(args: argparse.Namespace) -> int:
    if re.fullmatch(r"[A-Za-z0-9._@-]{1,128}", args.name) is None:
        raise errors.InvalidRequestError.for_field(
            "name", f"{args.name!r} has to be 1 to 128 of letters, digits, '.', '_', '-', '@'"
        )
    secret = secrets.token_urlsafe(32)
    print(f"{args.name} sha256:{hashlib.sha256(secret.encode()).hexdigest()}")
    print(f"the token of {args.name}, shown this once: {secret}", file=sys.stderr)
    return 0


def version(args: argparse.Namespace) -> int:
    from loraplex import __version__

    print(f"loraplex {__version__}")
    return 0
