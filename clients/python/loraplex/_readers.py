"""From the messages of loraplex.v1 to the SDK's values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loraplex._types import (
    AdapterChanges,
    AdapterInfo,
    AdapterState,
    FinishReason,
    Generation,
    GenerationChunk,
    ModelInfo,
    Timing,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from loraplex.errors import InternalError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2

_FINISH_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_ADAPTER_STATES: dict[int, AdapterState] = {
    adapters_pb2.ADAPTER_STATE_UNLOADED: AdapterState.UNLOADED,
    adapters_pb2.ADAPTER_STATE_LOADING: AdapterState.LOADING,
    adapters_pb2.ADAPTER_STATE_HOST: AdapterState.HOST,
    adapters_pb2.ADAPTER_STATE_COPYING: AdapterState.COPYING,
    adapters_pb2.ADAPTER_STATE_DEVICE: AdapterState.DEVICE,
}


class AnswerReader:
    """Reads the messages of one streamed answer, and knows whether it is complete."""

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        self.request_id = request.request_id
        self._unfinished = request.n if request.HasField("n") else 1
        self._logprobs = request.HasField("logprobs")
        self._prompt_logprobs = request.HasField("prompt_logprobs")
        self._echo = request.echo
        self._begun: set[int] = set()

    @property
    def complete(self) -> bool:
        """True once every answer has ended."""
        return self._unfinished <= 0

    def read(self, response: generation_pb2.GenerateResponse) -> GenerationChunk:
        if response.request_id:
            self.request_id = response.request_id
        finish = response.finish if response.HasField("finish") else None
        self._unfinished -= finish is not None
        scores = self._prompt_logprobs and response.index == 0
        echoes = self._echo and response.index not in self._begun
        self._begun.add(response.index)
        return GenerationChunk(
            text=response.text,
            token_ids=list(response.token_ids),
            logprobs=[token_logprobs(entry) for entry in response.logprobs] if self._logprobs else None,
            finish_reason=finish_reason(finish.reason) if finish else None,
            usage=usage(finish.usage) if finish else None,
            timing=timing(finish.timing) if finish else None,
            stop_match=(finish.stop_match or None) if finish else None,
            request_id=self.request_id,
            index=response.index,
            prompt_logprobs=[token_logprobs(entry) for entry in response.prompt_logprobs] if scores else None,
            prompt_token_ids=list(response.prompt_token_ids) if echoes else None,
        )

    def check_complete(self) -> None:
        """Called at the end of the stream: an answer cut short must not pass for a whole one.

        Raises:
            InternalError: an answer has not ended.
        """
        if not self.complete:
            raise InternalError(
                "the stream ended without saying how the generation finished", request_id=self.request_id
            )


class ChangesReader:
    """Reads the messages of a watch, which has no end of its own."""

    request_id = ""

    def read(self, response: adapters_pb2.WatchResponse) -> AdapterChanges:
        return adapter_changes(response)

    def check_complete(self) -> None:
        """Called when the server has ended the watch; nothing can be missing."""


def joined(chunks: Iterable[GenerationChunk]) -> Generation:
    """The chunks of a complete answer joined; of several answers the first, which holds the others.

    Raises:
        RuntimeError: the answer is not complete: it had been read before.
    """
    found: dict[int, list[GenerationChunk]] = {}
    for piece in chunks:
        found.setdefault(piece.index, []).append(piece)
    answers = [_joined(found[index]) for index in sorted(found)]
    if not answers:
        raise RuntimeError("the answer has been read to its end already")
    return replace(answers[0], others=answers[1:])


def _joined(pieces: list[GenerationChunk]) -> Generation:
    last = pieces[-1]
    if last.finish_reason is None or last.usage is None or last.timing is None:
        raise RuntimeError("the answer has been read to its end already")
    scored = [entry for piece in pieces for entry in piece.prompt_logprobs or ()]
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=(
            None if last.logprobs is None else [entry for piece in pieces for entry in piece.logprobs or ()]
        ),
        timing=last.timing,
        request_id=last.request_id,
        stop_match=last.stop_match,
        index=last.index,
        prompt_logprobs=None if last.prompt_logprobs is None else scored,
        prompt_token_ids=pieces[0].prompt_token_ids,
    )


def generation(
    request: generation_pb2.GenerateRequest, response: generation_pb2.GenerateUnaryResponse
) -> Generation:
    wants_logprobs = request.HasField("logprobs")
    request_id = response.request_id or request.request_id
    prompt_ids = list(response.prompt_token_ids) if request.echo else None
    return Generation(
        text=response.text,
        token_ids=list(response.token_ids),
        finish_reason=finish_reason(response.finish.reason),
        usage=usage(response.finish.usage),
        logprobs=[token_logprobs(entry) for entry in response.logprobs] if wants_logprobs else None,
        timing=timing(response.finish.timing),
        request_id=request_id,
        stop_match=response.finish.stop_match or None,
        prompt_logprobs=[token_logprobs(entry) for entry in response.prompt_logprobs]
        if request.HasField("prompt_logprobs")
        else None,
        prompt_token_ids=prompt_ids,
        others=[_other(answer, request, request_id, prompt_ids) for answer in response.others],
    )


def _other(
    answer: generation_pb2.Answer,
    request: generation_pb2.GenerateRequest,
    request_id: str,
    prompt_token_ids: list[int] | None,
) -> Generation:
    wants_logprobs = request.HasField("logprobs")
    return Generation(
        text=answer.text,
        token_ids=list(answer.token_ids),
        finish_reason=finish_reason(answer.finish.reason),
        usage=usage(answer.finish.usage),
        logprobs=[token_logprobs(entry) for entry in answer.logprobs] if wants_logprobs else None,
        timing=timing(answer.finish.timing),
        request_id=request_id,
        stop_match=answer.finish.stop_match or None,
        index=answer.index,
        prompt_token_ids=prompt_token_ids,
    )


def finish_reason(value: int) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def usage(message: generation_pb2.Usage) -> Usage:
    return Usage(
        message.prompt_tokens,
        message.completion_tokens,
        message.cached_prompt_tokens,
        message.drafted_tokens,
        message.accepted_tokens,
    )


def timing(message: generation_pb2.Timing) -> Timing:
    return Timing(
        queue_seconds=message.queue_seconds,
        adapter_wait_seconds=message.adapter_wait_seconds,
        time_to_first_token_seconds=message.time_to_first_token_seconds,
        total_seconds=message.total_seconds,
        preemptions=message.preemptions,
    )


def token_logprobs(message: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        top=[TopLogprob(top.token_id, top.logprob, top.text) for top in message.top],
    )


def adapter_info(message: adapters_pb2.Adapter) -> AdapterInfo:
    return AdapterInfo(
        name=message.name,
        source=message.source,
        state=adapter_state(message.state),
        pinned=message.pinned,
        peft_type=message.peft_type,
        rank=message.rank,
        target_modules=list(message.target_modules),
        bytes=message.bytes,
        content_hash=message.content_hash,
        references=message.references,
        draining=message.draining,
        hits=message.hits,
        misses=message.misses,
        evictions=message.evictions,
    )


def adapter_changes(message: adapters_pb2.WatchResponse) -> AdapterChanges:
    return AdapterChanges(
        adapters=[adapter_info(adapter) for adapter in message.adapters], removed=list(message.removed)
    )


def adapter_state(value: int) -> AdapterState:
    return _ADAPTER_STATES.get(value, AdapterState.UNSPECIFIED)


def model_info(message: model_pb2.Model) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        quantization=message.quantization,
        dtype=message.dtype,
        device=message.device,
        kernels=message.kernels,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        parameters=message.parameters,
        weight_bytes=message.weight_bytes,
        weight_checksum=message.weight_checksum,
        max_batch_tokens=message.max_batch_tokens,
        max_num_requests=message.max_num_requests,
        kv_block_size=message.kv_block_size,
        kv_blocks=message.kv_blocks,
        adapter_device_bytes=message.adapter_device_bytes,
        adapter_host_bytes=message.adapter_host_bytes,
        max_adapters_on_device=message.max_adapters_on_device,
        server_version=message.server_version,
    )
