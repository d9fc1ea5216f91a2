"""One schema for flags, environment and a TOML file: the flags of `loraplex serve`.

`--max-batch-tokens 512` is `LORAPLEX_SERVE_MAX_BATCH_TOKENS=512` in the environment and
`max_batch_tokens = 512` in the file. A flag beats the environment, the environment beats the file. A flag
that may be repeated is an array in the file, and its values are separated by commas in the environment. What
no flag is called is an error wherever it stands, so a misspelt setting cannot be ignored.
"""

from __future__ import annotations

import argparse
import enum
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex_server.core.errors import InvalidArgumentError

ENVIRONMENT_PREFIX = "LORAPLEX_SERVE_"
_MAX_FILE_BYTES = 1 << 20


class Origin(enum.StrEnum):
    """Where a value came from."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`."""
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="a TOML file of these flags by name: max_batch_tokens = 512; see loraplex config --help",
    )


def resolve(
    parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]
) -> tuple[argparse.Namespace, dict[str, Origin]]:
    """Every setting's value and where it came from.

    Args:
        parser: built for this call alone, with `--config`; it is changed.

    Raises:
        InvalidArgumentError: file or environment name something that is no flag, or give it a bad value.
        SystemExit: `argv` does; argparse has written why.
    """
    if {"-h", "--help"} & set(argv):
        # Now, while the defaults that it shows are there.
        parser.print_help()
        parser.exit()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    defaults = {dest: action.default for dest, action in actions.items()}
    required = [action for action in actions.values() if action.required]
    for action in actions.values():
        action.default, action.required = argparse.SUPPRESS, False
    given = vars(parser.parse_args(argv))

    layers = [(Origin.DEFAULT, defaults)]
    path = given.get("config")
    if path is None and environ.get(f"{ENVIRONMENT_PREFIX}CONFIG"):
        path = Path(environ[f"{ENVIRONMENT_PREFIX}CONFIG"])
    if path is not None:
        layers.append((Origin.FILE, _from_file(path, actions)))
    layers += [(Origin.ENVIRONMENT, _from_environment(environ, actions)), (Origin.FLAG, given)]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    for action in required:
        if origins[action.dest] is Origin.DEFAULT:
            parser.error(f"{action.option_strings[-1]} is required")
    return argparse.Namespace(**values), origins


def to_toml(arguments: argparse.Namespace, origins: Mapping[str, Origin], *, all_values: bool = True) -> str:
    """The settings as a file that `--config` takes, each with its origin; unset ones are comments."""
    lines = []
    for dest, value in vars(arguments).items():
        origin = origins[dest]
        if dest == "config" or (origin is Origin.DEFAULT and not all_values):
            continue
        shown = f"# {dest} =" if value in (None, ()) else f"{dest} = {_toml(value)}"
        lines.append(f"{shown:<48} # {origin}")
    return "\n".join(lines)


def _from_file(path: Path, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise InvalidArgumentError.field("config", f"{path} has more than {_MAX_FILE_BYTES} bytes")
        found = tomllib.loads(text.decode())
    except OSError as error:
        raise InvalidArgumentError.field("config", f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.field("config", f"{path} is no TOML: {error}") from error
    values = {}
    for key, value in found.items():
        action = actions.get(key.replace("-", "_"))
        if action is None or action.dest == "config":
            raise InvalidArgumentError.field(f"{path}: {key}", f"is no setting{_nearest(key, actions)}")
        values[action.dest] = _convert(f"{path}: {key}", value, action)
    return values


def _from_environment(environ: Mapping[str, str], actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        action = actions.get(key)
        if action is None:
            raise InvalidArgumentError.field(name, f"is no setting{_nearest(key, actions)}")
        value: Any = text
        if _is_list(action):
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif _is_switch(action):
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        values[action.dest] = _convert(name, value, action)
    return values


def _convert(where: str, value: Any, action: argparse.Action) -> Any:
    """`value` as the flag would have made it of text."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise InvalidArgumentError.field(where, f"{value!r} is neither true nor false")
        return value
    if _is_list(action):
        if not isinstance(value, list):
            raise InvalidArgumentError.field(where, f"{value!r} is no array")
        return [_convert_one(where, item, action) for item in value]
    return _convert_one(where, value, action)


def _convert_one(where: str, value: Any, action: argparse.Action) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidArgumentError.field(where, f"{value!r} is no text and no number")
    convert = action.type if callable(action.type) else str
    try:
        converted = convert(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InvalidArgumentError.field(where, f"{value!r} is wrong: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise InvalidArgumentError.field(where, f"{value!r} is none of {', '.join(action.choices)}")
    return converted


def _is_list(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _is_switch(action: argparse.Action) -> bool:
    return isinstance(action, argparse._StoreTrueAction)


def _nearest(key: str, known: Iterable[str]) -> str:
    import difflib

    found = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, tuple):
        # One flag with commas in it.
        return json.dumps(",".join(map(str, value)))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    # JSON's strings are TOML's.
    return json.dumps(str(value), ensure_ascii=False)
