"""One step's choice of sequences and tokens, as the scheduler makes it and planning reads it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from loraplex_server.core.errors import ServerError
from loraplex_server.engine.sequence import Sequence


class FailedSequence(NamedTuple):
    """A sequence that will never run, or no further; it holds nothing of the scheduler's any more."""

    sequence: Sequence
    error: ServerError


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """`num_tokens` of `sequence` are computed, from `sequence.num_computed` on.

    Its properties are about the sequence as it is until the step is launched.

    Attributes:
        num_copied: virtual tokens before these whose keys and values are first copied from the adapter.
        drafts: draft tokens computed after them; a token is sampled after each of these, too.
    """

    sequence: Sequence
    num_tokens: int
    num_copied: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def scores(self) -> range:
        """Positions of the chunk whose following token is scored."""
        return self.sequence.scored_in(self.num_tokens) if self.sequence.num_unscored else range(0)

    @property
    def samples(self) -> bool:
        """True if the chunk reaches the last known token, so that the next one is sampled."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_samples(self) -> int:
        """Rows of it after which a token is sampled."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def num_rows(self) -> int:
        """Tokens that are computed, drafts included."""
        return self.num_tokens + len(self.drafts)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step's choice."""

    scheduled: tuple[Scheduled, ...]
    failed: tuple[FailedSequence, ...]
    preemptions: int
