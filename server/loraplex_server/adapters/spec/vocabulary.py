"""Rows of the embedding and of the head that an adapter's file has of its own.

They come as whole tables, of which PEFT writes more than were trained (`save_embedding_layers`): a table that
lies under a pair, or that no setting asks for, counts where it differs from the base's. They come as rows of
trained tokens, which go on top. And where the base's head is its embedding, what PEFT loads into the one is
in the other as well. Tokens from the base's vocabulary on are the adapter's: it must have them in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loraplex_server.adapters.spec.declared import TokenRowsSpec
from loraplex_server.adapters.spec.peft_config import AdapterSettings, TokenSettings
from loraplex_server.adapters.spec.refusals import UnsupportedError
from loraplex_server.adapters.spec.sites import Entry, Part, SiteKind, SiteRegistry
from loraplex_server.adapters.spec.tensors import TensorInfo
from loraplex_server.core.text import quoted

Parts = Mapping[Part, TensorInfo]

ChangedTokens = Callable[[Entry, TensorInfo], Sequence[int]]
"""Tokens, ascending, whose rows of a table are not the base's; those that it does not have are among them."""

_PAIR = (Part.A, Part.B, Part.MAGNITUDE, Part.BIAS)


@dataclass(frozen=True)
class _Table:
    """A whole table. `own`: modules_to_save made it, so that every row of it is the adapter's."""

    tensor: TensorInfo
    own: bool


@dataclass(frozen=True)
class _Trained:
    tensor: TensorInfo
    tokens: tuple[int, ...]


def token_rows(
    settings: AdapterSettings,
    found: Mapping[Entry, Parts],
    registry: SiteRegistry,
    changed_tokens: ChangedTokens,
) -> dict[Entry, TokenRowsSpec]:
    """The rows that each entry of the vocabulary gets; no tokens where the file's table is the base's.

    Raises:
        UnsupportedError: they would not all be applied, or PEFT defines no result for them.
    """
    changed: dict[str, Sequence[int]] = {}

    def remembered(entry: Entry, table: TensorInfo) -> Sequence[int]:
        # A table that both ends share is looked at once.
        if table.name not in changed:
            changed[table.name] = changed_tokens(entry, table)
        return changed[table.name]

    entries = (*registry.of_kind(SiteKind.EMBEDDING), *registry.of_kind(SiteKind.HEAD))
    tables = {entry: _table(settings, entry, found.get(entry, {}), registry) for entry in entries}
    trained = _trained(settings, entries, found, registry.tied)
    if registry.tied:
        tables = _shared(tables)
    rows = {}
    for entry in entries:
        made = _rows(entry, tables[entry], trained.get(entry), registry, remembered)
        if made is not None:
            _check_alone(entry, found.get(entry, {}), made)
            rows[entry] = made
    added = {entry.path: added_tokens(rows.get(entry), registry.vocabulary) for entry in entries}
    if len(set(added.values())) > 1:
        counts = ", ".join(f"{path} {count}" for path, count in added.items())
        raise UnsupportedError(
            f"it adds tokens unevenly ({counts}); save it with save_embedding_layers=True, so that each "
            "added token has a row in the embedding and in the head"
        )
    return rows


def added_tokens(rows: TokenRowsSpec | None, vocabulary: int) -> int:
    """The number of tokens beyond a vocabulary that there are rows for."""
    return max(0, rows.tokens[-1] + 1 - vocabulary) if rows is not None and rows.tokens else 0


def _table(settings: AdapterSettings, entry: Entry, parts: Parts, registry: SiteRegistry) -> _Table | None:
    replaced = settings.replaced
    whole, base = parts.get(Part.WEIGHT), parts.get(Part.BASE)
    if whole is None and base is None:
        return None
    if whole is not None:
        if len(parts) > 1:
            other = next(tensor for tensor in parts.values() if tensor is not whole)
            raise UnsupportedError(f"tensor {quoted(other.name)} lies beside a whole copy of the same weight")
        own = replaced.saves(entry.path)
        if registry.tied and replaced.tied and entry.kind is SiteKind.HEAD:
            own = own or any(replaced.saves(e.path) for e in registry.of_kind(SiteKind.EMBEDDING))
        return _Table(whole, own)
    assert base is not None
    if not ({Part.A, Part.TOKENS} & parts.keys()):
        raise UnsupportedError(f"tensor {quoted(base.name)} has nothing beside it that would lie on it")
    return _Table(base, own=False)


def _shared(tables: dict[Entry, _Table | None]) -> dict[Entry, _Table | None]:
    """The tables where embedding and head are one: PEFT loads into both what it loads into the base's own."""
    loaded = next((table for table in tables.values() if table is not None and not table.own), None)
    return {entry: table or loaded for entry, table in tables.items()}


