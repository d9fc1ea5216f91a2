"""The client that blocks."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from loraplex import _convert as convert
from loraplex._base import BaseClient, Wait, stubs_on
from loraplex._batch import BatchReader, BatchResult, batch_request, in_order
from loraplex._calls import PROBE, Call
from loraplex._config import Timeout
from loraplex._convert import AdapterMix, ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._map import GenerationMap, MapItem, MapProgress, MapSource, PendingAnswer
from loraplex._types import AdapterChanges, AdapterInfo, Generation, GenerationChunk, ModelInfo
from loraplex._upload import Progress, upload_parts
from loraplex._watchdog import WATCHDOG
from loraplex.errors import DeadlineExceededError, LoraplexError, UnavailableError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2


class Client(BaseClient):
    r"""A loraplex server, called from threads; one client serves any number of them.

    >>> with Client("127.0.0.1:50051") as client:
    ...     answer = client.generate("hello world 42\n", adapter="upper", max_tokens=64)
    ...     print(answer.text, answer.finish_reason, answer.usage.completion_tokens)
    ...     for chunk in client.stream("hello world 42\n", adapters=[("redact", 1.0)], temperature=0):
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

    def _open(self) -> None:
        settings = self._settings
        self._channel: grpc.Channel = (
            grpc.insecure_channel(settings.target, settings.options)
            if settings.credentials is None
            else grpc.secure_channel(settings.target, settings.credentials, settings.options)
        )
        if self._interceptors:
            self._channel = grpc.intercept_channel(self._channel, *self._interceptors)
        self._stubs = stubs_on(self._channel)
        self.adapters = Adapters(self)

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
                cache_prefix, structure, request_id; see GenerateOptions.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        return self._generate(convert.generate_request(prompt, **options), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: Timeout | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Sends the request and returns its answer as an iterator of chunks. Arguments as `generate` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(prompt, **options), timeout)

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
        return self._generate(convert.generate_request(Conversation(messages), **options), timeout)

    def stream_chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """The same as an iterator of chunks. Arguments as `chat` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(Conversation(messages), **options), timeout)

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
        self._check_open()

        def start(request: generation_pb2.GenerateRequest) -> PendingAnswer:
            if self._limits_of(timeout).of_parts:
                return self._stream(request, timeout)
            return _Unary(self, request, timeout)

        return GenerationMap(MapSource(prompts, options, concurrency, progress), start, return_errors)

    def stream_batch(
        self,
        prompts: Iterable[MapItem],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationBatch:
        """Sends many prompts in one call; an iterator of what they come to, each when it has finished.

        Args:
            prompts: at most 1024 prompts, or pairs of a prompt and options of its own.
            timeout: seconds for all of them; of a Timeouts, `connect` and `total`.
            options: of all prompts, as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; that of the whole call comes while iterating.
        """
        limits = dataclasses.replace(self._limits_of(timeout), first_token=None, between_tokens=None)
        batch = batch_request(prompts, options)
        call = self._begin("GenerationService/GenerateBatch", limits)
        return GenerationBatch(_Parts(self, call, batch), BatchReader(batch))

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
        request = convert.tokenize_request(generation_pb2.TokenizeRequest, prompt, adapters)
        response = self._call("GenerationService/Tokenize", request, timeout)
        return list(response.token_ids)

    def count_tokens(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: Timeout | None = None,
    ) -> int:
        """How many tokens `tokenize` would return."""
        request = convert.tokenize_request(generation_pb2.CountTokensRequest, prompt, adapters)
        response = self._call("GenerationService/CountTokens", request, timeout)
        return int(response.count)

    def model(self, *, timeout: Timeout | None = None) -> ModelInfo:
        """The base model and the server's limits."""
        response = self._call("ModelService/GetModel", model_pb2.GetModelRequest(), timeout)
        return convert.model_info(response.model)

    def wait_until_ready(self, timeout: float = 60.0) -> ModelInfo:
        """Waits for a server that is still starting, and returns its model.

        Raises:
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        wait = Wait(self.server, timeout)
        while True:
            try:
                response = self._call(
                    "ModelService/GetModel",
                    model_pb2.GetModelRequest(),
                    wait.remaining(),
                    wait_for_ready=True,
                )
                return convert.model_info(response.model)
            except UnavailableError:
                time.sleep(min(wait.POLL_S, wait.remaining()))
            except DeadlineExceededError as error:
                raise wait.expired() from error

    def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, request: generation_pb2.GenerateRequest, timeout: Timeout | None) -> Generation:
        if self._limits_of(timeout).of_parts:
            return self._stream(request, timeout).collect()
        envelope = generation_pb2.GenerateUnaryRequest(request=request)
        response = self._call(
            "GenerationService/GenerateUnary", envelope, timeout, request_id=request.request_id
        )
        return convert.generation(request, response)

    def _stream(self, request: generation_pb2.GenerateRequest, timeout: Timeout | None) -> GenerationStream:
        call = self._begin("GenerationService/Generate", timeout, request.request_id)
        return GenerationStream(_Parts(self, call, request), convert.AnswerReader(request))

    def _call(
        self, method: str, request: Any, timeout: Timeout | None, *, request_id: str = "", **how: Any
    ) -> Any:
        call = self._begin(method, timeout, request_id)
        with call:
            self._connect(call)
            response = self._stubs.method(method)(request, **call.options(), **how)
        call.finish()
        return response

    def _connect(self, call: Call) -> None:
        """Waits for a server to be there, if the call has a limit for that."""
        if call.must_connect:
            code = grpc.StatusCode.OK
            try:
                probe: Any = self._channel.unary_unary(PROBE)
                probe(b"", **call.probe_options())
            except grpc.RpcError as error:
                code = error.code()
            call.probed(code, self.server)


class _Unary:
    """A generation that one thread waits for and another may cancel."""

    def __init__(
        self, client: Client, request: generation_pb2.GenerateRequest, timeout: Timeout | None
    ) -> None:
        self._client = client
        self._request = request
        self._call = client._begin("GenerationService/GenerateUnary", timeout, request.request_id)
        self._future: grpc.Future[Any] | None = None
        self._closed = False

    def collect(self) -> Generation:
        envelope = generation_pb2.GenerateUnaryRequest(request=self._request)
        with self._call:
            self._client._connect(self._call)
            method = self._client._stubs.generation.GenerateUnary
            self._future = future = method.future(envelope, **self._call.options())
            if self._closed:
                future.cancel()
            response = future.result()
        self._call.finish()
        return convert.generation(self._request, response)

    def close(self) -> None:
        self._closed = True
        if self._future is not None:
            self._future.cancel()


class _Parts:
    """The messages of one streamed answer, each waited for as long as the call's limits allow.

    The call is made at once, or, where it may have to wait for a connection, with the first read.
    """

    def __init__(self, client: Client, call: Call, request: Any) -> None:
        self.call = call
        self._client = client
        self._request = request
        self._grpc: Any = None
        self._closed = False
        self._first = True
        if not call.must_connect:
            with call:
                self._open()

    def _open(self) -> None:
        method = self._client._stubs.method(self.call.method)
        self._grpc = method(self._request, **self.call.options())
        if self._closed:
            self._grpc.cancel()

    def read(self) -> Any:
        """The next message; None at the end."""
        with self.call:
            if self._grpc is None:
                self._client._connect(self.call)
                self._open()
            phase, seconds = self.call.wait_phase(self._first)
            self._first = False
            if seconds is None:
                return next(self._grpc, None)

            def late() -> None:
                self.call.expire(phase)
                self._grpc.cancel()

            wait = WATCHDOG.watch(seconds, late)
            try:
                return next(self._grpc, None)
            finally:
                WATCHDOG.forget(wait)

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._closed = True
        if self._grpc is not None:
            self._grpc.cancel()
        self.call.leave()


class GenerationStream:
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `with`, by `close()`, or by letting go
    of the last reference.
    """

    def __init__(self, parts: _Parts, reader: convert.AnswerReader) -> None:
        self._parts = parts
        self._reader = reader

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._reader.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        response = self._parts.read()
        if response is None:
            with self._parts.call:
                self._reader.check_complete()
            self._parts.call.finish()
            raise StopIteration
        chunk = self._reader.chunk(response)
        self._parts.call.info.request_id = self._reader.request_id
        return chunk

    def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return convert.joined(self)

    def close(self) -> None:
        """Cancels the generation, unless it has finished."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (parts := getattr(self, "_parts", None)) is not None:
            parts.close()


class GenerationBatch:
    """What the prompts of a batch come to, each as it finishes: iterate over it.

    Leaving it early cancels those that are not finished: by `with`, by `close()`, or by letting go
    of the last reference.
    """

    def __init__(self, parts: _Parts, reader: BatchReader) -> None:
        self._parts = parts
        self._reader = reader

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchResult:
        response = self._parts.read()
        if response is None:
            with self._parts.call:
                self._reader.check_complete()
            self._parts.call.finish()
            raise StopIteration
        return self._reader.result(response)

    def collect(self) -> list[Generation | LoraplexError]:
        """Reads what is left, and returns that in the order of the prompts."""
        return in_order(self)

    def close(self) -> None:
        """Cancels what is not finished."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (parts := getattr(self, "_parts", None)) is not None:
            parts.close()


