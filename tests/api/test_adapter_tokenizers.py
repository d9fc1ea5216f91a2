"""Adapters' own tokenizers: tokens and text as transformers has them; what their files name is never run."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraplex.v1 import generation_pb2
from loraplex_server.adapters.files.own_tokenizer import find_tokenizer
from loraplex_server.api.text import adapter_tokenizers
from loraplex_server.api.text.adapter_tokenizers import AdapterTokenizers, ChosenTokenizer, _Recent
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.core.tokenizer_source import TokenizerSource
from loraplex_server.wire.messages import TokenizersChanged, TokenLogprobs

PLAIN, SPECIAL = ["<|tool|>", "Grüße"], ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def save(hf_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """`save(name, plain, special, eos)`: the base's tokenizer with tokens added, in an adapter's folder."""
    hf_tokenizer.save_pretrained(tmp_path / "base")

    def make(
        name: str, plain: list[str] = PLAIN, special: list[str] = SPECIAL, eos: str | None = None
    ) -> Path:
        changed = AutoTokenizer.from_pretrained(tmp_path / "base")
        changed.add_tokens(plain)
        changed.add_tokens(special, special_tokens=True)
        if eos is not None:
            changed.eos_token = eos
        folder = tmp_path / "adapters" / name
        changed.save_pretrained(folder)
        return folder

    return make


class Shelf:
    """AdapterTokenizers over folders."""

    def __init__(self, base: Tokenizer, vocab_size: int, tmp_path: Path) -> None:
        self.base = base
        self.sources: dict[str, TokenizerSource] = {}
        self.tokenizers = AdapterTokenizers(base, vocab_size, lambda: self.sources)
        self._root = tmp_path

    def add(self, folder: Path, added_tokens: int = 0) -> str:
        found = find_tokenizer(folder, [self._root])
        assert found is not None
        self.sources[folder.name] = TokenizerSource(found.folder, found.files, added_tokens)
        return folder.name

    def of(self, *names: str) -> ChosenTokenizer:
        return asyncio.run(self.tokenizers.of(names))


@pytest.fixture
def shelf(hf_tokenizer: Any, tmp_path: Path) -> Shelf:
    folder = tmp_path / "base"
    hf_tokenizer.save_pretrained(folder)
    return Shelf(Tokenizer.load(str(folder)), len(hf_tokenizer), tmp_path)


def test_tokens_and_text_are_those_of_transformers(
    shelf: Shelf, save: Callable[..., Path], random_text: Callable[[random.Random], str]
) -> None:
    folder = save("own")
    own = shelf.of(shelf.add(folder)).tokenizer
    exact = AutoTokenizer.from_pretrained(folder)
    assert own is not shelf.base
    rng = random.Random(4)
    for _ in range(60):
        text = "".join(rng.choice([random_text(rng), *PLAIN, *SPECIAL, " "]) for _ in range(5))
        tokens = asyncio.run(own.encode(text))
        assert list(tokens) == exact(text)["input_ids"]
        assert own.decode(tokens) == exact.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert all(own.token_text(token) == exact.decode([token]) for token in tokens[:5])
    ids = exact.convert_tokens_to_ids([*PLAIN, *SPECIAL])
    assert [own.has_text(token) for token in ids] == [True, True, False, False]
    assert not any(shelf.base.has_text(token) for token in ids)


def test_the_bases_own_costs_nothing(shelf: Shelf, save: Callable[..., Path], tmp_path: Path) -> None:
    assert shelf.of().tokenizer is shelf.of("unknown").tokenizer is shelf.base
    same = shelf.add(save("same", [], []))
    assert shelf.of(same) == ChosenTokenizer(shelf.base)
    assert shelf.of(same, same, "unknown").tokenizer is shelf.base


def test_tokens_that_have_no_weights_do_not_matter(shelf: Shelf, save: Callable[..., Path]) -> None:
    """As trainers of old left them: a token for padding, and no tokenizer.json."""
    folder = save("old")
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"[PAD]": 32000}')
    assert shelf.of(shelf.add(folder)).tokenizer is shelf.base
    with pytest.raises(FailedPreconditionError, match=r"there is no tokenizer\.json"):
        shelf.of(shelf.add(folder, added_tokens=1))


def test_what_is_alike_is_shared_and_what_differs_stands_apart(
    shelf: Shelf, save: Callable[..., Path]
) -> None:
    first, twin, other = (
        shelf.add(folder) for folder in (save("first"), save("twin"), save("other", ["<|else|>"], []))
    )
    assert shelf.of(first, twin).tokenizer is shelf.of(twin).tokenizer is shelf.of(first).tokenizer
    plain = shelf.add(save("plain", [], []))
    assert shelf.of(plain, other).tokenizer is shelf.of(other).tokenizer
    with pytest.raises(FailedPreconditionError, match="'first' and 'other' bring different tokenizers"):
        shelf.of(first, plain, other)


def test_asked_for_at_once_it_is_built_once(
    shelf: Shelf, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shelf.add(save("own"))
    built: list[Any] = []
    build = adapter_tokenizers._build
    monkeypatch.setattr(
        adapter_tokenizers, "_build", lambda files, base: (built.append(files), build(files, base))[1]
    )

    async def run() -> None:
        callers = [asyncio.create_task(shelf.tokenizers.of([name])) for _ in range(5)]
        await asyncio.sleep(0)
        callers[0].cancel()
        found = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert len({id(one.tokenizer) for one in found[1:]}) == 1

    asyncio.run(run())
    assert len(built) == 1


def test_an_end_of_its_own_ends_answers(shelf: Shelf, save: Callable[..., Path], hf_tokenizer: Any) -> None:
    folder = save("own", eos="<|im_end|>")
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    name = shelf.add(folder, added_tokens=4)
    assert shelf.of(name).end_token_ids == (end,)
    # The weights know no such token: it cannot come.
    shelf.add(folder, added_tokens=0)
    assert shelf.of(name).end_token_ids == ()
    assert shelf.of(shelf.add(save("usual"), added_tokens=4)).end_token_ids == ()


def spoil(folder: Path, **config: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_nothing_is_run_or_read_that_its_settings_name(
    shelf: Shelf, save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save("own")
    exact = AutoTokenizer.from_pretrained(folder)("a <|tool|> b")["input_ids"]
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    spoil(
        folder,
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_file=str(tmp_path / "nowhere.json"),
        vocab_file=str(tmp_path / "nowhere.model"),
        gguf_file="x.gguf",
        tokenizer_class="Evil",
    )
    own = shelf.of(shelf.add(folder)).tokenizer
    assert list(asyncio.run(own.encode("a <|tool|> b"))) == exact
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not one of the base's kind"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\x00"), "not one of the base's kind"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "added_tokens.json"), "save it with"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(bytes((32 << 20) + 1)), "at most"),
    ],
)
def test_what_cannot_be_used_is_refused(
    shelf: Shelf, save: Callable[..., Path], change: Callable[[Path], Any], why: str
) -> None:
    folder = save("own")
    change(folder)
    name = shelf.add(folder, added_tokens=1)
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match=why) as caught:
            shelf.of(name)
        assert "adapter 'own'" in str(caught.value)
        assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        ),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}),
        ("decoder", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
    ],
)
def test_rules_of_its_own_never_run(
    shelf: Shelf, save: Callable[..., Path], part: str, rule: dict[str, Any]
) -> None:
    """Such a rule takes for ever, or all memory, on a text that its author knows."""
    folder = save("own")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: rule}))
    with pytest.raises(FailedPreconditionError, match="cuts text by other rules than the base's"):
        shelf.of(shelf.add(folder))


def test_files_that_changed_since_the_adapter_was_checked(shelf: Shelf, save: Callable[..., Path]) -> None:
    folder = save("own")
    name = shelf.add(folder)
    shutil.copy(folder / "tokenizer.json", folder / "copy.json")
    (folder / "copy.json").rename(folder / "tokenizer.json")
    with pytest.raises(FailedPreconditionError, match="changed on disk; load the adapter anew"):
        shelf.of(name)
    assert shelf.of(shelf.add(folder)).tokenizer is not shelf.base


def test_the_least_used_go_by_size() -> None:
    recent: _Recent[str, int] = _Recent(10)
    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4)):
        recent.put(name, size, size)
    assert [recent.get(name) for name in "abc"] == [4, None, 4]
    recent.put("huge", 99, 99)
    assert [recent.get(name) for name in ("a", "c", "huge")] == [None, None, 99]


def test_over_grpc_and_http_as_adapters_come_and_go(serving: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The engine says what they bring; every way of asking has it, in and out."""
    pytest.importorskip("uvicorn", reason="needs the server extra: uvicorn")
    changed = AutoTokenizer.from_pretrained(checkpoint)
    changed.add_tokens(PLAIN)
    folder = tmp_path / "own"
    changed.save_pretrained(folder)
    source = find_tokenizer(folder, [tmp_path])
    assert source is not None
    text = "the <|tool|> fox"

    async def echo(engine: Any, request: Request) -> None:
        ids = request.prompt_token_ids
        logprobs = tuple(TokenLogprobs(token, -0.5) for token in ids)
        engine.tokens(request, *ids, logprobs=logprobs, finish=FinishReason.LENGTH)

    async def main() -> None:
        async with serving(echo, http_port=0) as server:

            async def tokens() -> list[int]:
                request = generation_pb2.TokenizeRequest(text=text, adapters=["own"])
                return list((await server.generation.Tokenize(request)).token_ids)

            plain = await tokens()
            server.engine.send(TokenizersChanged({"own": source}))
            async with asyncio.timeout(20):
                while (own := await tokens()) == plain:
                    await asyncio.sleep(0.01)
            assert own == changed(text)["input_ids"]
            request = generation_pb2.GenerateRequest(text=text, adapters=[{"adapter": "own"}], logprobs=0)
            whole = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(request=request)
            )
            assert (whole.text, list(whole.token_ids)) == (text, own)

            def post() -> Any:
                body = {"model": "own", "prompt": text, "logprobs": 0}
                asked = urllib.request.Request(
                    f"http://{server.http_at}/v1/completions",
                    json.dumps(body).encode(),
                    {"content-type": "application/json"},
                )
                with urllib.request.urlopen(asked, timeout=20) as response:
                    return json.load(response)["choices"][0]

            answer = await asyncio.to_thread(post)
            assert answer["text"] == text
            assert "<|tool|>" in answer["logprobs"]["tokens"]
            server.engine.send(TokenizersChanged({"own": None}))
            async with asyncio.timeout(20):
                while await tokens() != plain:
                    await asyncio.sleep(0.01)

    asyncio.run(main())
