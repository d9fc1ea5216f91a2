"""The client that blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from loraplex import _convert as convert
from loraplex._base import BaseClient, Wait, stubs_on
from loraplex._convert import AdapterMix, ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._status import TranslatedErrors
from loraplex._types import AdapterChanges, AdapterInfo, Generation, GenerationChunk, ModelInfo
from loraplex._upload import Progress, upload_parts
from loraplex.errors import DeadlineExceededError, UnavailableError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2


class Client(BaseClient):
    """A loraplex server, called from threads; one client serves any number of them.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Dear Sir", adapter="polite", max_tokens=64).text)
        for chunk in client.stream("Dear Sir", adapters=[("sql", 1.0), ("polite", 0.5)]):
            print(chunk.text, end="", flush=True)
    """

    def _open(self) -> None:
        settings = self._settings
        self._channel: grpc.Channel = (
            grpc.insecure_channel(settings.target, settings.options)
            if settings.credentials is None
            else grpc.secure_channel(settings.target, settings.credentials, settings.options)
        )
        self._stubs = stubs_on(self._channel)
        self.adapters = Adapters(self)

    def generate(
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
        return self._generate(convert.generate_request(prompt, **options), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
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
        return self._generate(convert.generate_request(Conversation(messages), **options), timeout)

    def stream_chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """The same as an iterator of chunks. Arguments as `chat` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(Conversation(messages), **options), timeout)

    def tokenize(
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
        response = self._call(self._stubs.generation.Tokenize, request, timeout)
        return list(response.token_ids)

    def count_tokens(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> int:
        """How many tokens `tokenize` would return."""
        request = convert.tokenize_request(generation_pb2.CountTokensRequest, prompt, adapters)
        response = self._call(self._stubs.generation.CountTokens, request, timeout)
        return int(response.count)

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """The base model and the server's limits."""
        response = self._call(self._stubs.model.GetModel, model_pb2.GetModelRequest(), timeout)
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
                    self._stubs.model.GetModel,
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

    def _generate(self, request: generation_pb2.GenerateRequest, timeout: float | None) -> Generation:
        envelope = generation_pb2.GenerateUnaryRequest(request=request)
        response = self._call(
            self._stubs.generation.GenerateUnary, envelope, timeout, request_id=request.request_id
        )
        return convert.generation(request, response)

    def _stream(self, request: generation_pb2.GenerateRequest, timeout: float | None) -> GenerationStream:
        self._check_open()
        call = self._stubs.generation.Generate(request, **self._call_options(timeout))
        return GenerationStream(call, convert.AnswerReader(request))

    def _call(
        self, method: Any, request: Any, timeout: float | None, *, request_id: str = "", **how: Any
    ) -> Any:
        self._check_open()
        with TranslatedErrors(request_id):
            return method(request, **self._call_options(timeout), **how)


class GenerationStream:
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `with`, by `close()`, or by letting go
    of the last reference.
    """

    def __init__(self, call: Any, reader: convert.AnswerReader) -> None:
        self._call = call
        self._reader = reader

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._reader.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        with TranslatedErrors(self.request_id):
            response = next(self._call, None)
        if response is None:
            self._reader.check_complete()
            raise StopIteration
        return self._reader.chunk(response)

    def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return convert.joined(self)

    def close(self) -> None:
        """Cancels the generation, unless it has finished."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AdapterWatch:
    """What changes with the adapters: iterate over it. It ends by `with`, or by `close()`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AdapterChanges:
        with TranslatedErrors(""):
            response = next(self._call, None)
        if response is None:
            raise StopIteration
        return convert.adapter_changes(response)

    def close(self) -> None:
        """Ends it."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Adapters:
    """The adapters that the server knows: `client.adapters`."""

    def __init__(self, client: Client) -> None:
        self._call = client._call
        self._options = client._call_options
        self._stub = client._stubs.adapters

    def load(
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
        response = self._call(self._stub.LoadAdapter, request, timeout)
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
        response = self._call(self._stub.RegisterComposition, request, timeout)
        return convert.adapter_info(response.adapter)

    def upload(
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
        response = self._call(self._stub.UploadAdapter, parts, timeout)
        return convert.adapter_info(response.adapter)

    def unload(
        self, name: str, *, grace_seconds: float | None = None, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Waits for the adapter's running requests, frees it, and returns what is registered then.

        Requests that still run after `grace_seconds` are cancelled; None lets them run to their end.
        """
        request = convert.unload_request(name, grace_seconds)
        response = self._call(self._stub.UnloadAdapter, request, timeout)
        return [convert.adapter_info(adapter) for adapter in response.remaining]

    def prefetch(
        self, names: Sequence[str], *, host_only: bool = False, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Hints that adapters will be wanted; they are brought in as far as there is room that nobody needs.

        Returns at once, with where they are now.
        """
        response = self._call(self._stub.Prefetch, convert.prefetch_request(names, host_only), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def watch(self, names: Sequence[str] = (), *, timeout: float | None = None) -> AdapterWatch:
        """All adapters, or those of these names, and then what changes with them, as an iterator."""
        options = self._options(timeout)
        return AdapterWatch(self._stub.Watch(convert.watch_request(names), **options))

    def list(self, *, timeout: float | None = None) -> list[AdapterInfo]:
        """All registered adapters."""
        response = self._call(self._stub.ListAdapters, adapters_pb2.ListAdaptersRequest(), timeout)
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def get(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        """One adapter."""
        request = convert.named(adapters_pb2.GetAdapterRequest, name)
        response = self._call(self._stub.GetAdapter, request, timeout)
        return convert.adapter_info(response.adapter)

    def pin(self, name: str, pinned: bool = True, *, timeout: float | None = None) -> AdapterInfo:
        """Brings the adapter to the device and keeps it there; `pinned=False` lets it be evicted again."""
        response = self._call(self._stub.PinAdapter, convert.pin_request(name, pinned), timeout)
        return convert.adapter_info(response.adapter)
