"""The OpenAPI document, made of the types and tables that requests are checked with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec

from loraplex_server.api.http import unserved
from loraplex_server.api.http.schema import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionBody,
    ErrorBody,
    Health,
    Model,
    ModelList,
)
from loraplex_server.api.http.unserved import Unserved

_REFERENCE = "#/components/schemas/{name}"
_TYPES = (
    CompletionBody,
    ChatBody,
    Completion,
    ChatCompletion,
    ChatChunk,
    Model,
    ModelList,
    Health,
    ErrorBody,
)
_JSON, _EVENTS = "application/json", "text/event-stream"

_ERRORS = {
    "400": "A field is wrong, or the adapters cannot be served together; `param` names the field.",
    "401": "No token, or an unknown one.",
    "404": "There is no such model or path.",
    "405": "Not by this method.",
    "408": "The body did not arrive.",
    "413": "The body is too long.",
    "415": "The body is not application/json.",
    "429": "The queue is full; Retry-After says when to try again.",
    "499": "The request was cancelled, for example because its adapter was unloaded.",
    "500": "A fault of the server.",
    "503": "The server is starting or stopping; Retry-After says when to try again.",
    "504": "It took too long.",
}
_BODY_ERRORS = ("408", "413", "415")


def document(version: str) -> dict[str, Any]:
    """The document, OpenAPI 3.1, of a server of this version."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_REFERENCE)
    schemas = copy.deepcopy(schemas)
    schemas["CompletionBody"]["properties"]["prompt"] = _prompt()
    for name, table in (("CompletionBody", unserved.COMPLETION), ("ChatBody", unserved.CHAT)):
        schemas[name]["properties"].update(_unserved(table))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loraplex",
            "version": version,
            "description": "Many adapters on one language model, for OpenAI's clients.",
        },
        "paths": {
            "/v1/completions": {
                "post": _generation(
                    "createCompletion", "Continues a text", "CompletionBody", "Completion", "Completion"
                )
            },
            "/v1/chat/completions": {
                "post": _generation(
                    "createChatCompletion",
                    "Continues a conversation",
                    "ChatBody",
                    "ChatCompletion",
                    "ChatChunk",
                )
            },
            "/v1/models": {
                "get": _operation("listModels", "The base model and its adapters", _content("ModelList"))
            },
            "/v1/models/{model}": {
                "get": {
                    **_operation("retrieveModel", "One of them", _content("Model")),
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                    ],
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "Whether requests are served; asks for no token",
                    "security": [],
                    "responses": {
                        "200": {"description": "They are.", "content": _content("Health")},
                        "503": {"description": "The server starts or stops.", "content": _content("Health")},
                    },
                }
            },
            "/metrics": {
                "get": _operation("metrics", "For Prometheus", {"text/plain": {"schema": {"type": "string"}}})
            },
            "/openapi.json": {
                "get": _operation("describe", "This document", {_JSON: {"schema": {"type": "object"}}})
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Only a server with a token file asks for one.
        "security": [{}, {"token": []}],
    }


def _generation(operation: str, summary: str, body: str, answer: str, event: str) -> dict[str, Any]:
    answers: dict[str, Any] = {
        **_content(answer),
        _EVENTS: {
            "schema": {
                "type": "object",
                "description": "With `stream`: each event; after the last one comes one that is [DONE].",
                "properties": {
                    "data": {"type": "string", "description": f"A `{event}` or an `ErrorBody`, as JSON."}
                },
                "required": ["data"],
            }
        },
    }
    return {
        **_operation(operation, summary, answers, body_errors=_BODY_ERRORS),
        "requestBody": {"required": True, "content": _content(body)},
    }


def _operation(
    operation: str, summary: str, answers: Mapping[str, Any], *, body_errors: tuple[str, ...] = ()
) -> dict[str, Any]:
    errors = {
        status: {"description": text, "content": _content("ErrorBody")}
        for status, text in _ERRORS.items()
        if status not in _BODY_ERRORS or status in body_errors
    }
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": answers}, **errors},
    }


def _content(name: str) -> dict[str, Any]:
    return {_JSON: {"schema": {"$ref": _REFERENCE.format(name=name)}}}


def _prompt() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    return {
        "anyOf": [
            text,
            {"type": "array", "items": text, "minItems": 1},
            ids,
            {"type": "array", "items": ids, "minItems": 1},
        ]
    }


def _unserved(table: Mapping[str, Unserved]) -> dict[str, Any]:
    return {
        field: {"enum": [*entry.neutral, None], "description": f"Anything else {entry.remedy}."}
        for field, entry in table.items()
    }
