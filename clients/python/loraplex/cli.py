"""The command `loraplex`: a client in the shell, and the door to the server and its tools.

Exit codes: 0 done; 1 the server failed or refused; 2 a wrong argument, or something to install first;
3 no such adapter; 69 no server there; 75 busy or too slow, try again later; 77 not allowed;
130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex import _extras, errors

if TYPE_CHECKING:
    from loraplex import AdapterInfo, Client, GenerateOptions, GenerationChunk
    from loraplex._structure import Structure

# Beyond 3 the numbers are those of sysexits.h: EX_UNAVAILABLE, EX_TEMPFAIL, EX_NOPERM.
EXIT_CODES: dict[type[errors.LoraplexError], int] = {
    errors.InvalidRequestError: 2,
    errors.NotFoundError: 3,
    errors.UnavailableError: 69,
    errors.ResourceExhaustedError: 75,
    errors.DeadlineExceededError: 75,
    errors.PermissionDeniedError: 77,
    errors.UnauthenticatedError: 77,
}

DESCRIPTION = """\
Serves many LoRA adapters on one frozen 4-bit language model, in one batch.

on the machine that has the model (pip install 'loraplex[server]'):
  serve                 start a server; see loraplex serve --help
  config                show or check what a server would run with: flags, environment and file
  demo                  watch a server answer for eight adapters at once on a small model that comes along
  bench                 measure a server under load; see loraplex bench --help

against a running server:
  generate              continue a prompt
  adapters              list, load, upload, compose, unload, pin, prefetch, watch adapters
  top                   watch queue, batch, tokens a second, and where the adapters are
  model                 show the base model and the server's limits

  token                 make a bearer token for a server's --token-file
  version               show the installed version
"""

EXAMPLES = """\
examples:
  loraplex serve --model meta-llama/Llama-3.2-1B --quantization nf4 --adapters ./adapters
  loraplex generate "Dear Sir" --adapter polite --max-tokens 64
  loraplex generate "Dear Sir" --adapter sql --adapter polite=0.5 --server gpu-box:50051 --tls
  loraplex adapters load polite /srv/adapters/polite
  loraplex adapters pin polite
  loraplex bench serve --help

LORAPLEX_SERVER and LORAPLEX_TOKEN stand in for --server and --token.
"""

GENERATE_EXAMPLES = """\
examples:
  loraplex generate "The capital of France is" --max-tokens 16
  loraplex generate --chat "What is the capital of France?" --system "Be brief."
  loraplex generate "Dear Sir" --adapter sql --adapter polite=0.5 --temperature 0.8 --seed 1
  git diff | loraplex generate - --adapter commit-message --stop $'\\n\\n'
