"""Fields of OpenAI's API that this server does not serve; they may only have values that ask for nothing.

A field leaves this table when it is served, and becomes one of `schema`. Fields in neither are unknown, and
refused as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from loraplex_server.core.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Unserved:
    """A field that is not served.

    Attributes:
        neutral: values that ask for nothing; null always does.
        remedy: what to do instead of asking for more.
    """

    neutral: tuple[Any, ...]
    remedy: str = "is not served; leave it out"


_NOTHING = Unserved(())
_TEXT_ONLY = "is not served: answers are text; leave it out"

GENERATION: Mapping[str, Unserved] = {
    "service_tier": Unserved(("auto", "default")),
    "store": Unserved((False,), "is not served: nothing is kept; leave it out"),
    "metadata": Unserved(({},)),
}
"""Of both kinds of request."""

COMPLETION: Mapping[str, Unserved] = {
    **GENERATION,
    "best_of": Unserved((1,), "is not served; leave it out and choose among n answers yourself"),
    "suffix": Unserved(("",)),
}

CHAT: Mapping[str, Unserved] = {
    **GENERATION,
    "audio": _NOTHING,
    "function_call": Unserved(("none",)),
    "functions": Unserved(([],)),
    "modalities": Unserved((["text"],), _TEXT_ONLY),
    "parallel_tool_calls": Unserved((True, False)),
    "prediction": _NOTHING,
    "reasoning_effort": _NOTHING,
    "tool_choice": Unserved(("none", "auto")),
    "tools": Unserved(([],), "is not served: the model calls no tools; leave it out"),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
}


def without_unserved(body: dict[str, Any], table: Mapping[str, Unserved]) -> dict[str, Any]:
    """`body` less the fields of `table`.

    Raises:
        InvalidArgumentError: one of them asks for something.
    """
    for field in table.keys() & body.keys():
        value, entry = body[field], table[field]
        if value is not None and not any(_same(value, neutral) for neutral in entry.neutral):
            raise InvalidArgumentError.field(field, entry.remedy)
    return {field: value for field, value in body.items() if field not in table}


def _same(value: Any, neutral: Any) -> bool:
    # False is no 0, and True no 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