def _trained(
    settings: AdapterSettings, entries: Sequence[Entry], found: Mapping[Entry, Parts], tied: bool
) -> dict[Entry, _Trained]:
    replaced = settings.replaced
    for name in replaced.tokens:
        if name and not any(entry.path.endswith(name) for entry in entries):
            raise UnsupportedError(f"trainable_token_indices name {quoted(name)}, which is not an embedding")
    trained: dict[Entry, _Trained] = {}
    source: _Trained | None = None
    for entry in entries:
        tensor = found.get(entry, {}).get(Part.TOKENS)
        is_embedding = entry.kind is SiteKind.EMBEDDING
        tokens = replaced.tokens_at(entry.path, embedding=is_embedding)
        if isinstance(settings.method, TokenSettings):
            named = settings.targets.includes(entry.path, linear=False)
            tokens = replaced.tokens.get("") if named else None
        if tied and source is not None and tensor is None and tokens in (None, source.tokens):
            trained[entry] = source
            continue
        if tensor is not None and tokens is None and tied and source is not None:
            tokens = source.tokens
        if tensor is None and tokens is not None:
            raise UnsupportedError(
                f"tokens of {quoted(entry.path)} are to be trained, but the file has no rows for them; it "
                "was saved in part"
            )
        if tensor is None:
            continue
        if tokens is None:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} is for tokens that the configuration does not name"
            )
        trained[entry] = _Trained(tensor, tokens)
        if is_embedding:
            source = trained[entry]
    return trained


def _rows(
    entry: Entry,
    table: _Table | None,
    trained: _Trained | None,
    registry: SiteRegistry,
    changed_tokens: ChangedTokens,
) -> TokenRowsSpec | None:
    hidden, vocabulary = registry.hidden_size, registry.vocabulary
    tokens: Sequence[int] = ()
    if table is not None:
        tensor = table.tensor
        if len(tensor.shape) != 2 or tensor.shape[0] < vocabulary or tensor.shape[1] != hidden:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, "
                f"the base model needs [{vocabulary}, {hidden}], or more rows for added tokens"
            )
        tokens = range(tensor.shape[0]) if table.own else changed_tokens(entry, tensor)
    if trained is not None:
        if trained.tensor.shape != (len(trained.tokens), hidden):
            raise UnsupportedError(
                f"tensor {quoted(trained.tensor.name)} has shape {list(trained.tensor.shape)}, "
                f"the configuration needs {[len(trained.tokens), hidden]}"
            )
        if table is not None and table.own:
            raise UnsupportedError(
                f"tensor {quoted(trained.tensor.name)} would lie on {quoted(table.tensor.name)}: PEFT "
                "defines no result for both"
            )
        if table is not None and max(trained.tokens) >= table.tensor.shape[0]:
            raise UnsupportedError(
                f"tensor {quoted(trained.tensor.name)} is for token {max(trained.tokens)}, but "
                f"{quoted(table.tensor.name)} has {table.tensor.shape[0]} rows"
            )
        if not isinstance(tokens, range):
            tokens = tuple(sorted({*tokens, *trained.tokens}))
    if not tokens:
        return None if table is None else TokenRowsSpec((), table.tensor)
    if entry.has_bias:
        raise UnsupportedError(f"rows of its own for {quoted(entry.path)}, which has a bias, are not served")
    added = tokens[-1] + 1 - vocabulary
    if added > 0 and (added > len(tokens) or tokens[-added] != vocabulary):
        raise UnsupportedError(
            f"it has a row of {quoted(entry.path)} for token {tokens[-1]}, but not all from {vocabulary} on"
        )
    return TokenRowsSpec(
        tokens=tokens,
        table=None if table is None else table.tensor,
        trained=None if trained is None else trained.tensor,
        trained_tokens=() if trained is None else trained.tokens,
    )


def _check_alone(entry: Entry, parts: Parts, rows: TokenRowsSpec) -> None:
    """Refuses what PEFT does not put together, and a norm over rows that are not the base's."""
    pair = next((parts[part] for part in _PAIR if part in parts), None)
    if pair is None or not rows.tokens:
        return
    if rows.trained is not None:
        raise UnsupportedError(
            f"tensor {quoted(pair.name)} is beside trained tokens of the same weight: PEFT defines no result"
        )
    if Part.MAGNITUDE in parts:
        raise UnsupportedError(
            f"tensor {quoted(parts[Part.MAGNITUDE].name)} is beside rows that are not the base's; DoRA on "
            "them is not served"
        )
