"""Kinds of values that a setting can have: how each is written outside, and what the configuration holds.

Outside is the command line, the environment and the file. A field of the configuration says its kind by its
type: `Annotated[Size, Setting(...)]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to write and read values.

    Attributes:
        parse: makes a value of text; raises ValueError, which says what to write.
        metavar: stands for the value in the help; "" leaves that to argparse.
        unit: what a number counts.
        choices: the only values; () is any.
        repeatable: the flag may be given several times. Its values are an array in the file, and separated
            by commas in the environment.
        switch: the flag has no value.
        inward: the field's value, of the value as it is written.
        outward: the reverse of it.
        show: the value in the help.
    """

    parse: Callable[[str], Any] = str
    metavar: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    repeatable: bool = False
    switch: bool = False
    inward: Callable[[Any], Any] = _same
    outward: Callable[[Any], Any] = _same
    show: Callable[[Any], str] = str


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "2GB", "1.5g" or "1048576". A bare k, m, g or t is a power of 1024.

    Raises:
        ValueError: `text` is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 2GB or 1048576")
    number, unit, binary = match.groups()
    base = 1000 if unit and not binary and text.strip().lower().endswith("b") else 1024
    return int(float(number) * base ** " kmgt".index(unit.lower() or " "))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of numbers; write for example 1,2,4,8") from error


def _existing_folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{text} is not a folder")
    return path


def _show_size(size: int) -> str:
    return f"{size >> 20}MiB" if size else "0"


SWITCH = Kind(switch=True)
_FILE = Kind(parse=Path, metavar="FILE")

Text = Annotated[str, Kind()]
Count = Annotated[int, Kind(parse=int, metavar="N")]
Share = Annotated[float, Kind(parse=float, metavar="F", show="{:g}".format)]
Seconds = Annotated[float, Kind(parse=float, metavar="S", unit="seconds", show="{:g}".format)]
Size = Annotated[int, Kind(parse=parse_size, metavar="SIZE", unit="bytes", show=_show_size)]
# One flag with commas in it.
Numbers = Annotated[tuple[int, ...], Kind(parse=_numbers, metavar="N,N,...")]
File = Annotated[Path, _FILE]
OptionalFile = Annotated[Path | None, _FILE]
OptionalFolder = Annotated[Path | None, Kind(parse=Path, metavar="DIR")]
ExistingFolders = Annotated[
    tuple[Path, ...],
    Kind(parse=_existing_folder, metavar="DIR", repeatable=True, inward=tuple, outward=list),
]
Texts = Annotated[tuple[str, ...], Kind(repeatable=True, inward=tuple, outward=list)]
OnOff = Annotated[
    bool,
    Kind(
        choices=("on", "off"),
        inward=lambda text: text == "on",
        outward=lambda value: "on" if value else "off",
    ),
]
# A switch that turns off what is on without it.
OffSwitch = Annotated[
    bool, Kind(switch=True, inward=lambda given: not given, outward=lambda value: not value)
]
