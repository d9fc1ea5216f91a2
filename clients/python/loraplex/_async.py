"""The client for asyncio: the same as the one that blocks, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from loraplex import _convert as convert
from loraplex._base import BaseClient, Stubs, Wait, stubs_on
from loraplex._convert import AdapterMix, ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._status import TranslatedErrors
from loraplex._types import AdapterChanges, AdapterInfo, Generation, GenerationChunk, ModelInfo
from loraplex._upload import Progress, upload_parts
from loraplex.errors import DeadlineExceededError, UnavailableError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2


class AsyncClient(BaseClient):
    """A loraplex server, called from coroutines of one event loop.

    async with AsyncClient("127.0.0.1:50051") as client:
        print((await client.generate("Dear Sir", adapter="polite", max_tokens=64)).text)
        async for chunk in client.stream("Dear Sir", adapters=[("sql", 1.0), ("polite", 0.5)]):
            print(chunk.text, end="", flush=True)
    """

    def _open(self) -> None:
        # grpc.aio binds a channel to the loop that runs when it is made: there may be none yet.
        self._channel: grpc.aio.Channel | None = None
        self._loop_stubs: Stubs | None = None
        self.adapters = AsyncAdapters(self)

    @property
    def _stubs(self) -> Stubs:
        self._check_open()
        if self._loop_stubs is None:
            asyncio.get_running_loop()
            settings = self._settings
            self._channel = (
                grpc.aio.insecure_channel(settings.target, settings.options)
                if settings.credentials is None
                else grpc.aio.secure_channel(settings.target, settings.credentials, settings.options)
            )
            self._loop_stubs = stubs_on(self._channel)
        return self._loop_stubs

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates an answer and returns it whole.

        Args:
            prompt: text, or token ids to be taken as they are.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            options: adapter, adapters, max_tokens, min_tokens, temperature, top_p, top_k, min_p,
                repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words, seed, stop,
                include_stop, stop_token_ids, ignore_eos, logprobs, priority, cache_prefix,
                speculative_tokens, request_id; see GenerateOptions.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        return await self._generate(convert.generate_request(prompt, **options), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Sends the request and returns its answer as an iterator of chunks. Arguments as `generate` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(prompt, **options), timeout)

    async def chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: float | None = None,
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
        return await self._generate(convert.generate_request(Conversation(messages), **options), timeout)

    def stream_chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """The same as an iterator of chunks. Arguments as `chat` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(Conversation(messages), **options), timeout)

    async def tokenize(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> list[int]:
        """The token ids of a text or a conversation, as `generate` and `chat` would use them.

        Args:
            adapters: names of those whose chat template counts.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        request = convert.tokenize_request(generation_pb2.TokenizeRequest, prompt, adapters)
        response = await self._call(self._stubs.generation.Tokenize, request, timeout)
        return list(response.token_ids)

    async def count_tokens(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> int:
        """How many tokens `tokenize` would return."""
        request = convert.tokenize_request(generation_pb2.CountTokensRequest, prompt, adapters)
        response = await self._call(self._stubs.generation.CountTokens, request, timeout)
        return int(response.count)

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """The base model and the server's limits."""
        response = await self._call(self._stubs.model.GetModel, model_pb2.GetModelRequest(), timeout)
        return convert.model_info(response.model)

    async def wait_until_ready(self, timeout: float = 60.0) -> ModelInfo:
        """Waits for a server that is still starting, and returns its model.

        Raises:
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        wait = Wait(self.server, timeout)
        while True:
            try:
                response = await self._call(
                    self._stubs.model.GetModel,
                    model_pb2.GetModelRequest(),
                    wait.remaining(),
                    wait_for_ready=True,
                )
                return convert.model_info(response.model)
            except UnavailableError:
                await asyncio.sleep(min(wait.POLL_S, wait.remaining()))
            except DeadlineExceededError as error:
                raise wait.expired() from error

    async def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _generate(self, request: generation_pb2.GenerateRequest, timeout: float | None) -> Generation:
        envelope = generation_pb2.GenerateUnaryRequest(request=request)
        response = await self._call(
            self._stubs.generation.GenerateUnary, envelope, timeout, request_id=request.request_id
        )
        return convert.generation(request, response)

    def _stream(
        self, request: generation_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerationStream:
        call = self._stubs.generation.Generate(request, **self._call_options(timeout))
        return AsyncGenerationStream(call, convert.AnswerReader(request))

    async def _call(
        self, method: Any, request: Any, timeout: float | None, *, request_id: str = "", **how: Any
    ) -> Any:
        with TranslatedErrors(request_id):
            return await method(request, **self._call_options(timeout), **how)


class AsyncGenerationStream:
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `async with`, by `close()`, or by
    letting go of the last reference.
    """

    def __init__(self, call: Any, reader: convert.AnswerReader) -> None:
        self._call = call
        self._reader = reader
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._reader.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        with TranslatedErrors(self.request_id):
            response = await self._call.read()
        if response is grpc.aio.EOF:
            self._reader.check_complete()
            raise StopAsyncIteration
        return self._reader.chunk(response)

    async def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return convert.joined([chunk async for chunk in self])

    async def close(self) -> None:
        """Cancels the generation, unless it has finished."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The collector may run on another thread, or after the loop.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._call.cancel)


class AsyncAdapterWatch:
    """What changes with the adapters: iterate over it. It ends by `async with`, or by `close()`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AdapterChanges:
        with TranslatedErrors(""):
            response = await self._call.read()
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return convert.adapter_changes(response)

    async def close(self) -> None:
        """Ends it."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncAdapters:
    """The adapters that the server knows: `client.adapters`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._call = client._call
        self._options = client._call_options

    @property
    def _stub(self) -> Any:
        return self._client._stubs.adapters

    async def load(
        self,
        name: str,
        source: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Registers the adapter that PEFT saved in the folder `source`, a path on the server's machine.

        With `load_inplace` it replaces an adapter of that name, whose running requests finish on the old one.
        """
        request = convert.load_request(name, source, load_inplace)
        response = await self._call(self._stub.LoadAdapter, request, timeout)
        return convert.adapter_info(response.adapter)

    async def register_composition(
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
        timeout: float | None = None,
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
        response = await self._call(self._stub.RegisterComposition, request, timeout)
        return convert.adapter_info(response.adapter)

    async def upload(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Sends the adapter that PEFT saved in `folder`, on this machine, and registers it.

        Args:
            progress: called with the bytes sent so far, and all there are; perhaps on another thread.
        """
        parts = upload_parts(name, folder, load_inplace, progress)
        response = await self._call(self._stub.UploadAdapter, _threaded(parts), timeout)
        return convert.adapter_info(response.adapter)

    async def unload(
        self, name: str, *, grace_seconds: float | None = None, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Waits for the adapter's running requests, frees it, and returns what is registered then.

        Requests that still run after `grace_seconds` are cancelled; None lets them run to their end.
        """
        request = convert.unload_request(name, grace_seconds)
        response = await self._call(self._stub.UnloadAdapter, request, timeout)
        return [convert.adapter_info(adapter) for adapter in response.remaining]

    async def prefetch(
        self, names: Sequence[str], *, host_only: bool = False, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Hints that adapters will be wanted; they are brought in as far as there is room that nobody needs.

        Returns at once, with where they are now.
        """
        response = await self._call(self._stub.Prefetch, convert.prefetch_request(names, host_only), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def watch(self, names: Sequence[str] = (), *, timeout: float | None = None) -> AsyncAdapterWatch:
        """All adapters, or those of these names, and then what changes with them, as an iterator."""
        options = self._options(timeout)
        return AsyncAdapterWatch(self._stub.Watch(convert.watch_request(names), **options))

    async def list(self, *, timeout: float | None = None) -> list[AdapterInfo]:
        """All registered adapters."""
        response = await self._call(self._stub.ListAdapters, adapters_pb2.ListAdaptersRequest(), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    async def get(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        """One adapter."""
        request = convert.named(adapters_pb2.GetAdapterRequest, name)
        response = await self._call(self._stub.GetAdapter, request, timeout)
        return convert.adapter_info(response.adapter)

    async def pin(self, name: str, pinned: bool = True, *, timeout: float | None = None) -> AdapterInfo:
        """Brings the adapter to the device and keeps it there; `pinned=False` lets it be evicted again."""
        response = await self._call(self._stub.PinAdapter, convert.pin_request(name, pinned), timeout)
        return convert.adapter_info(response.adapter)


async def _threaded(parts: Iterator[Any]) -> AsyncIterator[Any]:
    """What reads files and hashes them, on threads."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
