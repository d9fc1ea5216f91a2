"""Token deltas, log-probabilities and times of a request, as its client is told of them."""

from __future__ import annotations

from loraplex_server.core.request import FinishReason
from loraplex_server.core.step import SampledToken
from loraplex_server.engine.sequence import Sequence
from loraplex_server.wire.messages import Times, TokenDelta, TokenLogprobs, TopLogprob


def token_delta(
    sequence: Sequence,
    tokens: tuple[SampledToken, ...],
    scores: tuple[TokenLogprobs, ...],
    finish: FinishReason | None,
    now_s: float,
) -> TokenDelta:
    """New tokens of a sequence and new scores of its prompt; its times with the first token and the last."""
    first = bool(tokens) and sequence.first_token_s == now_s
    return TokenDelta(
        sequence.request.request_id,
        tuple(token.token_id for token in tokens),
        tuple(token_logprobs(token) for token in tokens if token.logprob is not None),
        finish=finish,
        stop_token=finish is FinishReason.STOP,
        times=request_times(sequence, now_s) if first or finish is not None else None,
        prompt_logprobs=scores,
    )


def last_delta(sequence: Sequence, finish: FinishReason, now_s: float) -> TokenDelta:
    """The end of an answer whose tokens were all sent before."""
    return TokenDelta(sequence.request.request_id, (), finish=finish, times=request_times(sequence, now_s))


def token_logprobs(token: SampledToken) -> TokenLogprobs:
    """A token's log-probability, which was asked for, and those beside it."""
    assert token.logprob is not None
    top = tuple(TopLogprob(token_id, logprob) for token_id, logprob in token.top)
    return TokenLogprobs(token.token_id, token.logprob, top)


def request_times(sequence: Sequence, now_s: float) -> Times:
    """The parts of a request's time, from its arrival to `now_s`."""
    arrival_s = sequence.arrival_s
    drafter = sequence.drafter
    return Times(
        queue_s=(sequence.first_scheduled_s or now_s) - arrival_s,
        adapter_wait_s=sequence.adapter_wait_s,
        first_token_s=(sequence.first_token_s or now_s) - arrival_s,
        total_s=now_s - arrival_s,
        preemptions=sequence.preemptions,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
        drafted_tokens=drafter.drafted if drafter else 0,
        accepted_tokens=drafter.accepted if drafter else 0,
    )
