"""The layers that give settings their values: flags beat the environment, that the file, that the defaults.

`--max-batch-tokens 512` is `LORAPLEX_SERVE_MAX_BATCH_TOKENS=512` in the environment and
`max_batch_tokens = 512` in the file. A setting that may be repeated is an array in the file, and its values
are separated by commas in the environment. An unknown name is an error wherever it stands, so a misspelt
setting cannot be ignored.
"""

from __future__ import annotations

import difflib
import enum
import functools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_server.config.declared import DeclaredSetting, build, settings_of
from loraplex_server.config.schema import ServerConfig
from loraplex_server.core.errors import InvalidArgumentError

ENVIRONMENT_PREFIX = "LORAPLEX_SERVE_"
_CONFIG = "config"
_MAX_FILE_BYTES = 1 << 20


class Origin(enum.StrEnum):
    """The layer that a value came from."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True)
class Settings:
    """Every setting by name: its value as it is written outside, and where it came from."""

    values: dict[str, Any]
    origins: dict[str, Origin]

    def to_config(self) -> ServerConfig:
        """The configuration that they make.

        Raises:
            InvalidArgumentError: a value is out of range, or needs another beside it.
        """
        return build(ServerConfig, self.values)

    def to_toml(self, *, all_values: bool = True) -> str:
        """A file that `--config` takes, each setting with its origin; unset ones are comments."""
        lines = []
        for name, value in self.values.items():
            if self.origins[name] is Origin.DEFAULT and not all_values:
                continue
            shown = f"# {name} =" if value in (None, ()) else f"{name} = {_toml(value)}"
            lines.append(f"{shown:<48} # {self.origins[name]}")
        return "\n".join(lines)


@functools.cache
def known_settings() -> Mapping[str, DeclaredSetting]:
    """All of the server's settings by name, in the help's order."""
    return {found.name: found for found in settings_of(ServerConfig)}


def environment_name(setting: DeclaredSetting) -> str:
    return f"{ENVIRONMENT_PREFIX}{setting.name.upper()}"


def merge(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """All settings from their four layers.

    Args:
        flags: values by name from the command line; "config" names the file.

    Raises:
        InvalidArgumentError: file or environment have an unknown name or a bad value.
    """
    given = dict(flags)
    path = given.pop(_CONFIG, None) or environ.get(f"{ENVIRONMENT_PREFIX}{_CONFIG.upper()}")
    values = {found.name: found.default for found in known_settings().values()}
    origins = dict.fromkeys(values, Origin.DEFAULT)
    for origin, layer in (
        (Origin.FILE, _from_file(Path(path)) if path else {}),
        (Origin.ENVIRONMENT, _from_environment(environ)),
        (Origin.FLAG, given),
    ):
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return Settings(values, origins)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise InvalidArgumentError.field("config", f"{path} has more than {_MAX_FILE_BYTES} bytes")
        found = tomllib.loads(text.decode())
    except OSError as error:
        raise InvalidArgumentError.field("config", f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.field("config", f"{path} is not valid TOML: {error}") from error
    values = {}
    for key, value in found.items():
        setting = _find(key.replace("-", "_"), f"{path}: {key}")
        values[setting.name] = _convert(f"{path}: {key}", value, setting)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or name == _CONFIG:
            continue
        setting = _find(name, variable)
        value: Any = text
        if setting.kind.repeatable:
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif setting.kind.switch:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        values[setting.name] = _convert(variable, value, setting)
    return values


def _find(name: str, where: str) -> DeclaredSetting:
    known = known_settings()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise InvalidArgumentError.field(where, f"is not a setting{hint}")


def _convert(where: str, value: Any, setting: DeclaredSetting) -> Any:
    """`value` as the flag would have made it of text."""
    if setting.kind.switch:
        if not isinstance(value, bool):
            raise InvalidArgumentError.field(where, f"{value!r} is neither true nor false")
        return value
    if setting.kind.repeatable:
        if not isinstance(value, list):
            raise InvalidArgumentError.field(where, f"{value!r} is not an array")
        return [_convert_one(where, item, setting) for item in value]
    return _convert_one(where, value, setting)


def _convert_one(where: str, value: Any, setting: DeclaredSetting) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidArgumentError.field(where, f"{value!r} is neither text nor a number")
    try:
        converted = setting.kind.parse(str(value))
    except ValueError as error:
        raise InvalidArgumentError.field(where, f"{value!r} is wrong: {error}") from error
    choices = setting.kind.choices
    if choices and converted not in choices:
        raise InvalidArgumentError.field(where, f"{value!r} is none of {', '.join(choices)}")
    return converted


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
