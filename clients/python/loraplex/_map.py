"""The requests of many prompts, made one by one as they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import cast

from loraplex._options import Conversation, GenerateOptions, Prompt
from loraplex._requests import generate_request
from loraplex._types import Generation
from loraplex.errors import InvalidRequestError, LoraplexError
from loraplex.v1 import generation_pb2

MapItem = Prompt | Conversation | tuple[Prompt | Conversation, GenerateOptions]
"""A prompt, or a pair of a prompt and its own options, which win over those of all prompts."""

MapProgress = Callable[[int, int | None], None]
"""Called with the answers that are finished, and all there are, once that is known."""

MapRequest = generation_pb2.GenerateRequest | LoraplexError
"""A request, or the error of a prompt that none can be made of."""

Outcome = Generation | LoraplexError
"""The answer to one prompt, or its error."""

_AHEAD = 2
"""Windows of `concurrency` that are started or finished before the caller takes their answers."""


class MapSource:
    """The requests, each made when it is wanted; the error of a bad prompt takes the place of its request.

    Raises:
        InvalidRequestError: an argument is wrong.
    """

    def __init__(
        self,
        prompts: Iterable[MapItem],
        options: GenerateOptions,
        concurrency: int,
        progress: MapProgress | None,
    ) -> None:
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise InvalidRequestError.for_field(
                "prompts", f"must be an iterable of prompts, not {type(prompts).__name__}"
            )
        if concurrency < 1:
            raise InvalidRequestError.for_field("concurrency", f"must be at least 1, not {concurrency}")
        self.concurrency = concurrency
        self.window = _AHEAD * concurrency
        self._items = iter(prompts)
        self._total = len(prompts) if isinstance(prompts, Sized) else None
        self._options = options
        self._progress = progress
        self._told = 0
        self._read = 0

    def next(self) -> MapRequest | None:
        """The next request; the error of one that cannot be made; None at the end."""
        try:
            item = next(self._items)
        except StopIteration:
            self._total = self._read
            return None
        self._read += 1
        try:
            return item_request(item, self._options)
        except InvalidRequestError as error:
            return error

    def tell(self, finished: int) -> None:
        """Reports progress, if there is any; called where the answers are taken."""
        if self._progress is not None and finished > self._told:
            self._told = finished
            self._progress(finished, self._total)


def item_request(item: MapItem, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """The request for one of many prompts; its own options win over those of all.

    Raises:
        InvalidRequestError: an argument is of the wrong type, or two exclude each other.
    """
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)):
        return generate_request(cast("Prompt | Conversation", item), options)
    prompt, own = item
    merged: GenerateOptions = {**options, **own}
    # `adapter` and `adapters` say the same thing in two ways: a prompt's own one replaces both.
    if "adapter" in own and "adapters" not in own:
        merged.pop("adapters", None)
    if "adapters" in own and "adapter" not in own:
        merged.pop("adapter", None)
    return generate_request(prompt, merged)
