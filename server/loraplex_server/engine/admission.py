"""Requests as they come in: the limits of this engine, and the sequences made of those that can be served."""

from __future__ import annotations

from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.adapters.residency.requests import Requests
from loraplex_server.config import EngineConfig
from loraplex_server.core.errors import InvalidArgumentError, Reason, ResourceExhaustedError
from loraplex_server.core.request import Request
from loraplex_server.core.request_rules import RequestLimits, check_request
from loraplex_server.engine.drafts import Drafter
from loraplex_server.engine.sequence import Sequence
from loraplex_server.wire.messages import EngineInfo


class Admission:
    """Judges requests by what only the engine knows: its queue, its adapters and the tokens that they add."""

    def __init__(self, config: EngineConfig, info: EngineInfo, adapters: Requests) -> None:
        self._adapters = adapters
        self._limits = RequestLimits(info.vocab_size, info.max_model_len, config.adapters.max_per_request)
        self._max_queue = config.scheduler.max_queue
        self._prefix_cache = config.scheduler.prefix_cache
        self._speculative_tokens = config.scheduler.speculative_tokens

    def admit(self, client: str, request: Request, *, num_waiting: int, ahead: bool) -> Sequence:
        """The sequence of a request, with references to its adapters; release those at its end.

        Args:
            num_waiting: requests in the queue.
            ahead: as for `drafter`.

        Raises:
            InvalidArgumentError: the request breaks a limit.
            ResourceExhaustedError: the queue is full.
            ServerError: its adapters cannot be had; see `Requests.resolve`.
        """
        check_request(request, self._limits)
        if num_waiting >= self._max_queue:
            raise ResourceExhaustedError(
                f"{num_waiting} requests wait already; try again later",
                resource=("queue", "waiting requests"),
                retry_after_s=1.0,
                reason=Reason.QUEUE_FULL,
            )
        handles = self._adapters.resolve(
            [use.name for use in request.adapters], [use.weight for use in request.adapters]
        )
        try:
            self._check_tokens(request, handles)
            sequence = self._sequence(client, request, handles)
            sequence.drafter = self.drafter(sequence, ahead=ahead)
        except BaseException:
            self._adapters.release(handles)
            raise
        return sequence

    def _sequence(self, client: str, request: Request, handles: tuple[AdapterHandle, ...]) -> Sequence:
        public = self._prefix_cache and request.cache_prefix
        limit = self._limits.max_model_len
        sequence = Sequence(
            request,
            client,
            handles,
            max_model_len=limit,
            caches=public or bool(request.group),
            group=(client, request.group) if request.group and not public else None,
        )
        if sequence.num_prompt >= limit:
            raise InvalidArgumentError.field(
                "prompt",
                f"has {sequence.num_prompt} tokens with the adapter's soft prompt; this server takes "
                f"fewer than {limit}",
            )
        return sequence

    def drafter(self, sequence: Sequence, *, ahead: bool) -> Drafter | None:
        """The drafter of a sequence's tokens; None if none are to be drafted.

        Args:
            ahead: the engine launches a step before the tokens of the one before are known.
        """
        request = sequence.request
        most = request.speculative_tokens
        most = self._speculative_tokens if most is None else most
        # What a grammar allows after a draft is not known before the draft is accepted.
        if not most or request.structure is not None:
            return None
        # Where the engine runs ahead, a sequence with drafts sits out every other step.
        worth = 2 if ahead else 1
        return Drafter(most, sequence.max_length, first=sequence.num_virtual, worth=worth)

    def _check_tokens(self, request: Request, handles: tuple[AdapterHandle, ...]) -> None:
        """Every token id that the request names is the base's, or one that its adapter adds."""
        known = self._limits.vocab_size + max((handle.added_tokens for handle in handles), default=0)
        for field, ids in (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ):
            if ids and max(ids) >= known:
                raise InvalidArgumentError.field(
                    field,
                    f"has a token id outside the vocabulary of {known}"
                    + (", the adapter's added tokens included" if known > self._limits.vocab_size else ""),
                )
