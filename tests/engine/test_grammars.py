"""Answers of a given form: what grammars allow, in one batch with free text, and beside the step loop."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.core.request import Structure
from loraplex_server.core.step import StepPlan
from loraplex_server.engine import grammars, structured_output
from loraplex_server.engine.grammar_matcher import GrammarMatcher
from loraplex_server.engine.grammars import Grammars
from loraplex_server.engine.token_trie import load_token_trie
from loraplex_server.model.run.sampler import sample

llguidance = pytest.importorskip("llguidance", reason="needs the server extra: llguidance")

VOCABULARY = 211
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Structure("json_schema", json.dumps(SCHEMA))
REGEX = Structure("regex", r"[a-f]{3}-\d{4}")
CHOICE = Structure("choice", choices=("yes", "no", "per (haps) [é]*"))
LARK = Structure("grammar", 'start: "<" word ("," word)~1..3 ">"\nword: /[a-z]{2,4}/')
PROMPT = [5, 17, 60, 121, 9]


def fits_schema(text: str) -> bool:
    found = json.loads(text)
    return (
        found.keys() == {"name", "age", "tags"}
        and found["name"] in ("ada", "grace")
        and type(found["age"]) is int
        and 0 <= found["age"] <= 120
        and len(found["tags"]) <= 2
        and all(isinstance(tag, bool) for tag in found["tags"])
    )


FORMS: dict[str, tuple[Structure, Callable[[str], Any]]] = {
    "json_schema": (JSON, fits_schema),
    "regex": (REGEX, re.compile(r"[a-f]{3}-[0-9]{4}").fullmatch),
    "choice": (CHOICE, lambda text: text in CHOICE.choices),
    "grammar": (LARK, re.compile(r"<[a-z]{2,4}(,[a-z]{2,4}){1,3}>").fullmatch),
}


@dataclasses.dataclass(frozen=True)
class Model:
    base: Path
    adapters: Path


@pytest.fixture(scope="module")
def spoken(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama with a tokenizer: bytes, a few words, and more rows than tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [char for char in alphabet if char in string.printable]
    bytes_of_e = [alphabet_of(byte) for byte in "é".encode()]
    words = ['{"', '":', '",', "true", "false", "name", "ad", "gra", "yes", "no", "12", "},", "Ġ", "abc"]
    tokens = ["<pad>", "<s>", "</s>", *dict.fromkeys([*printable, *bytes_of_e, *words])]
    assert len(tokens) < VOCABULARY
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    folder = tmp_path_factory.mktemp("spoken") / "base"
    folder.mkdir()
    for file in tiny("Llama").base.iterdir():
        (folder / file.name).symlink_to(file)
    made.save_pretrained(folder)
    return Model(folder, tiny("Llama").adapters)


def alphabet_of(byte: int) -> str:
    """The character that stands for a byte above 160 in byte-level vocabularies, itself."""
    assert byte > 160
    return chr(byte)


@pytest.fixture(scope="module")
def trie(spoken: Model) -> Any:
    return load_token_trie(str(spoken.base), VOCABULARY, (EOS,))


@pytest.fixture
def text_of(spoken: Model) -> Callable[[list[int]], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spoken.base)
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def compiled(grammars: Grammars, structure: Structure) -> GrammarMatcher:
    """A new answer's matcher."""
    return grammars.start(structure).result(60)


def await_grammars(served: Any) -> None:
    """Returns once whoever waits for a grammar can be queued with the next step."""
    for future in served.engine._structured.compiling.values():
        future.result(60)


