"""The process that renders chat templates: `python -m loraplex_server.api.text.chat.renderer`.

A template is a program, and one that an adapter brings is somebody else's. It runs in jinja's sandbox, which
bounds neither time nor memory; so it runs here, with little memory, and the parent kills the process when an
answer takes too long. Nothing of the server is in this process: no weights, tokens, sockets or keys.

Frames on stdin and stdout are a 4-byte big-endian length and that many bytes of msgpack. The first frame on
stdout is an empty `Rendered` that says the process is ready.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

_MEMORY_BYTES = 256 << 20
_MAX_FRAME = 64 << 20


class Render(msgspec.Struct, frozen=True):
    """One rendering.

    Attributes:
        variables: the conversation and the special tokens, as templates know them.
        max_chars: a longer text is an error, found as soon as there is so much of it.
    """

    template: str
    variables: dict[str, Any]
    max_chars: int


class Rendered(msgspec.Struct, frozen=True):
    """The text, or what is wrong with the conversation ("refused") or with the template ("broken")."""

    text: str = ""
    refused: str = ""
    broken: str = ""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refusal(jinja2.TemplateError):
    """A template called `raise_exception`."""


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment.from_string(source)


def render(job: Render) -> Rendered:
    """Renders; raises only MemoryError, which ends the process."""
    try:
        parts, length = [], 0
        for part in _compile(job.template).generate(**job.variables):
            length += len(part)
            if length > job.max_chars:
                return Rendered(refused=f"they make a text of more than {job.max_chars} characters")
            parts.append(part)
        return Rendered("".join(parts))
    except _Refusal as error:
        return Rendered(refused=f"the chat template says: {error}"[:500])
    except MemoryError:
        raise
    except jinja2.TemplateError as error:
        return Rendered(broken=f"{type(error).__name__}: {error}"[:500])
    except Exception as error:
        # Whatever a template can make Python raise: wrong types, missing keys, recursion, big integers.
        return Rendered(broken=type(error).__name__)


def main() -> None:
    """Answers frame by frame until stdin ends."""
    # Systems other than Linux have only the time limit.
    with contextlib.suppress(OSError, ValueError):
        limit = _memory_in_use() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = msgspec.msgpack.Decoder(Render)
    _write(sys.stdout.buffer, Rendered())
    while (body := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, render(decoder.decode(body)))


def _memory_in_use() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read(stream: BinaryIO) -> bytes | None:
    header = stream.read(4)
    length = int.from_bytes(header, "big")
    if len(header) < 4 or length > _MAX_FRAME:
        return None
    body = stream.read(length)
    return body if len(body) == length else None


def _write(stream: BinaryIO, answer: Rendered) -> None:
    body = msgspec.msgpack.encode(answer)
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        # The parent sees that the process is gone, and whose template it was.
        sys.exit(1)
