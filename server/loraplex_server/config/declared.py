"""The settings that dataclasses declare: finding them, checking their values, and building from them.

A setting is a field of type `Annotated[T, Kind(...), Setting(...)]`; `Literal` and `bool` imply their kind. A
field whose type is a dataclass is a part with settings of its own. A part that may be None is None where none
of its settings is given.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from loraplex_server.config.kinds import SWITCH, Kind
from loraplex_server.config.setting import Group, Setting
from loraplex_server.core.errors import InvalidArgumentError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DeclaredSetting:
    """A setting with all that follows from its declaration.

    Attributes:
        name: the key in the file.
        attribute: the field of the class that declares it.
        default: as it is written outside; None is no value.
        required: it has no default.
    """

    name: str
    attribute: str
    setting: Setting
    kind: Kind
    default: Any
    required: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


class _Part(NamedTuple):
    """A field that holds settings of its own."""

    attribute: str
    cls: type[Any]
    optional: bool


# What each class declares: reading it takes longer than building one.
_READ: dict[type[Any], tuple[DeclaredSetting | _Part, ...]] = {}


def settings_of(cls: type[Any]) -> tuple[DeclaredSetting, ...]:
    """All settings of a class and its parts, group after group in the help's order."""
    groups = list(Group)
    return tuple(sorted(_walk(cls), key=lambda found: groups.index(found.setting.group)))


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of `cls` with its parts, from values by name as they are written outside.

    Raises:
        InvalidArgumentError: a value is out of range, or needs another beside it.
    """
    arguments: dict[str, Any] = {}
    for member in _members(cls):
        if isinstance(member, DeclaredSetting):
            arguments[member.attribute] = member.kind.inward(values[member.name])
        elif member.optional and not _is_given(member, values):
            arguments[member.attribute] = None
        else:
            arguments[member.attribute] = build(member.cls, values)
    return cls(**arguments)


def check(config: object) -> None:
    """Checks choices and ranges of a configuration's own settings.

    Raises:
        InvalidArgumentError: names the first that is wrong.
    """
    for found in _members(type(config)):
        if isinstance(found, _Part):
            continue
        value, kind = getattr(config, found.attribute), found.kind
        if isinstance(value, str) and kind.choices and value not in kind.choices:
            raise InvalidArgumentError.field(found.name, f"{value!r} is none of {', '.join(kind.choices)}")
        if (allowed := found.setting.range) is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number not in allowed:
                raise InvalidArgumentError.field(found.name, allowed.problem(number))


def _is_given(part: _Part, values: Mapping[str, Any]) -> bool:
    """True if any setting of an optional part has a value.

    Raises:
        InvalidArgumentError: one has, and another without a default has none.
    """
    if all(values[found.name] is None for found in _walk(part.cls)):
        return False
    required = [found for found in _walk(part.cls) if found.required]
    if any(values[found.name] is None for found in required):
        flags = " and ".join(found.flag for found in required)
        raise InvalidArgumentError.field(part.attribute, f"give both {flags}")
    return True


def _walk(cls: type[Any]) -> Iterator[DeclaredSetting]:
    for member in _members(cls):
        if isinstance(member, DeclaredSetting):
            yield member
        else:
            for found in _walk(member.cls):
                yield dataclasses.replace(found, required=found.required and not member.optional)


def _members(cls: type[Any]) -> tuple[DeclaredSetting | _Part, ...]:
    if cls not in _READ:
        hints = get_type_hints(cls, include_extras=True)
        _READ[cls] = tuple(_member(field, hints[field.name]) for field in dataclasses.fields(cls))
    return _READ[cls]


def _member(field: dataclasses.Field[Any], hint: Any) -> DeclaredSetting | _Part:
    if get_origin(hint) is not Annotated:
        optional = get_origin(hint) in (Union, types.UnionType)
        return _Part(field.name, get_args(hint)[0] if optional else hint, optional)
    inner, *remarks = get_args(hint)
    setting = next(remark for remark in remarks if isinstance(remark, Setting))
    kind = next((remark for remark in remarks if isinstance(remark, Kind)), None) or _implied_kind(inner)
    required = field.default is dataclasses.MISSING
    default = None if required or field.default is None else kind.outward(field.default)
    return DeclaredSetting(setting.name or field.name, field.name, setting, kind, default, required)


def _implied_kind(hint: Any) -> Kind:
    if get_origin(hint) is Literal:
        return Kind(choices=get_args(hint))
    assert hint is bool, hint
    return SWITCH
