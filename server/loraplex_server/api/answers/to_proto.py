"""From the server's own types to messages of `loraplex.v1`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2
from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.request import FinishReason
from loraplex_server.wire.messages import EngineInfo, TokenLogprobs

TokenText = Callable[[int], str]

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def to_generate_response(
    piece: Piece, end: End | None, token_text: TokenText, request_id: str, index: int
) -> generation_pb2.GenerateResponse:
    """One streamed message of answer `index`; `request_id` is empty on all but a call's first."""
    message = generation_pb2.GenerateResponse(text=piece.text, token_ids=piece.token_ids)
    # Most messages have none of these, and naming them costs as much as what they do have.
    if index:
        message.index = index
    if piece.prompt is not None:
        message.text = piece.prompt.text + piece.text
        message.prompt_token_ids.extend(piece.prompt.token_ids)
    if piece.prompt_logprobs:
        message.prompt_logprobs.extend(_logprobs(piece.prompt_logprobs, token_text))
    if piece.logprobs:
        message.logprobs.extend(_logprobs(piece.logprobs, token_text))
    if end is not None:
        message.finish.CopyFrom(to_finish(end))
    if request_id:
        message.request_id = request_id
    return message


def to_unary_response(
    answers: Sequence[WholeAnswer], token_text: TokenText, request_id: str
) -> generation_pb2.GenerateUnaryResponse:
    """All answers to one request in one message. The prompt, and its scores, are the first one's."""
    first, *others = answers
    return generation_pb2.GenerateUnaryResponse(
        text=first.text,
        token_ids=first.token_ids,
        logprobs=_logprobs(first.logprobs, token_text),
        finish=to_finish(first.finished),
        request_id=request_id,
        prompt_token_ids=first.prompt.token_ids if first.prompt else (),
        prompt_logprobs=_logprobs(first.prompt_logprobs, token_text),
        others=[
            generation_pb2.Answer(
                index=index,
                text=answer.text,
                token_ids=answer.token_ids,
                logprobs=_logprobs(answer.logprobs, token_text),
                finish=to_finish(answer.finished),
            )
            for index, answer in enumerate(others, 1)
        ],
    )


def to_finish(end: End) -> generation_pb2.Finish:
    """The end of an answer."""
    times = end.finish.times
    return generation_pb2.Finish(
        reason=_FINISH_REASONS[end.finish.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            cached_prompt_tokens=times.cached_prompt_tokens if times else 0,
            drafted_tokens=times.drafted_tokens if times else 0,
            accepted_tokens=times.accepted_tokens if times else 0,
        ),
        timing=generation_pb2.Timing(
            queue_seconds=times.queue_s if times else 0.0,
            adapter_wait_seconds=times.adapter_wait_s if times else 0.0,
            time_to_first_token_seconds=end.first_token_s,
            total_seconds=end.total_s,
            preemptions=times.preemptions if times else 0,
        ),
        stop_match=end.finish.stop_match,
    )


def to_adapter(status: AdapterStatus) -> adapters_pb2.Adapter:
    """The state of one adapter."""
    return adapters_pb2.Adapter(
        name=status.name,
        source=status.source,
        state=f"ADAPTER_STATE_{status.state.upper()}",
        pinned=status.pinned,
        peft_type=status.peft_type,
        rank=status.rank,
        target_modules=status.target_modules,
        bytes=status.bytes,
        content_hash=status.content_hash,
        references=status.references,
        draining=status.draining,
        hits=status.hits,
        misses=status.misses,
        evictions=status.evictions,
    )


def to_model(info: EngineInfo, server_version: str) -> model_pb2.Model:
    """The model that is served."""
    return model_pb2.Model(
        name=info.model,
        architecture=info.architecture,
        quantization=info.quantization,
        dtype=info.dtype,
        device=info.device,
        kernels=info.kernels,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        parameters=info.parameters,
        weight_bytes=info.weight_bytes,
        weight_checksum=info.weight_checksum,
        max_batch_tokens=info.max_batch_tokens,
        max_num_requests=info.max_num_requests,
        kv_block_size=info.kv_block_size,
        kv_blocks=info.kv_blocks,
        adapter_device_bytes=info.adapter_device_bytes,
        adapter_host_bytes=info.adapter_host_bytes,
        max_adapters_on_device=info.max_adapters_on_device,
        server_version=server_version,
    )


def _logprobs(entries: Iterable[TokenLogprobs], token_text: TokenText) -> list[generation_pb2.TokenLogprobs]:
    return [
        generation_pb2.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[
                generation_pb2.TopLogprob(
                    token_id=top.token_id, logprob=top.logprob, text=token_text(top.token_id)
                )
                for top in entry.top
            ],
        )
        for entry in entries
    ]
