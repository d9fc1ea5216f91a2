"""The flags of `loraplex serve`, made from the schema, and the command `loraplex config`."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex_server.config.declared import DeclaredSetting
from loraplex_server.config.layers import Settings, known_settings, merge
from loraplex_server.core.errors import ServerError

_DESCRIPTION = """\
Serves one base model and many PEFT adapters over gRPC, and over HTTP for OpenAI clients. Each request names
its adapters, or none, and requests with different adapters share a batch. The server prints one line on
stdout when it is ready. SIGTERM or Ctrl-C lets running calls finish, a second one ends them at once."""

_EPILOG = """\
SIZE is a number of bytes, or a number with a unit: 512MiB, 2GB, 1.5g. S is seconds.

  loraplex serve --model ./llama --adapters ./adapters
  loraplex serve --model ./llama --adapters ./adapters --http-port 8000
  loraplex serve --model ./llama --quantization int4 --device cpu --port 0 --metrics-port -1
  loraplex serve --model ./llama --host 0.0.0.0 --token-file tokens \\
      --tls-certificate tls.crt --tls-key tls.key"""


_CONFIG_DESCRIPTION = """\
Shows or checks the settings that `loraplex serve` would run with, from the same flags, environment and file.
Every flag of `loraplex serve --help` is a setting:

  --max-batch-tokens 512                      on the command line, which beats
  LORAPLEX_SERVE_MAX_BATCH_TOKENS=512         in the environment, which beats
  max_batch_tokens = 512                      in the TOML file of --config (or LORAPLEX_SERVE_CONFIG)

A flag that may be repeated is an array in the file; in the environment, commas separate its values. An
unknown name is an error."""

_CONFIG_EPILOG = """\
  loraplex config show --model ./llama > loraplex.toml     writes a file with every setting, to begin with
  loraplex config check --config loraplex.toml             checks the file; exit code 2 if it is not valid
  loraplex config show --changed --config loraplex.toml    shows what is not the default, and its origin"""


def build_parser(*, require: bool = False) -> argparse.ArgumentParser:
    """A parser of every flag. It leaves out what is not given: defaults come from `layers`.

    Args:
        require: refuse a command line without the required flags, and show them so; the environment and the
            file may give them too.
    """
    parser = argparse.ArgumentParser(
        prog="loraplex serve",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a TOML file with settings, such as max_batch_tokens = 512; see loraplex config --help",
    )
    for title, settings in itertools.groupby(known_settings().values(), lambda found: found.setting.group):
        group = parser.add_argument_group(title)
        for setting in settings:
            group.add_argument(setting.flag, **_options(setting, require=require))
    return parser


def resolve(
    argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser | None = None
) -> Settings:
    """Every setting's value and where it came from.

    Raises:
        InvalidArgumentError: file or environment have an unknown name or a bad value.
        SystemExit: help is asked for, or `argv` is wrong; argparse has written which.
    """
    parser = parser or build_parser()
    if {"-h", "--help"} & set(argv):
        build_parser(require=True).print_help()
        parser.exit()
    settings = merge(vars(parser.parse_args(argv)), environ)
    for found in known_settings().values():
        if found.required and settings.values[found.name] is None:
            parser.error(f"{found.flag} is required")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
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
    parser.add_argument(
        "--changed", action="store_true", help="show only settings that are not at their default"
    )
    own, flags = parser.parse_known_args(argv)
    serve = build_parser()
    serve.prog, serve.usage = parser.prog, parser.usage
    try:
        settings = resolve(flags, os.environ, serve)
        settings.to_config()
    except ServerError as error:
        serve.error(str(error))
    if own.action == "show":
        print(settings.to_toml(all_values=not own.changed))
    else:
        print("the configuration is valid")
    return 0


def _options(setting: DeclaredSetting, *, require: bool) -> dict[str, Any]:
    """Arguments of `add_argument` for a setting."""
    kind = setting.kind
    # argparse formats the help with `%`.
    options: dict[str, Any] = {"help": f"{setting.setting.help}{_default(setting)}".replace("%", "%%")}
    if kind.switch:
        return options | {"action": "store_true"}
    return options | {
        "action": "append" if kind.repeatable else "store",
        "type": _argument_type(kind.parse),
        "choices": kind.choices or None,
        "metavar": setting.setting.metavar or kind.metavar or None,
        "required": require and setting.required,
    }


def _default(setting: DeclaredSetting) -> str:
    """The end of a flag's help."""
    if setting.kind.repeatable:
        return "; may be repeated"
    if setting.setting.default:
        return f" (default: {setting.setting.default})"
    if setting.kind.switch or setting.default is None:
        return ""
    return f" (default: {setting.kind.show(setting.default)})"


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, whose complaints argparse shows; it has its own for types such as `int`."""
    if isinstance(parse, type):
        return parse

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert
