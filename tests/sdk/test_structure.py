"""Forms of answers as the SDK takes them, and as they are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraplex import Choice, Grammar, JsonObject, JsonSchema, Regex
from loraplex._requests import generate_request
from loraplex.errors import InvalidRequestError

SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}}}


class Model:
    """As pydantic's models are."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA), Model])
def test_schemas_are_sent_as_text(schema: Any) -> None:
    sent = generate_request("x", {"structure": JsonSchema(schema)}).structure
    assert sent.WhichOneof("kind") == "json_schema"
    assert json.loads(sent.json_schema) == SCHEMA


def test_every_kind() -> None:
    assert generate_request("x", {"structure": JsonObject()}).structure.HasField("json_object")
    assert generate_request("x", {"structure": Regex("a+")}).structure.regex == "a+"
    assert generate_request("x", {"structure": Grammar("start: /a/")}).structure.grammar == "start: /a/"
    assert list(generate_request("x", {"structure": Choice(["a", "b"])}).structure.choice.texts) == ["a", "b"]
    assert generate_request("x", {"structure": Choice([])}).structure.WhichOneof("kind") == "choice"
    assert not generate_request("x", {}).HasField("structure")


@pytest.mark.parametrize(
    "wrong", [{}, "a+", JsonSchema(3), JsonSchema({"a": {1}}), Regex(3), Choice("ab"), Choice([1]), Choice(3)]
)
def test_what_is_none_is_said_to_be_none(wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match="structure"):
        generate_request("x", {"structure": wrong})
