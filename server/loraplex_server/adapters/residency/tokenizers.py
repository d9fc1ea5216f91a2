"""The tokenizers that adapters bring, and what is new of them."""

from __future__ import annotations

import msgspec

from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.core.tokenizer_source import TokenizerSource


class Tokenizers:
    """Tokenizers by the name of their adapter."""

    def __init__(self) -> None:
        self._known: dict[str, TokenizerSource] = {}
        self._new: dict[str, TokenizerSource | None] = {}

    @property
    def known(self) -> dict[str, TokenizerSource]:
        """A copy of all there are."""
        return dict(self._known)

    def note(self, name: str, manifest: AdapterManifest | None) -> None:
        """Takes up which tokenizer the adapter of this name brings now; None if there is no adapter."""
        found = None if manifest is None else manifest.tokenizer
        if manifest is not None and found is not None:
            found = msgspec.structs.replace(found, added_tokens=manifest.added_tokens)
        if found == self._known.get(name):
            return
        self._new[name] = found
        if found is None:
            del self._known[name]
        else:
            self._known[name] = found

    def drain(self) -> dict[str, TokenizerSource | None]:
        """Those that came or changed since the last call, None for those that are gone."""
        changed, self._new = self._new, {}
        return changed
