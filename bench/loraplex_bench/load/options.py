"""Options that several benches have, said in one way."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_count(parser: argparse.ArgumentParser, flag: str, default: int, help_text: str) -> None:
    """A whole number."""
    parser.add_argument(
        flag, type=int, default=default, metavar="N", help=f"{help_text} (default: {default})"
    )


def add_quantization(parser: argparse.ArgumentParser, default: str) -> None:
    """`--quantization`, of the base model."""
    parser.add_argument(
        "--quantization",
        choices=("nf4", "int4", "none"),
        default=default,
        help=f"of the base (default: {default})",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output`, for `report.write_result`."""
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the table and the raw numbers there"
    )


def settings_of(kind: type[Settings], args: argparse.Namespace, **others: Any) -> Settings:
    """A dataclass of settings, from the options that have its fields' names, and `others`."""
    assert dataclasses.is_dataclass(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(args).items() if name in names} | others)
