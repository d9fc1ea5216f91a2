"""Requests that wait for a grammar: to be compiled, or to take in the last token.

Both happen on threads of `Grammars`, while the engine steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait

from loraplex_server.core.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServerError,
)
from loraplex_server.core.request import FinishReason
from loraplex_server.engine.grammar_matcher import GrammarMatcher
from loraplex_server.engine.grammars import Grammars
from loraplex_server.engine.sequence import Sequence, Status

_log = logging.getLogger(__name__)

COMPILE_S = 30.0
"""Longest that a request waits for its grammar to be compiled."""

_FOLLOW_S = 0.005
"""Longest that a step waits for grammars to take in the last tokens. Mostly they have before; a sequence
whose grammar has not sits the step out."""


class StructuredOutput:
    """Keeps the sequences that wait for a grammar, and says what became of each."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self.compiling: dict[Sequence, Future[GrammarMatcher]] = {}
        self._following: dict[Future[None], Sequence] = {}

    def compile(self, sequence: Sequence) -> None:
        """Has a sequence's grammar compiled; `compiled` tells when it is."""
        assert sequence.request.structure is not None
        self.compiling[sequence] = self._grammars.start(sequence.request.structure)

    def compiled(self, now_s: float) -> Iterator[tuple[Sequence, ServerError | None]]:
        """Sequences that wait no longer: they have a matcher now, or the error that ends them."""
        for sequence, compilation in list(self.compiling.items()):
            deadline_s = sequence.request.deadline_s
            error: ServerError | None = None
            if compilation.done():
                error = _take(compilation, sequence)
            elif deadline_s is not None and deadline_s <= time.time():
                error = DeadlineExceededError("the deadline passed before the structure was compiled")
            elif now_s - sequence.arrival_s > COMPILE_S:
                error = ResourceExhaustedError(
                    f"the structure was not compiled in {COMPILE_S:g} s; make it simpler, or try again",
                    retry_after_s=1.0,
                )
            else:
                continue
            if error is None:
                del self.compiling[sequence]
            yield sequence, error

    def drop(self, sequence: Sequence) -> bool:
        """Forgets a sequence whose grammar is being compiled; whether it was."""
        compilation = self.compiling.pop(sequence, None)
        if compilation is not None:
            compilation.cancel()
        return compilation is not None

    def follow(self, sequence: Sequence, token_id: int) -> None:
        """Has a sequence's matcher take in its last token; until then the sequence is not scheduled."""
        assert sequence.matcher is not None
        sequence.matcher.ready = False
        self._following[self._grammars.follow(sequence.matcher, token_id)] = sequence

    def followed(self) -> Iterator[tuple[Sequence, FinishReason | ServerError]]:
        """Sequences that end, since the answer is whole or cannot go on; the others may be scheduled again.

        Waits a moment for those that are not known yet, so that they need not sit out a step.
        """
        if not self._following:
            return
        for future in wait(self._following, _FOLLOW_S).done:
            sequence = self._following.pop(future)
            if sequence.status is Status.FINISHED:
                continue
            if (raised := future.exception()) is not None:
                _log.error("a structure could not be followed", exc_info=raised)
                yield sequence, InternalError("the structure could not be followed")
            elif (end := self._end_of(sequence)) is not None:
                yield sequence, end

    def _end_of(self, sequence: Sequence) -> FinishReason | ServerError | None:
        """The end of a sequence whose matcher has taken in the last token; None if it goes on."""
        matcher, structure = sequence.matcher, sequence.request.structure
        assert matcher is not None
        assert structure is not None
        if matcher.complete:
            return FinishReason.STOP
        if sequence.is_full():
            return FinishReason.LENGTH
        if matcher.error:
            # Whatever the others found out is too much for a new one, too.
            self._grammars.forget(structure)
            said = f"cannot be followed any further: {matcher.error}"
            return InvalidArgumentError.field(f"structure.{structure.kind}", said)
        matcher.ready = True
        return None


def _take(compilation: Future[GrammarMatcher], sequence: Sequence) -> ServerError | None:
    """Gives a sequence the matcher that was made for it; why there is none."""
    raised = compilation.exception()
    if raised is None:
        sequence.matcher = compilation.result()
        return None
    if isinstance(raised, ServerError):
        return raised
    # A panic in the grammar's library is no Exception.
    _log.error("a structure could not be compiled", exc_info=raised)
    return InternalError("the structure could not be compiled")
