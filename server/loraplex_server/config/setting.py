"""The remarks on a field of the configuration, from which all else about a setting is made."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Group(enum.StrEnum):
    """Headings of the help, in its order."""

    MODEL = "base model"
    BATCHING = "batching"
    ADAPTERS = "adapters"
    REMOTE = "downloaded adapters"
    UPLOADS = "uploaded adapters"
    SERVING = "serving"
    LOG = "log"
    ACCESS = "access"


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may be."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def problem(self, value: float) -> str:
        """The bound that `value` breaks; it is not in the range."""
        if not math.isfinite(value):
            return f"{value} is not a finite number"
        if value < self.least:
            return f"{value} is less than {self.least}"
        if value <= self.above:
            return f"{value} is not more than {self.above}"
        return (
            f"{value} is more than {self.most}"
            if value > self.most
            else f"{value} is not less than {self.below}"
        )


NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(least=1)
SECONDS = Range(least=0, below=math.inf)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The remark that makes a field of the configuration a setting.

    Attributes:
        help: what `loraplex serve --help` says, without the default.
        name: what it is called outside, "" where that is the field's own name: `max_queue` is
            `--max-queue`, `LORAPLEX_SERVE_MAX_QUEUE`, and `max_queue` in the file.
        default: what the help says in place of the default value.
        range: of the number, or of each of several; None is any.
        unit: what a number counts, where its kind does not say.
        metavar: stands for the value in the help, where that of its kind says too little.
        detail: more than fits into the help.
    """

    group: Group
    help: str
    name: str = ""
    default: str = ""
    range: Range | None = None
    unit: str = ""
    metavar: str = ""
    detail: str = ""
