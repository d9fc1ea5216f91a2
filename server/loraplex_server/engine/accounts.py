"""Accounts of the tokens computed for each tenant, and for each mix of adapters that it asks for."""

from __future__ import annotations

from collections.abc import Iterator


class Account:
    """Tokens computed for a tenant, or for a flow within it. Only the ledger changes it.

    Attributes:
        parent: the tenant of a flow; the root of a tenant.
        served: tokens; only differences between accounts of one parent mean anything.
        round: of a parent: the latest round in which one of its parts had a turn.
        waiting: sequences in the queue.
        live: sequences in the engine.
        wait_from_s, wait_until_s: since and until when its adapters were last waited for.
    """

    __slots__ = (
        "live",
        "name",
        "parent",
        "parts",
        "round",
        "served",
        "wait_from_s",
        "wait_until_s",
        "waiting",
    )

    def __init__(self, name: object, parent: Account | None) -> None:
        self.name = name
        self.parent = parent
        self.parts: dict[object, Account] = {}
        self.served = 0.0
        self.round = 0
        self.waiting = 0
        self.live = 0
        self.wait_from_s: float | None = None
        self.wait_until_s: float | None = None

    @property
    def awaits_adapters(self) -> bool:
        return self.wait_from_s is not None and self.wait_until_s is None

    def part(self, name: object) -> Account:
        """The account of that name below this one, made if there is none."""
        found = self.parts.get(name)
        if found is None:
            found = self.parts[name] = Account(name, self)
        return found

    def lineage(self) -> Iterator[tuple[Account, Account]]:
        """(account, its parent) from this one up."""
        account = self
        while account.parent is not None:
            yield account, account.parent
            account = account.parent
