"""The command line of `loraplex`. `serve`, `config`, `top`, `bench` and `demo` parse their own."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from loraplex import _extras
from loraplex.cli import commands

DESCRIPTION = """\
Serves many LoRA adapters on one frozen 4-bit language model, in one batch.

on the machine that has the model (from a checkout: pip install ./clients/python .):
  serve                 start a server; see loraplex serve --help
  config                show or check a server's settings: flags, environment and file
  demo                  watch a server answer for twelve adapters at once on a small model that comes along
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


def parser() -> argparse.ArgumentParser:
    """All of the command line but what other packages parse themselves."""
    top = argparse.ArgumentParser(
        prog="loraplex",
        usage="loraplex COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="loraplex", help=argparse.SUPPRESS
    )
    for name in _extras.COMMANDS:  # never parsed here; named so that a mistyped command lists them
        names.add_parser(name)
    _add_generate(names)
    _add_adapters(names)

    model = names.add_parser("model", help="show the base model and the server's limits")
    _add_connection(model)
    model.add_argument("--json", action="store_true", help="print JSON")
    model.set_defaults(run=commands.model)

    token = names.add_parser(
        "token",
        help="make a bearer token for a server's --token-file",
        description=TOKEN_DESCRIPTION,
        epilog=TOKEN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    token.add_argument("name", metavar="NAME", help="whose token it is: letters, digits, '.', '_', '-', '@'")
    token.set_defaults(run=commands.token)

    version = names.add_parser("version", help="show the installed version")
    version.set_defaults(run=commands.version)
    return top


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


def _add_generate(names: Any) -> None:
    command: argparse.ArgumentParser = names.add_parser(
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
        help="treat PROMPT as a user's message, through the chat template of the adapter or model",
    )
    command.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    command.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        metavar="NAME[=WEIGHT]",
        help="adapter to apply; several are summed; none: the base model",
    )
    _add_sampling(command)
    _add_stopping(command)
    _add_answer(command)
    command.add_argument("--priority", type=int, metavar="N", help="higher goes first; default 0")
    command.add_argument(
        "--speculative-tokens",
        type=int,
        metavar="N",
        help="take up to N draft tokens a step from earlier text; the answer is the same",
    )
    command.add_argument("--json", action="store_true", help="print the whole answer as JSON at the end")
    command.add_argument("--stats", action="store_true", help="report tokens and seconds on stderr")
    _add_connection(command)
    command.set_defaults(run=commands.generate)


def _add_sampling(command: argparse.ArgumentParser) -> None:
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
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1: tokens that occurred become less likely",
    )
    command.add_argument(
        "--presence-penalty", type=float, metavar="X", help="-2 to 2, for tokens of the answer"
    )
    command.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="-2 to 2, for each occurrence in the answer"
    )
    command.add_argument(
        "--bad-word", action="append", metavar="TEXT", help="never answer this; may be repeated"
    )
    command.add_argument("--seed", type=int, metavar="N", help="draw the same answer again")


def _add_stopping(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    command.add_argument("--include-stop", action="store_true", help="print that text, too")
    command.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence")


def _add_answer(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", type=int, metavar="N", help="so many answers, one below the other")
    command.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    command.add_argument("--logprobs", type=int, metavar="N", help="with --json: of each token and N others")
    command.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="N",
        help="the same for the prompt; alone with --max-tokens 0",
    )
    kinds = command.add_argument_group("structured output, one of").add_mutually_exclusive_group()
    kinds.add_argument("--json-schema", metavar="FILE", help="JSON that fits the schema in this file")
    kinds.add_argument("--json-object", action="store_true", help="any JSON object")
    kinds.add_argument("--regex", metavar="EXPR", help="text that this expression matches as a whole")
    kinds.add_argument("--grammar", metavar="FILE", help="text of the Lark grammar in this file")
    kinds.add_argument("--choice", action="append", metavar="TEXT", help="one of these; may be repeated")


def _add_adapters(names: Any) -> None:
    command: argparse.ArgumentParser = names.add_parser(
        "adapters",
        help="list, load, upload, compose, unload, pin, prefetch, watch adapters",
        description="Manages the adapters of a running server.",
        epilog=ADAPTERS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_action(actions, "list", commands.list_, "show all registered adapters", named=False)
    _add_action(actions, "get", commands.get, "show one adapter")
    load = _add_action(actions, "load", commands.load, "register an adapter and read it")
    load.add_argument(
        "--load-inplace",
        action="store_true",
        help="replace an adapter of that name; its running requests finish on the old one",
    )
    load.add_argument(
        "source",
        metavar="FOLDER",
        help="where PEFT saved it, on the server's machine: relative to this folder if that is this machine, "
        "else to an --adapter-root; or a source such as hf://owner/name",
    )
    _add_compose(actions)
    upload = _add_action(
        actions, "upload", commands.upload, "send an adapter from this machine to the server and register it"
    )
    upload.add_argument("folder", metavar="FOLDER", help="where PEFT saved it, on this machine")
    upload.add_argument("--load-inplace", action="store_true", help="replace an adapter of that name")
    watch = actions.add_parser("watch", help="show what changes with the adapters, until interrupted")
    watch.add_argument("names", metavar="NAME", nargs="*", help="only these")
    watch.add_argument("--json", action="store_true", help="print a JSON object a line")
    _add_connection(watch)
    watch.set_defaults(run=commands.watch)
    unload = _add_action(
        actions,
        "unload",
        commands.unload,
        "take an adapter away when its requests are done, and show the others",
    )
    unload.add_argument(
        "--grace", type=float, metavar="S", help="cancel those of its requests that run S seconds longer"
    )
    pin = _add_action(actions, "pin", commands.pin, "bring an adapter to the device and keep it there")
    pin.add_argument("--off", action="store_true", help="let it be evicted again")
    prefetch = _add_action(
        actions,
        "prefetch",
        commands.prefetch,
        "hint that adapters will be wanted, and show where they are",
        named=False,
    )
    prefetch.add_argument("names", metavar="NAME", nargs="+")
    prefetch.add_argument("--host-only", action="store_true", help="bring them to host memory at most")


def _add_action(
    actions: Any, name: str, run: commands.AdapterAction, help_: str, *, named: bool = True
) -> argparse.ArgumentParser:
    """An action that shows the adapters of its answer; `named` ones are about one adapter."""
    action: argparse.ArgumentParser = actions.add_parser(
        name, help=help_, description=help_.capitalize() + "."
    )
    if named:
        action.add_argument("name", metavar="NAME")
    action.add_argument("--json", action="store_true", help="print JSON")
    _add_connection(action)
    action.set_defaults(run=partial(commands.manage_adapters, run))
    return action


def _add_compose(actions: Any) -> None:
    compose = _add_action(
        actions,
        "compose",
        commands.compose,
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


def _adapter(text: str) -> tuple[str, float]:
    name, given, weight = text.partition("=")
    try:
        return name, float(weight) if given else 1.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight {weight!r} is not a number") from None
