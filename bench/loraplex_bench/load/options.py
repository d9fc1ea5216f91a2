"""Options that several benches have, said in one way."""

from __future__ import annotations

import argparse
from pathlib import Path


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
