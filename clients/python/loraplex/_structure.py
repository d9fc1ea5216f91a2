"""Structured output: what an answer must conform to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.errors import InvalidRequestError
from loraplex.v1 import generation_pb2


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that fits a schema: a mapping, JSON text, or one of pydantic's model classes."""

    schema: Any


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression (Rust's syntax, no look-around) matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a context-free grammar in llguidance's variant of Lark's syntax, from its rule `start` on."""

    lark: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some texts."""

    texts: Sequence[str]


Structure = JsonSchema | JsonObject | Regex | Grammar | Choice


def structure_message(structure: Structure) -> generation_pb2.Structure:
    """The message for `structure`.

    Raises:
        InvalidRequestError: it is of another type, or its value is.
    """
    message = generation_pb2.Structure()
    try:
        match structure:
            case JsonSchema(schema):
                message.json_schema = _schema_text(schema)
            case JsonObject():
                message.json_object.SetInParent()
            case Regex(pattern):
                message.regex = pattern
            case Grammar(lark):
                message.grammar = lark
            case Choice(texts):
                if isinstance(texts, str):
                    raise TypeError("texts must be a list of texts, not one")
                message.choice.SetInParent()
                message.choice.texts.extend(texts)
            case other:
                names = "JsonSchema, JsonObject, Regex, Grammar or Choice"
                raise TypeError(f"must be a {names}, not {type(other).__name__}")
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field("structure", str(error)) from error
    return message


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping):
        raise TypeError(f"a schema must be a mapping, JSON text or a pydantic model, not {schema!r}")
    return json.dumps(dict(schema), ensure_ascii=False)
