"""Fields of a configuration from outside: a JSON object, and typed values in it.

Every function raises MalformedFileError for a value of a wrong type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.core.text import quoted


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes, refusing what would be read differently elsewhere (repeated keys).

    Raises:
        MalformedFileError: it is none.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{what} is not JSON: {quoted(str(error))}") from error
    if not isinstance(value, dict):
        raise MalformedFileError(f"{what} is not a JSON object")
    return value


def size(key: str, value: object) -> int:
    """A whole number from 1 to 2**20."""
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a usable number")
    return value


def number(key: str, value: object) -> float:
    """A finite number of usable size, at most 1e9 in absolute value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a number")
    # Compared first: an integer of any length can be, and only then is it sure to be a float.
    if not abs(value) <= 1e9:
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a usable scale")
    return value


def flag(config: Mapping[str, Any], key: str) -> bool:
    """True or false; false where it is left out."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is neither true nor false")
    return bool(value)


def mapping(config: Mapping[str, Any], key: str) -> list[tuple[str, object]]:
    """The pairs of a mapping, in the file's order; none where it is left out."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a mapping")
    return list(value.items())


def modules(config: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    """A regular expression, a list of names, or None where it is left out."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    return names(config, key)


def names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; a single one counts as a list of one, "" as none."""
    value = config.get(key)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a list of names")
    return tuple(value)


def layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """`layers_to_transform`: numbers of layers, None where it is left out."""
    value = config.get("layers_to_transform")
    items = value if isinstance(value, list) else [value]
    if value is None or items == []:
        return None
    if any(type(item) is not int for item in items):
        raise MalformedFileError(f"layers_to_transform has {quoted(value)}, which is not a list of layers")
    return tuple(items)


def ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids under `key`; none where it is left out."""
    return token_ids(key, config.get(key))


def token_ids(key: str, value: object) -> tuple[int, ...]:
    """A list of token ids; `key` is what the error names."""
    if value is None:
        return ()
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a list of token ids")
    return tuple(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise MalformedFileError("a key is repeated")
    return result
