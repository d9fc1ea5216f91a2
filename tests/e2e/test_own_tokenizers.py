"""Adapters that bring added tokens, as PEFT and a tokenizer save them: text through a real server is what
transformers makes of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import Client
from loraplex.errors import FailedPreconditionError
from loraplex_bench.demo.tasks import data_dir
from loraplex_bench.load.launcher import LaunchedServer, demo_flags

TOKENS = {"own": ["<|tool|>", "<|end|>"], "other": ["<|else|>"]}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of adapters, and PEFT's model of each with its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, models = tmp_path_factory.mktemp("adapters"), {}
    torch.manual_seed(5)
    for name, tokens in TOKENS.items():
        tokenizer = AutoTokenizer.from_pretrained(data_dir() / "base")
        tokenizer.add_tokens(tokens[:1])
        tokenizer.add_tokens(tokens[1:], special_tokens=True)
        if name == "own":
            tokenizer.eos_token = "<|end|>"
            tokenizer.chat_template = (
                "{% for m in messages %}<|tool|>{{ m.content }}{{ eos_token }}{% endfor %}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(data_dir() / "base", dtype=torch.float32)
            base.resize_token_embeddings(len(tokenizer))
            config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
            model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or "modules_to_save" in parameter_name:
                parameter.data += 0.3 * parameter.data.std() * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        models[name] = (model.eval(), tokenizer)
    return root, models


@pytest.fixture(scope="module")
def client(
    adapters: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    flags = demo_flags(quantization="none", adapters=adapters[0])
    flags += ["--allow-uploads", "--adapter-cache-dir", str(tmp_path_factory.mktemp("cache"))]
    with (
        LaunchedServer([*flags, "--dtype", "float32", "--threads", "1"]) as server,
        Client(server.grpc) as made,
    ):
        yield made


@pytest.mark.parametrize("name", TOKENS)
def test_text_is_what_transformers_makes_of_it(
    name: str, client: Client, adapters: tuple[Path, dict[str, Any]]
) -> None:
    model, tokenizer = adapters[1][name]
    for text in (f"abc{TOKENS[name][0]}12 x\n", "".join(TOKENS[name]), "plain\n"):
        ids = tokenizer(text)["input_ids"]
        assert client.tokenize(text, adapters=name) == ids
        assert client.count_tokens(text, adapters=[name]) == len(ids)
        answer = client.generate(text, adapter=name, max_tokens=12, ignore_eos=True)
        with torch.inference_mode():
            row = torch.tensor([ids])
            expected = model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        assert answer.token_ids == expected
        whole = tokenizer.decode(ids + expected, skip_special_tokens=True)
        assert whole == tokenizer.decode(ids, skip_special_tokens=True) + answer.text
    base = client.tokenize(f"x{TOKENS[name][0]}")
    assert max(base) < 100
    assert len(base) > 3


def test_added_tokens_are_answered_as_text(client: Client, adapters: tuple[Path, dict[str, Any]]) -> None:
    _, tokenizer = adapters[1]["own"]
    tool, end = tokenizer.convert_tokens_to_ids(TOKENS["own"])
    pushed = {"adapter": "own", "temperature": 0, "max_tokens": 3}
    answer = client.generate("abc\n", logit_bias={tool: 100.0}, logprobs=20, **pushed)
    assert (answer.text, answer.token_ids) == ("<|tool|>" * 3, [tool] * 3)
    for step in answer.logprobs or []:
        assert all(top.text == tokenizer.decode([top.token_id]) for top in step.top)
    ended = client.generate("abc\n", logit_bias={end: 100.0}, **pushed)
    assert (ended.text, ended.finish_reason, ended.token_ids) == ("", "stop", [end])
    on = client.generate("abc\n", logit_bias={end: 100.0}, ignore_eos=True, **pushed)
    assert (on.text, on.finish_reason, on.token_ids) == ("", "length", [end] * 3)


def test_conversations_in_the_words_of_the_adapter(
    client: Client, adapters: tuple[Path, dict[str, Any]]
) -> None:
    _, tokenizer = adapters[1]["own"]
    said = [{"role": "user", "content": "hello"}, {"role": "tool", "content": "42"}]
    expected = tokenizer.apply_chat_template(said, tokenize=False)
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert client.tokenize(said, adapters="own") == ids
    assert client.chat(said, adapter="own", max_tokens=2).usage.prompt_tokens == len(ids)


def test_an_adapter_that_a_client_sends_brings_its_tokenizer(
    client: Client, adapters: tuple[Path, dict[str, Any]]
) -> None:
    root, models = adapters
    _, tokenizer = models["own"]
    client.adapters.upload("sent", root / "own")
    text = "abc<|tool|>12\n"
    assert client.tokenize(text, adapters="sent") == tokenizer(text)["input_ids"]
    said = [{"role": "user", "content": "hello"}]
    assert client.tokenize(said, adapters="sent") == client.tokenize(said, adapters="own")
    answers = [client.generate(text, adapter=name, max_tokens=8) for name in ("sent", "own")]
    assert answers[0].token_ids == answers[1].token_ids
    # The same files are the same tokenizer.
    assert client.count_tokens(text, adapters=["sent", "own"]) == len(tokenizer(text)["input_ids"])


def test_two_tokenizers_in_one_request(client: Client) -> None:
    for act in (
        lambda: client.generate("x", adapters=["own", "other"]),
        lambda: client.tokenize("x", adapters=["own", "other"]),
    ):
        with pytest.raises(FailedPreconditionError, match="'own' and 'other' bring different tokenizers"):
            act()


def test_a_new_version_comes_with_its_tokenizer(
    client: Client, adapters: tuple[Path, dict[str, Any]]
) -> None:
    """Nothing but its tokenizer is changed: text is the new version's once the adapter is loaded in place."""
    root, models = adapters
    _, tokenizer = models["other"]
    folder = root / "other"
    changed = type(tokenizer).from_pretrained(folder)
    changed.add_tokens(["##"])
    changed.save_pretrained(folder)
    client.adapters.load("other", folder, load_inplace=True)
    assert client.tokenize("a##b", adapters="other") == changed("a##b")["input_ids"]
    assert client.tokenize("a##b", adapters="other") != tokenizer("a##b")["input_ids"]