def bits(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("kind", FORMS)
def test_answers_have_the_form_that_was_asked_for(kind: str, served: Any, text_of: Any) -> None:
    """Greedy and drawn, with and without an adapter: whole, and ended as soon as nothing can follow."""
    structure, fits = FORMS[kind]
    asked = {
        f"{kind} {seed} {adapters}": served.submit(
            f"{kind} {seed} {adapters}",
            PROMPT,
            adapters,
            structure=structure,
            temperature=2.0 * (seed > 0),
            seed=seed,
            max_tokens=100,
        )
        for seed in range(4)
        for adapters in ([], [("r6", 1.0)])
    }
    served.run()
    texts = {text_of(answer.tokens) for answer in asked.values()}
    for answer in asked.values():
        assert (answer.error, answer.finish) == (None, "stop")
        assert fits(text_of(answer.tokens)), text_of(answer.tokens)
        assert EOS not in answer.tokens, "nothing can follow, so the end needs no token"
    assert len(texts) > 1 or kind == "choice"


@pytest.fixture(scope="module")
def served(spoken: Model, module_harness: Any) -> Any:
    return module_harness(spoken)


def test_one_batch_of_every_kind_and_free_text(served: Any, spoken: Model, text_of: Any) -> None:
    """The free rows' tokens are those of a batch in which nobody has a grammar."""
    free = {
        "greedy": {"max_tokens": 12, "ignore_eos": True, "logprobs": 2},
        "drawn": {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3},
        "penalised": {"max_tokens": 12, "ignore_eos": True, "frequency_penalty": 1.0, "min_p": 0.01},
    }
    adapters = {"greedy": [], "drawn": [("r6", 1.0)], "penalised": [("r7", 0.5), ("r14", 1.0)]}

    def ask(prefix: str) -> dict[str, Any]:
        return {
            name: served.submit(f"{prefix} {name}", PROMPT, adapters[name], **options)
            for name, options in free.items()
        }

    alone = ask("alone")
    served.run()
    held = {
        kind: served.submit(kind, PROMPT, [("r16", 1.0)], structure=structure, max_tokens=100)
        for kind, (structure, _) in FORMS.items()
    }
    together = ask("together")
    await_grammars(served)
    served.engine.stats()
    served.run()
    assert max(step.requests for step in served.engine.stats().steps) == len(FORMS) + len(free)
    for name in free:
        assert together[name].tokens == alone[name].tokens, name
    found, expected = ([one.logprob for one in answers["greedy"].logprobs] for answers in (together, alone))
    assert found == pytest.approx(expected, abs=1e-3)
    for kind, (_, fits) in FORMS.items():
        assert fits(text_of(held[kind].tokens)), text_of(held[kind].tokens)


def test_masks_are_llguidances_token_by_token(trie: Any) -> None:
    """Along an answer, the words of the mask have the bits that a matcher of its own computes."""
    answers = {"json_schema": '{"name":"ada","age":12,"tags":[true]}', "choice": "per (haps) [é]*"}
    for kind, answer in answers.items():
        held = compiled(Grammars(lambda: trie, VOCABULARY), FORMS[kind][0])
        source = (
            llguidance.LLMatcher.grammar_from_json_schema(JSON.text)
            if kind == "json_schema"
            else llguidance.LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in CHOICE.choices)
            )
        )
        truth = llguidance.LLMatcher(trie, source)
        tokens = trie.tokenize_str(answer)
        for index, token in enumerate(tokens):
            expected = bits(np.frombuffer(truth.compute_bitmask(), np.uint8))
            assert bits(held.mask) == expected
            assert token in expected
            assert truth.consume_token(token)
            held.follow(token)
            assert (held.complete, held.error) == (index == len(tokens) - 1, "")


