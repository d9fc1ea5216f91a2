"""Answers joined from their pieces, for clients that want them whole."""

from __future__ import annotations

import dataclasses

from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.requests.prompts import Prompt
from loraplex_server.wire.messages import TokenLogprobs


@dataclasses.dataclass
class WholeAnswer:
    """One answer as it grows; fields as those of `Piece`, one after the other."""

    texts: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    prompt: Prompt | None = None
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece, end: End | None) -> None:
        """Takes the next piece in; `end` comes with the last."""
        self.prompt = piece.prompt or self.prompt
        self.texts.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.offsets.extend(piece.offsets)
        self.prompt_logprobs.extend(piece.prompt_logprobs)
        self.end = end

    @property
    def text(self) -> str:
        """The prompt, where it is echoed, and the answer."""
        return (self.prompt.text if self.prompt else "") + "".join(self.texts)

    @property
    def finished(self) -> End:
        """The end of an answer that has one."""
        assert self.end is not None
        return self.end
