"""What a field of the configuration says of itself: the one declaration that everything else is made from."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Group(enum.StrEnum):
    """Headings of the help, in its order."""

    MODEL = "base model"
    BATCHING = "batching"
    ADAPTERS = "adapters"
    REMOTE = "adapters from elsewhere"
    UPLOADS = "adapters that clients send"
    SERVING = "serving"
    LOG = "log"
    ACCESS = "who may call"


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may be."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    complaint: str = ""

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def problem(self, value: float) -> str:
        """What is wrong with `value`, which is not in it."""
        return f"{value} {self.complaint or f'is less than {self.least}'}"


NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(least=1)
SECONDS = Range(least=0, below=math.inf, complaint="is no number of seconds")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field of the configuration is for.

    Attributes:
        help: what `loraplex serve --help` says, without the default.
        name: what it is called outside, "" where that is the field's own name: `max_queue` is
            `--max-queue`, `LORAPLEX_SERVE_MAX_QUEUE`, and `max_queue` in the file.
        default: what the help says in place of the default value.
        range: of the number, or of each of several.
        unit: what a number counts, where its kind does not say.
        metavar: stands for the value in the help, where that of its kind says too little.
        detail: more than fits into the help.
    """

    group: Group
    help: str
    name: str = ""
    default: str = ""
    range: Range = Range()
    unit: str = ""
    metavar: str = ""
    detail: str = ""