def test_the_sampler_takes_what_the_mask_allows() -> None:
    """Greedy and drawn rows, beside rows without a mask; columns beyond the mask are not allowed."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 150, generator=generator)
    before = logits.clone()
    allowed = {1: [3, 64, 127, 128], 4: [63], 5: [0, 99]}
    words = np.zeros((len(allowed), 3), np.uint64)
    for row, tokens in enumerate(allowed.values()):
        for token in tokens:
            words[row, token // 64] |= np.uint64(1 << token % 64)
    columns: dict[str, Any] = {field.name: np.zeros(0, np.int64) for field in dataclasses.fields(StepPlan)}
    columns |= {
        "sample_row": np.arange(6),
        "top_k": np.zeros(6, np.int64),
        "top_p": np.ones(6),
        "num_logprobs": np.full(6, -1),
        "masked_row": np.array([*allowed]),
        "mask_words": words.view(np.int64).reshape(-1),
    }
    for width in (150, 130, 129):
        part = logits[:, :width]
        for temperature in (0.0, 1.0, 30.0):
            for uniform in (0.0, 0.5, 0.999):
                columns |= {"temperature": np.full(6, temperature), "uniform": np.full(6, uniform)}
                free = {**columns, "masked_row": columns["masked_row"][:0]}
                found = [one.token_id for one in sample(part, StepPlan(**columns))]
                plain = [one.token_id for one in sample(part, StepPlan(**free))]
                for row in range(6):
                    if row in allowed:
                        assert found[row] in allowed[row]
                    else:
                        assert found[row] == plain[row]
        best = {row: max(tokens, key=lambda token: part[row, token]) for row, tokens in allowed.items()}
        columns |= {"temperature": np.zeros(6)}
        assert {row: sample(part, StepPlan(**columns))[row].token_id for row in allowed} == best
    wide = torch.zeros(6, 400)
    wide[:, 300] = 9.0
    found = [one.token_id for one in sample(wide, StepPlan(**columns))]
    assert [token == 300 for token in found] == [row not in allowed for row in range(6)]
    assert torch.equal(logits, before)


def test_bans_give_way_where_nothing_were_left(trie: Any) -> None:
    held = compiled(Grammars(lambda: trie, VOCABULARY), Structure("regex", "[ab]{1,2}"))
    a, b = trie.tokenize_str("a") + trie.tokenize_str("b")
    assert {a, b} <= set(bits(held.mask))
    assert a not in bits(held.allowed([a, VOCABULARY + 5]))
    assert bits(held.allowed([])) == bits(held.mask)
    assert bits(held.allowed(range(VOCABULARY))) == bits(held.mask)


def test_ends_of_an_answer(served: Any, text_of: Any) -> None:
    """The end of sequence where the form is whole, or put off; limits, stop tokens and least lengths."""
    some = Structure("regex", "a{1,30}")
    early = served.submit("early", PROMPT, structure=some, logit_bias=((EOS, 100.0),), max_tokens=40)
    late = served.submit(
        "late", PROMPT, structure=some, logit_bias=((EOS, 100.0),), ignore_eos=True, max_tokens=40
    )
    least = served.submit(
        "least", PROMPT, structure=some, logit_bias=((EOS, 100.0),), min_tokens=3, max_tokens=40
    )
    short = served.submit("short", PROMPT, structure=JSON, max_tokens=4)
    served.run()
    assert (early.finish, early.tokens[-1], text_of(early.tokens)) == ("stop", EOS, "a")
    assert (late.finish, text_of(late.tokens)) == ("stop", "a" * 30)
    assert (least.finish, text_of(least.tokens)) == ("stop", "aaa")
    assert (short.finish, len(short.tokens)) == ("length", 4)
    (stop, *_) = short.tokens[1:]
    stopped = served.submit("stopped", PROMPT, structure=JSON, max_tokens=40, stop_token_ids=(stop,))
    served.run()
    assert (stopped.finish, stopped.tokens) == ("stop", short.tokens[: short.tokens.index(stop) + 1])


def test_a_preempted_answer_goes_on_where_it_was(spoken: Model, served: Any, harness: Any) -> None:
    def ask(one: Any) -> list[Any]:
        sampling = {"temperature": 1.5, "max_tokens": 60}
        return [one.submit(f"p{seed}", PROMPT, structure=JSON, seed=seed, **sampling) for seed in range(3)]

    whole = ask(served)
    served.run()
    # 12 blocks of 4 tokens for three requests of about 30.
    tight = harness(
        spoken,
        scheduler={"kv_block_size": 4, "kv_cache_bytes": 12 * 2 * 2 * 2 * 4 * 16 * 4, "max_model_len": 48},
    )
    found = ask(tight)
    await_grammars(tight)
    tight.run()
    assert [one.tokens for one in found] == [one.tokens for one in whole]
    assert sum(step.preemptions for step in tight.engine.stats().steps) > 0


class Gate:
    """A tokenizer that is loaded when it is let."""

    def __init__(self, trie: Any) -> None:
        self._trie = trie
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> Any:
        self.begun.set()
        assert self.open.wait(60)
        return self._trie


@pytest.fixture
def gated(spoken: Model, harness: Any, trie: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A harness whose structures are not compiled before the gate is opened; a queue of three."""
    one, gate = harness(spoken, scheduler={"max_queue": 3}), Gate(trie)
    monkeypatch.setattr(one.engine._structured, "_grammars", Grammars(gate, VOCABULARY))
    yield one, gate
    gate.open.set()


