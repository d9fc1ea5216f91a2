"""Patterns of a configuration: which modules of the base model they name.

They mean what they mean to PEFT:

- `rank_pattern` and `alpha_pattern`: the first key, in the file's order, that matches the module path as a
  regular expression, either whole or from a "." on;
- `target_modules` and `exclude_modules`: a string is a regular expression for the whole path (or
  "all-linear"), a list names whole paths or their endings from a "." on;
- `layers_to_transform` counts only where `target_modules` is a list and the module is not named whole.

Configurations come from outside, so matching has a time limit.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal

import regex

from loraplex_server.adapters.spec.refusals import UnsupportedError
from loraplex_server.core.text import quoted

MAX_PATTERN_CHARS = 4096
"""Longest pattern that is compiled: a pattern names modules, and they are few or follow a rule."""

MATCH_SECONDS = 1.0
"""Time that all patterns of one adapter may take; thousands of simple ones take less."""

_QUICK_SECONDS = 0.02
"""Time that a match may hold the interpreter's lock, which the engine needs; most take far less."""

_WITHOUT_REPEATS = re.compile(r"[\w.\\\[\]-]{0,4096}")
"""Patterns without repetition, choice or groups: they cannot take long, and `re` is faster than `regex`."""

_HEADS = frozenset({"lm_head", "embed_out", "output"})


class Patterns:
    """Matches regular expressions from outside within one time limit for all of them.

    Every method raises UnsupportedError for what is no regular expression, or takes too long.
    """

    def __init__(self) -> None:
        self._left_s = MATCH_SECONDS
        self._simple: dict[str, re.Pattern[str]] = {}
        self._others: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, path: str) -> bool:
        """True if `pattern` matches the whole path."""
        return self._matches(pattern, pattern, path)

    def ends_with(self, pattern: str, path: str) -> bool:
        """True if `pattern` matches the whole path or its end from a "." on."""
        return self._matches(pattern, rf"(.*\.)?({pattern})", path)

    def layer(self, pattern: str, path: str) -> int | None:
        """The number in the group `idx` of a match at the beginning of `path`."""
        match = self._search(pattern, path, "match")
        return None if match is None else int(match.group("idx"))

    def _matches(self, given: str, pattern: str, path: str) -> bool:
        if _WITHOUT_REPEATS.fullmatch(given) is None:
            return self._search(pattern, path, "fullmatch") is not None
        if pattern not in self._simple:
            try:
                self._simple[pattern] = re.compile(pattern)
            except re.error as error:
                raise UnsupportedError(f"{quoted(given)} is not a regular expression") from error
        return self._simple[pattern].fullmatch(path) is not None

    def _search(self, pattern: str, path: str, how: Literal["match", "fullmatch"]) -> regex.Match[str] | None:
        search = getattr(self._compile(pattern), how)
        begin = time.monotonic()
        try:
            try:
                return search(path, timeout=_QUICK_SECONDS)
            except TimeoutError:
                # Once more without the interpreter's lock, so that the engine goes on meanwhile.
                return search(path, timeout=max(self._left_s, _QUICK_SECONDS), concurrent=True)
        except TimeoutError as error:
            raise UnsupportedError(f"the pattern {quoted(pattern)} takes too long to match") from error
        finally:
            self._left_s -= time.monotonic() - begin

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise UnsupportedError(f"pattern {quoted(pattern, 60)} has over {MAX_PATTERN_CHARS} characters")
        if pattern not in self._others:
            try:
                self._others[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise UnsupportedError(f"{quoted(pattern)} is not a regular expression") from error
        return self._others[pattern]


@dataclass(frozen=True)
class Targets:
    """The modules that a configuration puts something on.

    Attributes:
        modules: a regular expression, a list, or None where the file leaves it to the tensors.
    """

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    patterns: Patterns

    def includes(self, path: str, *, linear: bool = True) -> bool:
        """True if the module at `path` is one of them; `linear` as "all-linear" means it."""
        if self._excludes(path):
            return False
        target = self.modules
        if target is None:
            return True
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return linear and path.rpartition(".")[2] not in _HEADS
            return self.patterns.fullmatch(target, path)
        if path in target:
            return True
        if not any(path.endswith(f".{name}") for name in target):
            return False
        return not self.layers or self._layer(path) in self.layers

    def _excludes(self, path: str) -> bool:
        excluded = self.excluded
        if isinstance(excluded, str):
            return bool(excluded) and self.patterns.fullmatch(excluded, path)
        return any(path == name or path.endswith(f".{name}") for name in excluded or ())

    def _layer(self, path: str) -> int | None:
        if not self.layers_pattern:
            return self.patterns.layer(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        patterns = (rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.layers_pattern)
        layers = (self.patterns.layer(pattern, path) for pattern in patterns)
        return next((layer for layer in layers if layer is not None), None)
