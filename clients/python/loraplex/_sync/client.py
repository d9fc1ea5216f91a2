# Made from ../_async/client.py by `make sync`: change that file.
"""The client: generations, tokens, the model. `adapters` has the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from loraplex._base import BaseClient, Wait
from loraplex._batch import BatchReader, batch_request
from loraplex._config import Timeout
from loraplex._map import MapItem, MapProgress, MapSource
from loraplex._options import ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._readers import AnswerReader, generation, model_info
from loraplex._requests import generate_request, tokenize_request
from loraplex._sync.adapters import Adapters
from loraplex._sync.maps import GenerationMap, PendingGeneration
from loraplex._sync.streams import GenerationBatch, GenerationStream, Messages
from loraplex._sync.transport import Transport
from loraplex._sync.waiting import PendingAnswer, sleep
from loraplex._transport import CallSettings
from loraplex._types import Generation, ModelInfo
from loraplex.errors import DeadlineExceededError, LoraplexError, UnavailableError
from loraplex.v1 import generation_pb2, model_pb2


class Client(BaseClient):
    r"""A loraplex server.

    Client is called from threads; one serves any number of them. AsyncClient is called from the coroutines
    of one event loop.

    >>> with Client("127.0.0.1:50051") as client:
    ...     answer = client.generate("hello world 42\n", adapter="upper", max_tokens=64)
    ...     print(answer.text, answer.finish_reason, answer.usage.completion_tokens)
    ...     for chunk in client.stream("hello world 42\n", adapters=[("redact", 1.0)]):
    ...         print(chunk.text, end="", flush=True)
    HELLO WORLD 42 stop 15
    hello world ##

    Many prompts, so many at a time, their answers in order:

    >>> prompts = ["hello world 42\n", ("good morning 7\n", {"adapter": "title"})]
    >>> with Client("127.0.0.1:50051") as client:
    ...     for answer in client.map(prompts, adapter="upper", concurrency=8):
    ...         print(answer.text)
    HELLO WORLD 42
    Good Morning 7
    """

    def _open(self, settings: CallSettings) -> None:
        self._transport = Transport(settings)
        self.adapters = Adapters(self._transport)

    def generate(
        self, prompt: Prompt, *, timeout: Timeout | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates an answer and returns it whole.

        Args:
            prompt: text, or token ids to be taken as they are.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            options: adapter, adapters, max_tokens, min_tokens, temperature, top_p, top_k, min_p,
                repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words, seed, stop,
                include_stop, stop_token_ids, ignore_eos, logprobs, prompt_logprobs, echo, n, priority,
                cache_prefix, structure, speculative_tokens, request_id; see GenerateOptions.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        return self._generate(generate_request(prompt, options), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: Timeout | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Sends the request and returns its answer as an iterator of chunks. Arguments as `generate` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(generate_request(prompt, options), timeout)

    def chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continues a conversation, through the chat template of the adapter or the model.

        Args:
            messages: mappings with "role" and "content", and "name" where the template knows them.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            options: as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; FailedPreconditionError where there is no template.
        """
        return self._generate(generate_request(Conversation(messages), options), timeout)

    def stream_chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """As `chat`, but returns an iterator of chunks. Arguments as `chat` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(generate_request(Conversation(messages), options), timeout)

    @overload
    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: Literal[False] = False,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationMap[Generation]: ...

    @overload
    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: bool,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationMap[Generation | LoraplexError]: ...

    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: bool = False,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationMap[Any]:
        """Generates an answer to each prompt, so many at a time, and yields them in the order of the prompts.

        Args:
            prompts: any iterable of prompts, or of pairs of a prompt and options of its own. It is read as
                answers are taken, at most twice `concurrency` ahead of them.
            concurrency: most requests under way at once.
            return_errors: yield a LoraplexError in the place of its answer and go on. Otherwise it is raised
                there, and what still runs is cancelled.
            progress: called with the answers that are finished, and all there are, or None while that is not
                known; where the answers are taken.
            timeout: of each answer, as of `generate`.
            options: of all prompts, as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; those of the answers come while iterating.
        """
        self._transport.check_open()

        def begin(request: generation_pb2.GenerateRequest) -> PendingAnswer:
            if self._transport.limits_of(timeout).of_parts:
                return self._stream(request, timeout)
            return PendingGeneration(self._transport, request, timeout)

        return GenerationMap(MapSource(prompts, options, concurrency, progress), begin, return_errors)

    def stream_batch(
        self,
        prompts: Iterable[MapItem],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationBatch:
        """Sends many prompts in one call and returns an iterator of results, each as it finishes.

        Args:
            prompts: at most 1024 prompts, or pairs of a prompt and options of its own.
            timeout: seconds for all of them; of a Timeouts, `connect` and `total`.
            options: of all prompts, as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; that of the whole call comes while iterating.
        """
        limits = dataclasses.replace(
            self._transport.limits_of(timeout), first_token=None, between_tokens=None
        )
        batch = batch_request(prompts, options)
        call = self._transport.begin("GenerationService/GenerateBatch", limits)
        return GenerationBatch(Messages(self._transport, call, batch), BatchReader(batch))

    def tokenize(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: Timeout | None = None,
    ) -> list[int]:
        """The token ids of a text or a conversation, as `generate` and `chat` would use them.

        Args:
            adapters: names of those whose chat template counts.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        request = tokenize_request(generation_pb2.TokenizeRequest, prompt, adapters)
        response = self._transport.call("GenerationService/Tokenize", request, timeout)
        return list(response.token_ids)

    def count_tokens(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: Timeout | None = None,
    ) -> int:
        """The number of tokens that `tokenize` would return."""
        request = tokenize_request(generation_pb2.CountTokensRequest, prompt, adapters)
        response = self._transport.call("GenerationService/CountTokens", request, timeout)
        return int(response.count)

    def model(self, *, timeout: Timeout | None = None) -> ModelInfo:
        """The base model and the server's limits."""
        response = self._transport.call("ModelService/GetModel", model_pb2.GetModelRequest(), timeout)
        return model_info(response.model)

    def wait_until_ready(self, timeout: float = 60.0) -> ModelInfo:
        """Waits for a server that is still starting, and returns its model.

        Raises:
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        wait = Wait(self.server, timeout)
        while True:
            try:
                response = self._transport.call(
                    "ModelService/GetModel",
                    model_pb2.GetModelRequest(),
                    wait.remaining(),
                    wait_for_ready=True,
                )
                return model_info(response.model)
            except UnavailableError:
                sleep(min(wait.POLL_S, wait.remaining()))
            except DeadlineExceededError as error:
                raise wait.expired() from error

    def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, request: generation_pb2.GenerateRequest, timeout: Timeout | None) -> Generation:
        if self._transport.limits_of(timeout).of_parts:
            return self._stream(request, timeout).collect()
        envelope = generation_pb2.GenerateUnaryRequest(request=request)
        response = self._transport.call(
            "GenerationService/GenerateUnary", envelope, timeout, request_id=request.request_id
        )
        return generation(request, response)

    def _stream(self, request: generation_pb2.GenerateRequest, timeout: Timeout | None) -> GenerationStream:
        call = self._transport.begin("GenerationService/Generate", timeout, request.request_id)
        return GenerationStream(Messages(self._transport, call, request), AnswerReader(request))