"""

ADAPTERS_EXAMPLES = """\
examples:
  loraplex adapters list
  loraplex adapters load polite /srv/adapters/polite    (a folder on the server's machine)
  loraplex adapters pin polite                          (keep it on the device)
  loraplex adapters pin polite --off
  loraplex adapters load polite /srv/adapters/polite-2 --load-inplace
  loraplex adapters upload polite ./polite-lora         (a folder on this machine)
  loraplex adapters compose both --type ties --member sql --member polite=0.5 --density 0.4
  loraplex adapters prefetch polite sql                 (there is about to be work for them)
  loraplex adapters watch                               (what comes, goes and moves)
  loraplex adapters unload polite
  loraplex adapters unload polite --grace 10            (cancel what runs longer)
"""


TOKEN_DESCRIPTION = """\
Makes a new random token. The token goes to stderr, once, for the one who calls; the line with its hash
goes to stdout, for the file of `loraplex serve --token-file`. A server notices a changed file by itself."""

TOKEN_EXAMPLES = """\
examples:
  loraplex token alice >> tokens
  LORAPLEX_TOKEN=... loraplex generate "Dear Sir" --server gpu-box:50051 --tls
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (the process's own arguments by default) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments[0] in _extras.COMMANDS:
        return _extras.run(arguments[0], arguments[1:])
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except errors.LoraplexError as error:
        print(f"loraplex: {error.code}: {one_line(str(error))}", file=sys.stderr)
        return EXIT_CODES.get(type(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    """All of the command line but what `serve`, `bench` and `demo` parse themselves."""
    top = argparse.ArgumentParser(
        prog="loraplex",
        usage="loraplex COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="loraplex", help=argparse.SUPPRESS
    )
    for name in _extras.COMMANDS:  # never parsed here; named so that a mistyped command lists them
        commands.add_parser(name)
    _add_generate(commands)
    _add_adapters(commands)

    model = commands.add_parser("model", help="show the base model and the server's limits")
    _add_connection(model)
    model.add_argument("--json", action="store_true", help="print JSON")
    model.set_defaults(run=_model)

    token = commands.add_parser(
        "token",
        help="make a bearer token for a server's --token-file",
        description=TOKEN_DESCRIPTION,
        epilog=TOKEN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    token.add_argument("name", metavar="NAME", help="whose token it is: letters, digits, '.', '_', '-', '@'")
    token.set_defaults(run=_token)

    version = commands.add_parser("version", help="show the installed version")
    version.set_defaults(run=_version)
    return top


# Actions on adapters that answer with several.
_LISTS = ("list", "unload", "prefetch")


def _add_connection(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=os.environ.get("LORAPLEX_SERVER", "127.0.0.1:50051"),
        help="default %(default)s",
    )
    group.add_argument("--token", default=os.environ.get("LORAPLEX_TOKEN"), help="bearer token")
    group.add_argument(
        "--allow-insecure-token", action="store_true", help="send the token to another machine without TLS"
    )
    group.add_argument("--tls", action="store_true", help="encrypt; trust the usual authorities")
    group.add_argument("--tls-ca", metavar="FILE", help="trust the authorities in this PEM file instead")
    group.add_argument("--tls-cert", metavar="FILE", help="this client's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="and its key")
    group.add_argument("--tls-server-name", metavar="NAME", help="name to expect in the server's certificate")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds to wait; default without limit")


def _add_generate(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt and writes the answer to stdout as it comes.",
        epilog=GENERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    command.add_argument(
        "--chat",
        action="store_true",
        help="what a user says, put into the adapter's or model's chat template",
    )
    command.add_argument("--system", metavar="TEXT", help="with --chat: what the system says before")
    command.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        metavar="NAME[=WEIGHT]",
        help="adapter to apply; several are summed; none: the base model",
    )
    command.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    command.add_argument("--min-tokens", type=int, metavar="N", help="fewest tokens to generate")
    command.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the tokens that make up this mass"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    command.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens with this share of the most probable one"
    )
    command.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: tokens there are become less likely"
    )
    command.add_argument(
        "--presence-penalty", type=float, metavar="X", help="-2 to 2, for tokens of the answer"
    )
    command.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="-2 to 2, for each time it has them"
    )
    command.add_argument(
        "--bad-word", action="append", metavar="TEXT", help="never answer this; may be repeated"
    )
    command.add_argument("--seed", type=int, metavar="N", help="draw the same answer again")
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    command.add_argument("--include-stop", action="store_true", help="print that text, too")
    command.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence")
    command.add_argument("-n", type=int, metavar="N", help="so many answers, one below the other")
    command.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    command.add_argument("--logprobs", type=int, metavar="N", help="with --json: of each token and N others")
    command.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="N",
        help="the same for the prompt; alone with --max-tokens 0",
    )
    forms = command.add_argument_group("form of the answer, one of").add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="JSON that fits the schema in this file")
    forms.add_argument("--json-object", action="store_true", help="any JSON object")
    forms.add_argument("--regex", metavar="EXPR", help="text that this expression matches as a whole")
    forms.add_argument("--grammar", metavar="FILE", help="text of the Lark grammar in this file")
    forms.add_argument("--choice", action="append", metavar="TEXT", help="one of these; may be repeated")
    command.add_argument("--priority", type=int, metavar="N", help="higher goes first; default 0")
    command.add_argument(
        "--speculative-tokens",
        type=int,
        metavar="N",
        help="guess up to N tokens a step from earlier text; the answer is the same",
    )
    command.add_argument("--json", action="store_true", help="print the whole answer as JSON at the end")
    command.add_argument("--stats", action="store_true", help="report tokens and seconds on stderr")
    _add_connection(command)
    command.set_defaults(run=_generate)


def _add_adapters(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "adapters",
        help="list, load, upload, compose, unload, pin, prefetch, watch adapters",
        description="Manages the adapters of a running server.",
        epilog=ADAPTERS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, run: Callable[[Client, argparse.Namespace], list[AdapterInfo]], help_: str) -> Any:
        action = actions.add_parser(name, help=help_, description=help_.capitalize() + ".")
        if name == "prefetch":
            action.add_argument("names", metavar="NAME", nargs="+")
        elif name != "list":
            action.add_argument("name", metavar="NAME")
        action.add_argument("--json", action="store_true", help="print JSON")
        _add_connection(action)
        action.set_defaults(run=lambda args: _adapters(run, args))
        return action

    add("list", lambda client, args: client.adapters.list(), "show all registered adapters")
    add("get", lambda client, args: [client.adapters.get(args.name)], "show one adapter")
    load = add(
        "load",
        lambda client, args: [client.adapters.load(args.name, args.source, load_inplace=args.load_inplace)],
        "register an adapter and read it",
    )
    load.add_argument(
        "--load-inplace",
        action="store_true",
        help="replace an adapter of that name; its running requests finish on the old one",
    )
    load.add_argument("source", metavar="FOLDER", help="where PEFT saved it, on the server's machine")
    compose = add(
        "compose",
        lambda client, args: [
            client.adapters.register_composition(
                args.name,
                args.type,
                args.member,
                density=args.density,
                majority_sign=args.majority_sign,
                svd_rank=args.svd_rank,
                seed=args.seed,
                load_inplace=args.load_inplace,
            )
        ],
        "register what PEFT makes of several adapters as an adapter of its own",
    )
    compose.add_argument(
        "--type",
        required=True,
        metavar="TYPE",
        help="linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, "
        "magnitude_prune, magnitude_prune_svd",
    )
    compose.add_argument(
        "--member",
        action="append",
        required=True,
        type=_adapter,
        metavar="NAME[=WEIGHT]",
        help="an adapter to combine; may be repeated",
    )
    compose.add_argument(
        "--density", type=float, metavar="D", help="part to keep: ties, dare, magnitude_prune"
    )
    compose.add_argument("--majority-sign", metavar="HOW", help="total or frequency: ties")
    compose.add_argument("--svd-rank", type=int, metavar="N", help="rank of the result: svd")
    compose.add_argument("--seed", type=int, metavar="N", help="of what is dropped: dare")
    compose.add_argument("--load-inplace", action="store_true", help="replace an adapter of that name")
    upload = add(
        "upload",
        lambda client, args: [
            client.adapters.upload(
                args.name,
                args.folder,
                load_inplace=args.load_inplace,
                progress=_show_progress if sys.stderr.isatty() else None,
            )
        ],
        "send an adapter from this machine to the server and register it",
    )
    upload.add_argument("folder", metavar="FOLDER", help="where PEFT saved it, on this machine")
    upload.add_argument("--load-inplace", action="store_true", help="replace an adapter of that name")
    watch = actions.add_parser("watch", help="show what changes with the adapters, until interrupted")
    watch.add_argument("names", metavar="NAME", nargs="*", help="only these")
    watch.add_argument("--json", action="store_true", help="print a JSON object a line")
    _add_connection(watch)
    watch.set_defaults(run=_watch)
    unload = add(
        "unload",
        lambda client, args: client.adapters.unload(args.name, grace_seconds=args.grace),
        "take an adapter away when its requests are done, and show the others",
    )
    unload.add_argument(
        "--grace", type=float, metavar="S", help="cancel those of its requests that run S seconds longer"
    )
    pin = add(
        "pin",
        lambda client, args: [client.adapters.pin(args.name, not args.off)],
        "bring an adapter to the device and keep it there",
    )
    pin.add_argument("--off", action="store_true", help="let it be evicted again")
    prefetch = add(
        "prefetch",
        lambda client, args: client.adapters.prefetch(args.names, host_only=args.host_only),
        "hint that adapters will be wanted, and show where they are",
    )
    prefetch.add_argument("--host-only", action="store_true", help="bring them to host memory at most")


def _show_progress(sent: int, total: int) -> None:
    print(f"\r{sent:,} of {total:,} bytes", end="\n" if sent == total else "", file=sys.stderr, flush=True)


def _adapter(text: str) -> tuple[str, float]:
    name, given, weight = text.partition("=")
    try:
        return name, float(weight) if given else 1.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight {weight!r} is not a number") from None


def _connect(args: argparse.Namespace) -> Client:
    from loraplex import Client, TlsConfig  # here, so that --help does not wait for grpc

    own = (args.tls_ca, args.tls_cert, args.tls_key, args.tls_server_name)
    return Client(
        args.server,
        token=args.token or None,
        tls=TlsConfig(*own) if any(own) else args.tls,
        timeout=args.timeout,
        allow_insecure_token=args.allow_insecure_token,
    )


def _generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.system is not None and not args.chat:
        raise errors.InvalidRequestError.for_field("--system", "goes with --chat")
    options: GenerateOptions = {
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
    said = [{"role": "user", "content": prompt}]
    if args.system is not None:
        said.insert(0, {"role": "system", "content": args.system})
    with (
        _connect(args) as client,
        client.stream_chat(said, **options) if args.chat else client.stream(prompt, **options) as stream,
    ):
        if args.json:
            print(json.dumps(dataclasses.asdict(stream.collect()), ensure_ascii=False))
            return 0
        chunk: GenerationChunk | None = None
        texts: dict[int, str] = {}
        for chunk in stream:
            # Of several answers the pieces come mixed.
            if chunk.index:
                texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
            else:
                print(chunk.text, end="", flush=True)
        print()
        for _, text in sorted(texts.items()):
            print(text)
    if args.stats and chunk and chunk.usage and chunk.timing:
        guessed = f" ({chunk.usage.accepted_tokens} guessed)" if chunk.usage.accepted_tokens else ""
        print(
            f"{chunk.usage.prompt_tokens} ({chunk.usage.cached_prompt_tokens} cached) + "
            f"{chunk.usage.completion_tokens} tokens{guessed} in "
            f"{chunk.timing.total_seconds:.3f} s, the first after "
            f"{chunk.timing.time_to_first_token_seconds:.3f} s; ended by {chunk.finish_reason}",
            file=sys.stderr,
        )
    return 0


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


def _watch(args: argparse.Namespace) -> int:
    with _connect(args) as client, client.adapters.watch(args.names) as watch:
        for changes in watch:
            if args.json:
                print(json.dumps(dataclasses.asdict(changes)), flush=True)
                continue
            for adapter in changes.adapters:
                print(f"{adapter.name}  {_state(adapter)}  {adapter.content_hash[:12]}".rstrip(), flush=True)
            for name in changes.removed:
                print(f"{name}  removed", flush=True)
    return 0


def _state(adapter: AdapterInfo) -> str:
    marks = (" pinned" if adapter.pinned else "") + (" draining" if adapter.draining else "")
    return adapter.state + marks


def _adapters(
    run: Callable[[Client, argparse.Namespace], list[AdapterInfo]], args: argparse.Namespace
) -> int:
    with _connect(args) as client:
        found = run(client, args)
    if args.json:
        entries = [dataclasses.asdict(adapter) for adapter in found]
        print(json.dumps(entries if args.action in _LISTS else entries[0]))
        return 0
    rows = [("NAME", "STATE", "RANK", "BYTES", "IN USE", "HITS", "MISSES", "MODULES")]
    rows += [
        (
            adapter.name,
            _state(adapter),
            str(adapter.rank),
            f"{adapter.bytes:,}",
            str(adapter.references),
            str(adapter.hits),
            str(adapter.misses),
            ",".join(adapter.target_modules),
        )
        for adapter in found
    ]
    print_table(rows)
    return 0


def _model(args: argparse.Namespace) -> int:
    with _connect(args) as client:
        model = dataclasses.asdict(client.model())
    if args.json:
        print(json.dumps(model))
    else:
        print_table(
            [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in model.items()]
        )
    return 0


def _token(args: argparse.Namespace) -> int:
    if re.fullmatch(r"[A-Za-z0-9._@-]{1,128}", args.name) is None:
        raise errors.InvalidRequestError.for_field(
            "name", f"{args.name!r} has to be 1 to 128 of letters, digits, '.', '_', '-', '@'"
        )
    token = secrets.token_urlsafe(32)
    print(f"{args.name} sha256:{hashlib.sha256(token.encode()).hexdigest()}")
    print(f"the token of {args.name}, shown this once: {token}", file=sys.stderr)
    return 0


def _version(args: argparse.Namespace) -> int:
    from loraplex import __version__

    print(f"loraplex {__version__}")
    return 0


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    raise SystemExit(main())
