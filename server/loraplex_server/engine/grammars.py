"""Grammars of structured output: compiled, and followed token by token, on threads of their own."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.core.request import Structure
from loraplex_server.engine.grammar_matcher import GrammarMatcher, reason

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

_FutureT = TypeVar("_FutureT", bound=Future[Any])

_COMPILERS = 2
_MAX_FOLLOWERS = 8

_KEPT = 32
"""Compiled structures that are kept for later answers; each may hold 100 MB (see `_limits`)."""

_ANSWERS = 64
"""Answers that share one compiled grammar, whose tables grow with each; the next one gets a new grammar."""

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Whitespace between JSON's tokens: any, but bounded, so that a model cannot go on with it for ever."""

_META = re.compile(r"[\\.+*?()|\[\]{}^$/&~#-]")


class Grammars:
    """Compiles structures to grammars, and has matchers follow answers. May be called from any thread.

    What takes long runs on two sets of threads, so that no step of the engine waits for a grammar.
    """

    def __init__(
        self, load_tokens: Callable[[], LLTokenizer], vocab_size: int, wake: Callable[[], None] | None = None
    ) -> None:
        """
        Args:
            load_tokens: called once, by the first structure.
            vocab_size: tokens of the base model.
            wake: called, from any thread, when something is done.
        """
        self._load_tokens = load_tokens
        self._vocab_size = vocab_size
        self._wake = wake
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._known: OrderedDict[Structure, _Entry] = OrderedDict()
        # Their threads begin when there is something to do.
        self._compilers = ThreadPoolExecutor(_COMPILERS, "grammar-compile")
        followers = min(_MAX_FOLLOWERS, max(1, (os.cpu_count() or 1) // 2))
        self._followers = ThreadPoolExecutor(followers, "grammar-follow")

    def start(self, structure: Structure) -> Future[GrammarMatcher]:
        """A matcher for a new answer that is held to this structure.

        The future may be cancelled. It ends with a ServerError if the structure has no grammar, and with
        another exception if something is broken.
        """
        return self._told(self._compilers.submit(self._start, structure))

    def follow(self, matcher: GrammarMatcher, token_id: int) -> Future[None]:
        """Has a matcher take in a token; the future ends once it knows what may come next."""
        return self._told(self._followers.submit(matcher.follow, token_id))

    def forget(self, structure: Structure) -> None:
        """Has the structure compiled anew for the next answer, which shares nothing with those before it."""
        with self._lock:
            self._known.pop(structure, None)

    def _told(self, future: _FutureT) -> _FutureT:
        if self._wake is not None:
            wake = self._wake
            future.add_done_callback(lambda _: wake())
        return future

    def _start(self, structure: Structure) -> GrammarMatcher:
        with self._lock:
            entry = self._known.setdefault(structure, _Entry())
            self._known.move_to_end(structure)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        with entry.lock:
            if entry.first is None or entry.answers >= _ANSWERS:
                entry.first, entry.answers = self._compile(structure), 0
            entry.answers += 1
            return entry.first.copy()

    def _compile(self, structure: Structure) -> GrammarMatcher:
        field = f"structure.{structure.kind}"
        try:
            tokens = self._token_trie()
            from llguidance import LLMatcher

            source = _source(structure)
            matcher = LLMatcher(tokens, source, log_level=0, limits=_limits())
            if matcher.is_error():
                raise InvalidArgumentError.field(field, reason(matcher.get_error()))
            first = GrammarMatcher(matcher, self._vocab_size, tokens.vocab_size)
            first.look()
        except ValueError as error:
            raise InvalidArgumentError.field(field, reason(str(error))) from error
        if first.error:
            raise InvalidArgumentError.field(field, f"cannot be followed: {first.error}")
        return first

    def _token_trie(self) -> LLTokenizer:
        with self._loading:
            if self._tokens is None:
                self._tokens = self._load_tokens()
            return self._tokens


class _Entry:
    """A structure, compiled or about to be.

    Attributes:
        first: a matcher before the first token; every answer gets a copy.
        answers: copies given out.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.first: GrammarMatcher | None = None
        self.answers = 0


def no_tokens() -> LLTokenizer:
    """For an engine that has no tokenizer.

    Raises:
        FailedPreconditionError: always.
    """
    raise FailedPreconditionError("structured output needs the model's tokenizer, which this engine has not")


def _source(structure: Structure) -> str:
    """The structure as llguidance writes grammars. Raises: ValueError if it cannot."""
    from llguidance import LLMatcher

    match structure.kind:
        case "json_schema" | "json_object":
            schema = structure.text if structure.kind == "json_schema" else json.dumps({"type": "object"})
            # A schema may say itself what stands between tokens.
            says = '"x-guidance"' in schema
            return LLMatcher.grammar_from_json_schema(
                schema, defaults=None if says else {"whitespace_pattern": _WHITESPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(structure.text)
        case "grammar":
            return LLMatcher.grammar_from_lark(structure.text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(_literal(text) for text in structure.choices))
        case kind:
            raise ValueError(f"there is no structure {kind!r}")


def _literal(text: str) -> str:
    """An expression that matches `text` alone."""
    return _META.sub(lambda match: f"\\{match[0]}", text)


def _limits() -> LLParserLimits:
    """Limits of one grammar: some tens of milliseconds for a mask, 100 MB for what its answers share."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False)
