"""A request as the engine works on it: tokens known, tokens computed, and what it holds."""

from __future__ import annotations

import bisect
import dataclasses
import enum
import time
from collections.abc import Iterator

from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.core.request import Request
from loraplex_server.engine.accounts import Account
from loraplex_server.engine.drafts import Drafter
from loraplex_server.engine.grammar_matcher import GrammarMatcher
from loraplex_server.engine.kv_blocks import block_key
from loraplex_server.engine.token_counts import TokenCounts

EFFECT_VERSION = 1
"""Grows when what an adapter's bytes mean for keys and values changes."""

Mix = tuple[tuple[AdapterHandle, float], ...]
"""The weighted adapters of one token."""

_NEVER = 1 << 62

# The parent of a first block; as long as a key, so that no two blocks' contents are written alike.
_ROOT = bytes(16)


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. The scheduler owns `status`, `block_table` and `reserved`.

    Attributes:
        client: connection that submitted the request.
        handles: its adapters, resolved, in the request's order.
        max_model_len: tokens that any sequence may have.
        max_length: tokens, prompt included, that this one may have.
        token_ids: prompt and generated tokens known so far.
        num_prompt: those that were not generated, virtual ones included.
        num_virtual: rows of a soft prompt or a prefix, which come first.
        num_prefix: how many of these are a prefix's: copied to the cache when it is admitted, not computed.
        num_computed: how many of them have their keys and values in the cache.
        scored_to: the tokens that follow those before this position have their log-probabilities, as far as
            they are asked for.
        block_table: KV blocks it holds, in the order of positions.
        block_keys: keys of its full blocks of known tokens, as far as they were asked for.
        num_named: blocks at the beginning of the table whose keys the pool was told.
        caches: its blocks may be had by others, and it may have theirs.
        group: those others, where they are not all whose prompts begin alike: the prompt's blocks are for the
            members of the group, and nobody finds them after the last.
        cached_prompt_tokens: tokens of its prompt that it found in the cache when it was first admitted.
        reserved: it holds device references to its adapters.
        awaited: its last token is not known yet: it is this one of those that the step in flight samples.
        flow: the account of what it is given; the scheduler's ledger sets it.
        matcher: follows its answer in its grammar; None for free text.
        drafter: drafts its next tokens; None does not.
    """

    request: Request
    client: str
    handles: tuple[AdapterHandle, ...]
    arrival_s: float = dataclasses.field(default_factory=time.monotonic)
    max_model_len: int = _NEVER
    max_length: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_prompt: int = 0
    num_virtual: int = 0
    num_prefix: int = 0
    num_computed: int = 0
    scored_to: int = 0
    status: Status = Status.WAITING
    block_table: list[int] = dataclasses.field(default_factory=list)
    block_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_named: int = 0
    caches: bool = False
    group: tuple[str, str] | None = None
    cached_prompt_tokens: int = 0
    reserved: bool = False
    awaited: int | None = None
    flow: Account | None = None
    matcher: GrammarMatcher | None = None
    drafter: Drafter | None = None
    preemptions: int = 0
    adapter_wait_start_s: float | None = None
    adapter_wait_s: float = 0.0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    token_counts: TokenCounts = dataclasses.field(default_factory=TokenCounts)
    _changes: tuple[int, ...] = ()
    _mixes: tuple[Mix, ...] = ((),)
    _namespaces: dict[tuple[int, ...], bytes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        prompt = self.request.prompt_token_ids
        # A virtual token has no id: row r of a soft prompt is written -1 - r.
        self.num_virtual = sum(handle.num_virtual_tokens for handle in self.handles)
        self.num_prefix = sum(handle.num_prefix_tokens for handle in self.handles)
        self.token_ids = [*(-1 - row for row in range(self.num_virtual)), *prompt]
        self.num_prompt = len(self.token_ids)
        self.max_length = min(self.num_prompt + self.request.sampling.max_tokens, self.max_model_len)
        scored = self.request.sampling.prompt_logprobs is not None
        self.scored_to = self.num_virtual if scored else self.num_prompt - 1
        uses = zip(self.handles, self.request.adapters, strict=True)
        spans = [(*_span(handle, prompt), handle, use.weight) for handle, use in uses]
        edges = {edge for start, end, *_ in spans for edge in (start, end)}
        self._changes = tuple(sorted(edge for edge in edges if 0 < edge < _NEVER))
        self._mixes = tuple(
            tuple((handle, weight) for start, end, handle, weight in spans if start <= position < end)
            for position in (0, *self._changes)
        )

    @property
    def held_back(self) -> bool:
        """True until its grammar has taken in the last token."""
        return self.matcher is not None and not self.matcher.ready

    def is_full(self, more: int = 0) -> bool:
        """True if with `more` tokens than it has it is as long as it may be."""
        return len(self.token_ids) + more >= self.max_length

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet computed: 1 when decoding, more when prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are still to be computed."""
        return self.num_prompt - 1 - self.scored_to

    def scored_in(self, num_tokens: int) -> range:
        """Positions, of the next `num_tokens` computed, whose following token is scored."""
        end = min(self.num_computed + num_tokens, self.num_prompt - 1)
        return range(max(self.num_computed, self.scored_to), end)

    def most_tokens(self, scores: int) -> int:
        """Tokens that can be computed next with no more than so many of them scored."""
        if self.num_unscored <= scores:
            return self.num_pending
        return max(0, self.scored_to - self.num_computed) + scores

    def adapters_at(self, position: int) -> Mix:
        """The adapters, with weights, that apply to the token at `position`.

        An adapter belongs to a token, not to a request: an activated LoRA begins in the middle of the row, a
        soft prompt is its own rows and nothing else.
        """
        return self._mixes[bisect.bisect_right(self._changes, position)]

    @property
    def adapter_changes(self) -> tuple[int, ...]:
        """Positions, ascending, at which `adapters_at` begins to answer otherwise than before them."""
        return self._changes

    def reusable_keys(self, block_size: int) -> Iterator[bytes]:
        """Keys, in order, of the full blocks that it need not compute itself if they are cached.

        Its adapters have to be READY: before, their content is not known. The last known token is always
        computed: its logits are wanted, as are those of the tokens whose next is scored.
        """
        if self.caches:
            end = self.scored_to if self.num_unscored else len(self.token_ids) - 1
            for index in range(self._shared(end, block_size)):
                yield self._key(index, block_size)

    def will_fill(self, index: int, key: bytes, block_size: int) -> bool:
        """True if computing its known tokens will fill the block at `index` of the table as `key` says."""
        ahead = self.num_named <= index < self._shared(len(self.token_ids), block_size)
        return ahead and self._key(index, block_size) == key

    def new_block_keys(self, block_size: int) -> list[tuple[int, bytes]]:
        """(block, key) of each block that became full since the last call."""
        first, full = self.num_named, self._shared(self.num_computed, block_size)
        if first >= full or not self.caches:
            return []
        self.num_named = full
        return [(self.block_table[index], self._key(index, block_size)) for index in range(first, full)]

    def _shared(self, num_tokens: int, block_size: int) -> int:
        """Number of full blocks of the first `num_tokens` that others may have."""
        return (num_tokens if self.group is None else min(num_tokens, self.num_prompt)) // block_size

    def _key(self, index: int, block_size: int) -> bytes:
        """Key of the block at `index` of the table, and of those before it, each computed once."""
        keys = self.block_keys
        while len(keys) <= index:
            begin = len(keys) * block_size
            end = begin + block_size
            parent = keys[-1] if keys else _ROOT
            keys.append(block_key(parent, self.token_ids[begin:end], self._namespace(begin, end)))
        return keys[index]

    def _namespace(self, begin: int, end: int) -> bytes:
        """Whose KV the positions from `begin` to `end` are: the tenant, content and weight of each adapter in
        order, where in the block it changes, and the group."""
        changes: tuple[int, ...] = ()
        place: tuple[int, ...] = ()
        if self._changes and begin < self._changes[-1]:
            changes = tuple(change for change in self._changes if begin < change < end)
            place = (bisect.bisect_right(self._changes, begin), *(change - begin for change in changes))
        if place not in self._namespaces:
            parts = [
                (start - begin, [(_content(handle), weight) for handle, weight in self.adapters_at(start)])
                for start in (begin, *changes)
            ]
            group = () if self.group is None else (self.group,)
            self._namespaces[place] = repr((self.request.tenant, EFFECT_VERSION, parts, *group)).encode()
        return self._namespaces[place]


def _content(handle: AdapterHandle) -> str:
    assert handle.content_hash, f"adapter {handle.name} was not read yet"
    return handle.content_hash


def _span(handle: AdapterHandle, prompt: tuple[int, ...]) -> tuple[int, int]:
    """First and end position at which an adapter applies."""
    if handle.num_virtual_tokens:
        return 0, handle.num_virtual_tokens
    invocation = handle.invocation_tokens
    if not invocation:
        return 0, _NEVER
    # As PEFT has it: from the last invocation in the prompt on, and not at all without one.
    width = len(invocation)
    starts = (at for at in range(len(prompt) - width, -1, -1) if prompt[at : at + width] == invocation)
    return next(starts, _NEVER), _NEVER
