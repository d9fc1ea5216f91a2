"""Writes docs/reference/grpc.md from protos/: services, messages, fields and enums with their comments.

Run in the repository's root: `python tools/grpc_reference.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "grpc.md"

_HEAD = """# gRPC API

<!-- Made from protos/ by `make reference`: edit the comments there. -->

The package is `loraplex.v1`; the files lie in `protos/loraplex/v1`. Beside the services below the server has
gRPC's standard health service and, unless `--no-reflection` is given, reflection. [Errors](errors.md) has
those of all calls.
"""

# Numbers of fields in descriptor.proto, which paths of source locations consist of.
_MESSAGE, _ENUM, _SERVICE, _FIELD_OF_MESSAGE, _NESTED, _VALUE_OF_ENUM, _METHOD = 4, 5, 6, 2, 3, 2, 2

Comments = dict[tuple[int, ...], str]


def read_protos() -> FileDescriptorSet:
    """All files of the contract, with their comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "protos.bin"
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
        command += [f"--descriptor_set_out={out}", "--include_source_info"]
        command += [str(path) for path in sorted((ROOT / "protos/loraplex/v1").glob("*.proto"))]
        subprocess.run(command, check=True)
        return FileDescriptorSet.FromString(out.read_bytes())


def page() -> str:
    """The whole page."""
    files = read_protos().file
    comments = [_comments(file) for file in files]
    parts = [_HEAD]
    for file, said in zip(files, comments, strict=True):
        parts += _services(file, said)
    parts.append("## Messages\n")
    for file, said in zip(files, comments, strict=True):
        for index, message in enumerate(file.message_type):
            parts += _message(message, said, (_MESSAGE, index), "")
        for index, enum in enumerate(file.enum_type):
            parts += _enum(enum, said, (_ENUM, index), "")
    return "\n".join(parts).rstrip() + "\n"


def _comments(file: FileDescriptorProto) -> Comments:
    return {
        tuple(place.path): place.leading_comments.strip()
        for place in file.source_code_info.location
        if place.leading_comments
    }


def _services(file: FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for index, service in enumerate(file.service):
        path = (_SERVICE, index)
        yield f"## {service.name}\n\n{_prose(comments.get(path, ''))}\n"
        for number, method in enumerate(service.method):
            stream_in = "stream " if method.client_streaming else ""
            stream_out = "stream " if method.server_streaming else ""
            yield f"### {service.name}.{method.name}\n"
            yield (
                f"{stream_in}{_link(method.input_type)} → {stream_out}{_link(method.output_type)}\n\n"
                f"{_prose(comments.get((*path, _METHOD, number), ''))}\n"
            )


def _message(
    message: DescriptorProto, comments: Comments, path: tuple[int, ...], outer: str
) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    yield f"### {name}\n"
    if text := _prose(comments.get(path, "")):
        yield f"{text}\n"
    maps = {f".{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    rows = [
        f"| `{field.name}` | {_type(field, maps)} | {field.number} | "
        f"{_cell(comments.get((*path, _FIELD_OF_MESSAGE, index), ''))} |"
        for index, field in enumerate(message.field)
    ]
    if rows:
        yield "\n".join(["| field | type | number | meaning |", "|---|---|---|---|", *rows]) + "\n"
    for index, nested in enumerate(message.nested_type):
        yield from _message(nested, comments, (*path, _NESTED, index), f"{name}.")


def _enum(enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...], outer: str) -> Iterator[str]:
    yield f"### {outer}{enum.name}\n"
    if text := _prose(comments.get(path, "")):
        yield f"{text}\n"
    rows = [
        f"| `{value.name}` | {value.number} | {_cell(comments.get((*path, _VALUE_OF_ENUM, index), ''))} |"
        for index, value in enumerate(enum.value)
    ]
    yield "\n".join(["| value | number | meaning |", "|---|---|---|", *rows]) + "\n"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    for suffix, entry in maps.items():
        if field.type_name.endswith(suffix):
            key, value = entry.field
            return f"map from {_type(key, {})} to {_type(value, {})}"
    name = (
        _link(field.type_name)
        if field.type_name
        else FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    """A type's name, linked where this page has it."""
    name = type_name.removeprefix(".loraplex.v1.")
    if name == type_name:
        return f"`{type_name.removeprefix('.')}`"
    return f"[{name}](#{re.sub('[^a-z0-9_-]', '', name.lower())})"


def _prose(comment: str) -> str:
    """A comment as paragraphs."""
    paragraphs = re.split(r"\n\s*\n", comment)
    return "\n\n".join(" ".join(line.strip() for line in part.splitlines()) for part in paragraphs).replace(
        "<", "&lt;"
    )


def _cell(comment: str) -> str:
    return _prose(comment).replace("\n\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
