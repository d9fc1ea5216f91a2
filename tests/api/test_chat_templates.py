"""Chat templates in their own process: the same text as transformers, and no way to hold the server up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loraplex_server.api.text.chat.process import OverLimitError, RendererProcess
from loraplex_server.api.text.chat.prompts import variables_of
from loraplex_server.api.text.chat.renderer import Render, render
from loraplex_server.core.errors import UnavailableError

MESSAGES = [
    {"role": "system", "content": 'Be <kind> & "brief".'},
    {"role": "user", "content": "  Zoë, 2 > 1?\n"},
    {"role": "assistant", "content": "Ja."},
    {"role": "user", "content": "你好"},
]
# Written for these tests, each with what a family of models uses.
TEMPLATES = {
    "role markers, generation prompt": """\
{% for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
    "a system message set apart, namespaces, errors": """\
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = none -%}{%- set rest = messages -%}{%- endif -%}
{%- set ns = namespace(turn=0) -%}
{{ bos_token }}
{%- for m in rest -%}
  {%- set even = loop.index0 % 2 == 0 -%}
  {%- if (m.role == 'user') != even -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
  {%- set ns.turn = ns.turn + 1 -%}
  [{{ ns.turn }}{% if loop.first and system %} sys={{ system }}{% endif %}] {{ m.content }}
  {%- if m.role == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}""",
    "json, loop controls, the generation tag, macros": """\
{% macro say(m) %}{{ {"r": m.role, "c": m.content} | tojson }}{% endmacro %}
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% if m.role == 'assistant' %}{% generation %}{{ say(m) }}{% endgeneration %}{% else %}{{ say(m) }}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}
{{ tools is defined }} {{ messages | map(attribute='role') | join(',') }}
{{ messages | tojson(indent=2) }}""",
}


def job(template: str, **variables: Any) -> Render:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Render(template, {**variables_of(MESSAGES, special), **variables}, 100_000)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, byte_level_tokenizer: Any) -> None:
    expected = byte_level_tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    found = render(job(TEMPLATES[name]))
    assert (found.refused, found.broken) == ("", "")
    assert found.text == expected


def test_refusals_and_faults_are_told_apart() -> None:
    roles = [{"role": "assistant", "content": "first"}]
    refused = render(job(TEMPLATES["a system message set apart, namespaces, errors"], messages=roles))
    assert refused.refused == "the chat template says: roles must alternate"
    for template in (
        "{% if %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ nobody() }}",
        "{% include 'secrets' %}",
    ):
        assert render(job(template)).broken, template
    long = render(Render("{% for i in range(9999) %}0123456789{% endfor %}", {}, 1000))
    assert "more than 1000 characters" in long.refused


@pytest.fixture
def renderer() -> Iterator[RendererProcess]:
    return RendererProcess(render_s=1.0)


def test_time_and_memory_are_bounded_and_the_next_one_is_served(renderer: RendererProcess) -> None:
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    large = (
        "{% set n = namespace(x='0123456789') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    )

    async def main() -> None:
        assert (await renderer.render(job("a{{ messages | length }}"))).text == "a4"
        for bad in (forever, large, "{{ 'x' * 10 ** 10 }}", "{{ 10 ** (10 ** 9) }}"):
            with pytest.raises(OverLimitError):
                await renderer.render(job(bad))
            assert (await renderer.render(job("{{ 1 }}"))).text == "1"
        texts = await asyncio.gather(*(renderer.render(job(f"{{{{ {i} }}}}")) for i in range(20)))
        assert [text.text for text in texts] == [str(i) for i in range(20)]
        # One whose caller is gone must not answer the next one.
        gone = asyncio.create_task(renderer.render(job(forever)))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        started = time.monotonic()
        assert (await renderer.render(job("next"))).text == "next"
        assert time.monotonic() - started < 30
        await renderer.close()
        await renderer.close()
        with pytest.raises(UnavailableError):
            await renderer.render(job("late"))

    asyncio.run(main())


def test_nothing_of_the_servers_environment_reaches_a_template(
    renderer: RendererProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")

    async def main() -> bytes:
        await renderer.render(job("x"))
        assert renderer._process is not None
        with open(f"/proc/{renderer._process.pid}/environ", "rb") as file:
            found = file.read()
        await renderer.close()
        return found

    assert b"secret" not in asyncio.run(main())