def test_who_waits_for_a_grammar_holds_back_nobody(gated: Any) -> None:
    one, gate = gated
    held = one.submit("held", PROMPT, [("r6", 1.0)], structure=REGEX)
    same = one.submit("same", PROMPT, structure=REGEX, max_tokens=40)
    free = one.submit("free", PROMPT, max_tokens=3, ignore_eos=True)
    refused = one.submit("refused", PROMPT, max_tokens=3)
    assert refused.error.code == "RESOURCE_EXHAUSTED"
    assert one.engine.stats().waiting == 3
    assert gate.begun.wait(60)
    while free.finish is None:
        one.engine.step()
    assert one.engine.stats().waiting == 2
    assert one.engine.check_integrity().adapter_references == 1
    one.engine.cancel("test", "held")
    assert one.engine.check_integrity().adapter_references == 0
    late = one.submit("late", PROMPT, structure=JSON, deadline_s=time.time() + 0.01)
    while late.error is None:
        one.engine.step()
    assert late.error.code == "DEADLINE_EXCEEDED"
    gate.open.set()
    one.run()
    assert (same.finish, held.tokens) == ("stop", [])


def test_a_client_that_is_gone_and_a_structure_that_takes_too_long(
    gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = gated
    one.submit("gone", PROMPT, [("r6", 1.0)], structure=REGEX)
    one.engine.cancel_client("test")
    assert not one.engine.has_work
    monkeypatch.setattr(structured_output, "COMPILE_S", 0.0)
    slow = one.submit("slow", PROMPT, structure=REGEX)
    while slow.error is None:
        one.engine.step()
    assert slow.error.code == "RESOURCE_EXHAUSTED"


def test_what_is_compiled_is_kept_and_shared(trie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 32 structures, each for 64 answers; nothing that nobody waits for is begun."""
    made: list[Structure] = []
    compile_one = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, structure: made.append(structure) or compile_one(self, structure)
    )
    gate = Gate(trie)
    kept = Grammars(gate, VOCABULARY)
    first, second, third = (kept.start(structure) for structure in (REGEX, JSON, LARK))
    assert gate.begun.wait(60)
    same = kept.start(REGEX)
    # Two threads, and both wait at the gate.
    assert third.cancel()
    gate.open.set()
    one, other = first.result(60), same.result(60)
    second.result(60)
    assert sorted(one.kind for one in made) == ["json_schema", "regex"]
    (token, *_) = bits(one.mask)
    before = bits(other.mask)
    one.follow(token)
    assert bits(other.mask) == before, "an answer's place is its own"
    for _ in range(64):
        compiled(kept, REGEX)
    assert (made.count(REGEX), len(made)) == (2, 3)
    for number in range(32):
        compiled(kept, Structure("choice", choices=(str(number),)))
    compiled(kept, JSON)
    assert made.count(JSON) == 2


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        (Structure("json_schema", '{"type": "strin"}'), "Invalid type"),
        (Structure("json_schema", '{"not": {"type": "string"}}'), "Unimplemented keys"),
        (Structure("json_schema", '{"$ref": "file:///etc/passwd"}'), "not fetch"),
        (Structure("json_schema", "{" * 2000), "column"),
        (Structure("regex", "[0-9"), "unclosed"),
        (Structure("regex", r"a(?=b)"), "look-around"),
        (Structure("regex", "日本"), "cannot be followed"),
        (Structure("grammar", "start: nothing"), "unknown name"),
        (Structure("grammar", "}{"), ""),
    ],
)
def test_what_is_no_structure_is_said_to_be_none(structure: Structure, said: str, trie: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        compiled(Grammars(lambda: trie, VOCABULARY), structure)
    (violation,) = caught.value.info.violations
    assert violation.field == f"structure.{structure.kind}"
    assert said in violation.description
    assert len(violation.description) < 400
    assert "\n" not in violation.description


def test_what_takes_too_much_is_refused(trie: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where that is known, and else when it is; what answers share is then forgotten."""
    many = {"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for j in range(4)]} for i in range(12)]}
    with pytest.raises(InvalidArgumentError, match="json_schema"):
        compiled(Grammars(lambda: trie, VOCABULARY), Structure("json_schema", json.dumps(many)))
    limits = llguidance.LLParserLimits(max_lexer_states=60, verbose_errors=False)
    monkeypatch.setattr(grammars, "_limits", lambda: limits)
    for number in range(2):
        large = served.submit(
            f"large{number}",
            PROMPT,
            structure=Structure("regex", "[xy]*x[xy]{12}z"),
            temperature=1000.0,
            seed=number,
            bad_words=(tuple(trie.tokenize_str("z")),),
            max_tokens=100,
        )
        served.run()
        assert large.error.code == "INVALID_ARGUMENT"
        assert "too many states" in large.error.message
        assert len(large.tokens) > 1


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(served: Any) -> None:
    """No token of the model can go on after "ab": that request fails, its neighbour does not."""
    bad = served.submit("bad", PROMPT, structure=Structure("regex", "ab日"), max_tokens=20)
    good = served.submit("good", PROMPT, max_tokens=20, ignore_eos=True)
    served.run()
    assert bad.error.code == "INVALID_ARGUMENT"
    assert [violation.field for violation in bad.error.violations] == ["structure.regex"]
    assert len(good.tokens) == 20


def test_a_model_without_a_tokenizer_says_so(tiny: Any, harness: Any) -> None:
    one = harness(tiny("Llama"))
    asked = one.submit("r", PROMPT, structure=REGEX)
    one.run()
    assert asked.error.code == "FAILED_PRECONDITION"
    assert "tokenizer" in asked.error.message


def test_a_server_without_llguidance_serves_free_text(
    spoken: Model, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    one = harness(spoken)
    held = one.submit("held", PROMPT, structure=REGEX)
    free = one.submit("free", PROMPT, max_tokens=3, ignore_eos=True)
    one.run()
    assert held.error.code == "FAILED_PRECONDITION"
    assert "llguidance" in held.error.message
    assert len(free.tokens) == 3


def test_tokenizers_of_every_make_are_known_as_bytes(tmp_path: Path) -> None:
    """Characters that stand for themselves, and vocabularies with more or fewer tokens than the model."""
    from loraplex_bench.demo.tasks import data_dir

    demo = load_token_trie(str(data_dir() / "base"), 100, (EOS,))
    assert demo.decode_bytes(demo.tokenize_str('{"a": 1}')) == b'{"a": 1}'
    for size, ends in ((64, (EOS,)), (300, (EOS, 3)), (100, ())):
        trie = load_token_trie(str(data_dir() / "base"), size, ends)
        held = compiled(Grammars(lambda trie=trie: trie, size), Structure("regex", "[a-zA-Z~]?"))
        allowed = bits(held.mask)
        assert max(allowed) < size
        assert ({"~", "Z"} <= {trie.decode_str([token]) for token in allowed}) == (size > 64)
        assert [token for token in ends if token in allowed] == list(ends)
    with pytest.raises(FailedPreconditionError, match="tokenizer"):
        load_token_trie(str(tmp_path), 100, (EOS,))


def test_what_breaks_in_a_thread_ends_its_request_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("of /a/folder")

    with monkeypatch.context() as patch:
        patch.setattr(Grammars, "_start", broken)
        unborn = served.submit("unborn", PROMPT, structure=REGEX)
        good = served.submit("good", PROMPT, max_tokens=3, ignore_eos=True)
        served.run()
    with monkeypatch.context() as patch:
        patch.setattr(GrammarMatcher, "follow", broken)
        broken_off = served.submit("broken off", PROMPT, structure=REGEX)
        served.run()
    assert (unborn.error.code, broken_off.error.code) == ("INTERNAL", "INTERNAL")
    assert "folder" not in unborn.error.message + broken_off.error.message
    assert (len(unborn.tokens), len(broken_off.tokens), len(good.tokens)) == (0, 1, 3)


class Ahead:
    """A runner whose steps are known when they are asked for, so that the engine is one ahead."""

    asynchronous = True

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def test_one_step_ahead_of_the_device(spoken: Model, served: Any, harness: Any) -> None:
    """Requests with a grammar wait for their token; others do not, and every answer is the same."""

    def ask(one: Any) -> list[Any]:
        asked = [
            one.submit(f"a{kind}", PROMPT, [("r8", 1.0)], structure=structure, temperature=1.0, seed=5)
            for kind, (structure, _) in FORMS.items()
        ]
        asked.append(one.submit("a free", PROMPT, max_tokens=30, ignore_eos=True, temperature=1.0, seed=6))
        one.run()
        return [(answer.tokens, answer.finish) for answer in asked]

    ahead = harness(spoken)
    ahead.engine._runner = Ahead(ahead.engine._runner)
    assert ask(ahead) == ask(served)