class AdapterWatch:
    """What changes with the adapters: iterate over it. It ends by `with`, or by `close()`."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AdapterChanges:
        response = self._parts.read()
        if response is None:
            self._parts.call.finish()
            raise StopIteration
        return convert.adapter_changes(response)

    def close(self) -> None:
        """Ends it."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Adapters:
    """The adapters that the server knows: `client.adapters`.

    >>> with Client("127.0.0.1:50051") as client:
    ...     print([adapter.name for adapter in client.adapters.list()][:3])
    ...     print(client.adapters.pin("upper").pinned, client.adapters.pin("upper", False).pinned)
    ['atbash', 'caesar1', 'caesar25']
    True False
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._call = client._call

    def load(
        self,
        name: str,
        source: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers the adapter that PEFT saved in the folder `source`, a path on the server's machine.

        With `load_inplace` it replaces an adapter of that name, whose running requests finish on the old one.
        """
        request = convert.load_request(name, source, load_inplace)
        response = self._call("AdapterService/LoadAdapter", request, timeout)
        return convert.adapter_info(response.adapter)

    def register_composition(
        self,
        name: str,
        combination_type: str,
        members: AdapterMix,
        *,
        density: float | None = None,
        majority_sign: str | None = None,
        svd_rank: int | None = None,
        seed: int | None = None,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers what PEFT's `add_weighted_adapter` makes of several adapters as an adapter of its own.

        Args:
            combination_type: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune" or "magnitude_prune_svd".
            members: `[("sql", 1.0), ("polite", 0.5)]`, or a mapping of names to weights.
            density: part of the values to keep, for ties, dare and magnitude_prune.
            majority_sign: "total" or "frequency", for ties.
            svd_rank: rank of the result, for svd; None is the largest of the members'.
            seed: of what dare drops.
        """
        request = convert.composition_request(
            name, combination_type, members, density, majority_sign, svd_rank, seed, load_inplace
        )
        response = self._call("AdapterService/RegisterComposition", request, timeout)
        return convert.adapter_info(response.adapter)

    def upload(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        progress: Progress | None = None,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Sends the adapter that PEFT saved in `folder`, on this machine, and registers it.

        Args:
            progress: called with the bytes sent so far, and all there are; perhaps on another thread.
        """
        parts = upload_parts(name, folder, load_inplace, progress)
        response = self._call("AdapterService/UploadAdapter", parts, timeout)
        return convert.adapter_info(response.adapter)

    def unload(
        self, name: str, *, grace_seconds: float | None = None, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Waits for the adapter's running requests, frees it, and returns what is registered then.

        Requests that still run after `grace_seconds` are cancelled; None lets them run to their end.
        """
        request = convert.unload_request(name, grace_seconds)
        response = self._call("AdapterService/UnloadAdapter", request, timeout)
        return [convert.adapter_info(adapter) for adapter in response.remaining]

    def prefetch(
        self, names: Sequence[str], *, host_only: bool = False, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Hints that adapters will be wanted; they are brought in as far as there is room that nobody needs.

        Returns at once, with where they are now.
        """
        response = self._call("AdapterService/Prefetch", convert.prefetch_request(names, host_only), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def watch(self, names: Sequence[str] = (), *, timeout: Timeout | None = None) -> AdapterWatch:
        """All adapters, or those of these names, and then what changes with them, as an iterator."""
        request = convert.watch_request(names)
        call = self._client._begin("AdapterService/Watch", timeout)
        return AdapterWatch(_Parts(self._client, call, request))

    def list(self, *, timeout: Timeout | None = None) -> list[AdapterInfo]:
        """All registered adapters."""
        response = self._call("AdapterService/ListAdapters", adapters_pb2.ListAdaptersRequest(), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def get(self, name: str, *, timeout: Timeout | None = None) -> AdapterInfo:
        """One adapter."""
        request = convert.named(adapters_pb2.GetAdapterRequest, name)
        response = self._call("AdapterService/GetAdapter", request, timeout)
        return convert.adapter_info(response.adapter)

    def pin(self, name: str, pinned: bool = True, *, timeout: Timeout | None = None) -> AdapterInfo:
        """Brings the adapter to the device and keeps it there; `pinned=False` lets it be evicted again."""
        response = self._call("AdapterService/PinAdapter", convert.pin_request(name, pinned), timeout)
        return convert.adapter_info(response.adapter)
