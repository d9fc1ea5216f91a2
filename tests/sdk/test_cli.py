"""The command `loraplex`, against a real server and without one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import _extras, cli
from loraplex.cli import commands
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2

Command = Callable[..., tuple[int, str, str]]

SQL = adapters_pb2.Adapter(
    name="sql",
    source="/srv/sql",
    state=adapters_pb2.ADAPTER_STATE_DEVICE,
    pinned=True,
    rank=8,
    target_modules=["q_proj", "v_proj"],
    bytes=1234567,
)


@pytest.fixture
def command(server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line against the test's server: exit code, stdout, stderr."""
    monkeypatch.setenv("LORAPLEX_SERVER", server.address)
    monkeypatch.delenv("LORAPLEX_TOKEN", raising=False)
    server.answers.update(
        LoadAdapter=lambda request, context: adapters_pb2.LoadAdapterResponse(adapter=SQL),
        UnloadAdapter=lambda request, context: adapters_pb2.UnloadAdapterResponse(remaining=[SQL]),
        ListAdapters=lambda request, context: adapters_pb2.ListAdaptersResponse(adapters=[SQL]),
        GetAdapter=lambda request, context: adapters_pb2.GetAdapterResponse(adapter=SQL),
        PinAdapter=lambda request, context: adapters_pb2.PinAdapterResponse(adapter=SQL),
        Prefetch=lambda request, context: adapters_pb2.PrefetchResponse(adapters=[SQL]),
        RegisterComposition=lambda request, context: adapters_pb2.RegisterCompositionResponse(adapter=SQL),
        UploadAdapter=lambda request, context: adapters_pb2.UploadAdapterResponse(adapter=SQL),
        GetModel=lambda request, context: model_pb2.GetModelResponse(
            model=model_pb2.Model(name="tiny", parameters=1_600_000)
        ),
    )

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_generate_streams_to_stdout(command: Command, server: Any) -> None:
    code, out, err = command("generate", "Hallo", "--stats")
    assert (code, out) == (0, "Grüße\n")
    assert err == "4 (2 cached) + 3 tokens (1 drafted) in 2.000 s, the first after 0.000 s; ended by stop\n"
    assert server.requests[0] == generation_pb2.GenerateRequest(text="Hallo")


def test_forms_of_an_answer(command: Command, server: Any, tmp_path: Path) -> None:
    file = tmp_path / "form"
    file.write_text('{"type": "object"}')
    forms = generation_pb2.Structure
    for line, structure in (
        (("--json-schema", str(file)), forms(json_schema='{"type": "object"}')),
        (("--json-object",), forms(json_object=generation_pb2.JsonObject())),
        (("--regex", "a+"), forms(regex="a+")),
        (("--grammar", str(file)), forms(grammar='{"type": "object"}')),
        (("--choice", "a", "--choice", "b c"), forms(choice=generation_pb2.Choice(texts=["a", "b c"]))),
    ):
        assert command("generate", "Hallo", *line)[0] == 0
        assert server.requests[-1].structure == structure
    sent = len(server.requests)
    for line, said in (
        (("--json-schema", str(tmp_path / "none")), "cannot be read"),
        (("--regex", "a", "--json-object"), "not allowed with"),
    ):
        code, _, err = command("generate", "Hallo", *line)
        assert code == 2
        assert said in err
    assert len(server.requests) == sent


def test_generate_sends_every_option(command: Command, server: Any) -> None:
    line = """generate Hallo --adapter sql --adapter polite=0.5 --max-tokens 9 --min-tokens 2
        --temperature 0.5 --top-p 0.25 --top-k 40 --seed 7 --stop a
        --stop b --ignore-eos --priority -1 --speculative-tokens 8 --timeout 50 --json
        -n 1 --echo --logprobs 2 --prompt-logprobs 3"""
    code, out, _ = command(*line.split())
    assert code == 0
    assert json.loads(out)["text"] == "Grüße"
    assert json.loads(out)["finish_reason"] == "stop"
    assert server.requests[0] == generation_pb2.GenerateRequest(
        text="Hallo",
        adapters=[
            generation_pb2.AdapterWeight(adapter="sql", weight=1.0),
            generation_pb2.AdapterWeight(adapter="polite", weight=0.5),
        ],
        sampling=generation_pb2.SamplingParams(temperature=0.5, top_p=0.25, top_k=40, seed=7),
        stopping=generation_pb2.StoppingCriteria(
            max_tokens=9, min_tokens=2, stop=["a", "b"], ignore_eos=True
        ),
        priority=-1,
        speculative_tokens=8,
        n=1,
        echo=True,
        logprobs=2,
        prompt_logprobs=3,
    )


def test_generate_prints_several_answers_one_below_the_other(command: Command, server: Any) -> None:
    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=1)
    end = generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)
    made = generation_pb2.GenerateResponse
    parts = [made(text="a"), made(index=2, text="c"), made(index=1, text="b", finish=end)]
    parts += [made(text="A", finish=end), made(index=2, text="C", finish=end)]
    server.answers["Generate"] = lambda request, context: iter(parts)
    code, out, _ = command("generate", "Hallo", "-n", "3")
    assert (code, out) == (0, "aA\nb\ncC\n")
    code, out, _ = command("generate", "Hallo", "-n", "3", "--json")
    found = json.loads(out)
    assert [found["text"], *(other["text"] for other in found["others"])] == ["aA", "b", "cC"]


def test_generate_in_a_conversation(command: Command, server: Any) -> None:
    code, out, _ = command("generate", "Hallo", "--chat", "--system", "Be brief.")
    assert (code, out) == (0, "Grüße\n")
    said = [(message.role, message.content) for message in server.requests[0].chat.messages]
    assert said == [("system", "Be brief."), ("user", "Hallo")]
    assert command("generate", "Hallo", "--chat")[0] == 0
    assert len(server.requests[1].chat.messages) == 1
    code, _, err = command("generate", "Hallo", "--system", "Be brief.")
    assert code != 0
    assert "--chat" in err
    assert len(server.requests) == 2


def test_generate_reads_stdin(command: Command, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert command("generate", "-")[0] == 0
    assert server.requests[0].text == "from a pipe"


def test_options_beat_the_environment(command: Command, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("LORAPLEX_TOKEN", "from-environment")
    assert command("model", "--server", server.address)[0] == 0
    assert command("model", "--server", server.address, "--token", "given")[0] == 0
    assert [metadata["authorization"] for metadata in server.metadata] == [
        "Bearer from-environment",
        "Bearer given",
    ]


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("list", adapters_pb2.ListAdaptersRequest()),
        ("get sql", adapters_pb2.GetAdapterRequest(name="sql")),
        ("load sql /srv/sql", adapters_pb2.LoadAdapterRequest(name="sql", source="/srv/sql")),
        (
            "load sql /srv/sql --load-inplace",
            adapters_pb2.LoadAdapterRequest(name="sql", source="/srv/sql", load_inplace=True),
        ),
        (
            "compose both --type ties --member sql --member polite=0.5 --density 0.25",
            adapters_pb2.RegisterCompositionRequest(
                name="both",
                combination_type=adapters_pb2.COMBINATION_TYPE_TIES,
                members=[
                    adapters_pb2.CompositionMember(adapter="sql", weight=1),
                    adapters_pb2.CompositionMember(adapter="polite", weight=0.5),
                ],
                density=0.25,
            ),
        ),
        ("unload other", adapters_pb2.UnloadAdapterRequest(name="other")),
        ("unload other --grace 0.5", adapters_pb2.UnloadAdapterRequest(name="other", grace_seconds=0.5)),
        ("prefetch sql", adapters_pb2.PrefetchRequest(names=["sql"])),
        ("prefetch sql --host-only", adapters_pb2.PrefetchRequest(names=["sql"], host_only=True)),
        ("pin sql", adapters_pb2.PinAdapterRequest(name="sql", pinned=True)),
        ("pin sql --off", adapters_pb2.PinAdapterRequest(name="sql", pinned=False)),
    ],
)
def test_adapters(command: Command, server: Any, line: str, request_: Any) -> None:
    code, out, err = command("adapters", *line.split())
    assert (code, err) == (0, "")
    assert server.requests == [request_]
    header, row = out.splitlines()
    assert header.split() == ["NAME", "STATE", "RANK", "BYTES", "IN", "USE", "HITS", "MISSES", "MODULES"]
    assert row.split() == ["sql", "device", "pinned", "8", "1,234,567", "0", "0", "0", "q_proj,v_proj"]

    code, out, _ = command("adapters", *line.split(), "--json")
    answer = json.loads(out)
    adapter = answer[0] if line.split()[0] in ("list", "unload", "prefetch") else answer
    assert (code, adapter["name"], adapter["state"]) == (0, "sql", "device")


def test_load_takes_a_folder_as_the_caller_sees_it(
    command: Command, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on this machine runs in another folder: a folder that is here goes to it as a whole path."""
    (tmp_path / "adapters/sql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source, sent in (
        ("./adapters/sql", f"{tmp_path}/adapters/sql"),
        ("adapters/sql/", f"{tmp_path}/adapters/sql"),
        ("../elsewhere/sql", "../elsewhere/sql"),
        ("sql", "sql"),
        ("hf://owner/sql", "hf://owner/sql"),
    ):
        assert command("adapters", "load", "sql", source)[0] == 0
        assert server.requests[-1].source == sent
    monkeypatch.setattr("loraplex._channel.is_local", lambda target: False)
    assert command("adapters", "load", "sql", "./adapters/sql")[0] == 0
    assert server.requests[-1].source == "./adapters/sql", "another machine's folders are not these"


def test_watch(command: Command, server: Any) -> None:
    server.answers["Watch"] = lambda request, context: iter(
        [adapters_pb2.WatchResponse(adapters=[SQL]), adapters_pb2.WatchResponse(removed=["old"])]
    )
    code, out, err = command("adapters", "watch", "sql")
    assert (code, out, err) == (0, "sql  device pinned\nold  removed\n", "")
    assert server.requests[-1] == adapters_pb2.WatchRequest(names=["sql"])
    lines = [json.loads(line) for line in command("adapters", "watch", "--json")[1].splitlines()]
    assert [line["removed"] for line in lines] == [[], ["old"]]


def test_upload(command: Command, server: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    code, out, err = command("adapters", "upload", "sql", str(tmp_path))
    assert (code, err) == (0, "")
    assert "sql" in out
    assert b"".join(part.chunk for part in server.requests[-1]) == b"weights"
    assert command("adapters", "upload", "sql", str(tmp_path / "nothing"))[0] == 2


def test_model(command: Command) -> None:
    code, out, _ = command("model")
    assert code == 0
    assert re.search(r"^name +tiny$", out, re.MULTILINE)
    assert re.search(r"^parameters +1,600,000$", out, re.MULTILINE)
    assert json.loads(command("model", "--json")[1])["parameters"] == 1_600_000


def test_token_makes_a_line_for_the_server_and_a_secret_for_the_caller(command: Command) -> None:
    code, out, err = command("token", "alice@acme")
    assert code == 0
    line = re.fullmatch(r"alice@acme sha256:([0-9a-f]{64})\n", out)
    secret = re.fullmatch(r"the token of alice@acme, shown this once: (\S{43})\n", err)
    assert line is not None
    assert secret is not None
    assert line[1] == hashlib.sha256(secret[1].encode()).hexdigest()
    assert command("token", "alice@acme")[1] != out
    assert command("token", "two words")[0] == 2


def test_version(command: Command) -> None:
    code, out, _ = command("version")
    assert code == 0
    assert re.fullmatch(r"loraplex \S+\n", out)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_teaches_every_command(command: Command, argv: list[str]) -> None:
    code, out, _ = command(*argv)
    assert code == 0
    for name in ("serve", "demo", "bench", "generate", "adapters", "model", "version"):
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name
    assert "loraplex generate" in out.partition("examples:")[2]


@pytest.mark.parametrize("line", ["generate --help", "adapters --help", "adapters load --help"])
def test_help_of_commands(command: Command, line: str) -> None:
    code, out, _ = command(*line.split())
    assert code == 0
    assert out.startswith(f"usage: loraplex {line.removesuffix(' --help')} ")


@pytest.mark.parametrize(
    "line", ["generat x", "generate", "generate x --adapter a=heavy", "adapters", "adapters pin", "model x"]
)
def test_wrong_command_lines(command: Command, server: Any, line: str) -> None:
    code, out, err = command(*line.split())
    assert (code, out) == (2, "")
    assert "loraplex" in err
    assert not server.calls


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 75),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 75),
        (grpc.StatusCode.PERMISSION_DENIED, 77),
        (grpc.StatusCode.UNAUTHENTICATED, 77),
        (grpc.StatusCode.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_errors_are_one_line(
    command: Command, server: Any, abort: Any, status: grpc.StatusCode, code: int
) -> None:
    server.answers["Generate"] = lambda request, context: abort(context, status, "two\nlines")
    assert command("generate", "x") == (code, "", f"loraplex: {status.name}: two lines\n")


def test_no_server(command: Command, tmp_path: Path) -> None:
    code, out, err = command("model", "--server", f"unix:{tmp_path}/none.sock")
    assert (code, out) == (69, "")
    assert err.startswith("loraplex: UNAVAILABLE: ")
    assert err.count("\n") == 1


def test_wrong_settings(command: Command) -> None:
    code, _, err = command("model", "--server", "10.0.0.5:1", "--token", "t")
    assert code == 2
    assert "--" not in err
    assert "unencrypted" in err
    code, _, err = command("model", "--tls-ca", "/does/not/exist.pem")
    assert code == 2
    assert "tls.ca: cannot read" in err


@pytest.mark.parametrize(
    ("argv", "blocked", "extras"),
    [
        (["serve", "--model", "x"], ("torch", "grpc_health"), "."),
        (["serve", "--help"], ("transformers",), "."),
        (["bench", "serve"], ("rich",), "'.[bench]'"),
        (["demo"], ("torch", "rich"), "'.[bench]'"),
    ],
)
def test_the_base_install_says_what_to_install(
    new_process: Any, argv: list[str], blocked: tuple[str, ...], extras: str
) -> None:
    done = new_process(f"from loraplex.cli import main; sys.exit(main({argv!r}))", blocked=blocked)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"pip install ./clients/python {extras}\n" in done.stderr
    assert all(name in done.stderr for name in blocked)
    assert "Traceback" not in done.stderr


def test_the_extras_are_those_of_the_package() -> None:
    root = Path(__file__).parents[2]
    client = tomllib.loads((root / "clients/python/pyproject.toml").read_text())["project"]
    server = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    imported_as = {"grpcio-health-checking": "grpc_health", "grpcio-reflection": "grpc_reflection"}

    def modules(lines: list[str]) -> set[str]:
        names = [re.split(r"[<>=; ]", line)[0] for line in lines]
        return {imported_as.get(name, name.replace("-", "_")) for name in names}

    optional = {"triton", "starlette", "uvicorn", "llguidance"}
    own = {"loraplex", *modules(client["dependencies"])}
    assert modules(server["dependencies"]) - own - optional | {"loraplex_server"} == {
        *_extras.MODULES["server"]
    }
    bench = modules(server["optional-dependencies"]["bench"]) | {"loraplex_bench"}
    assert bench == {*_extras.MODULES["bench"]}
    assert _extras.MODULES.keys() <= client["optional-dependencies"].keys()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file to write, which `loraplex serve` then runs in place of the server; its extra is empty."""
    package = tmp_path / "loraplex_test_tool"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_extras.MODULES, "bench", ())
    monkeypatch.setitem(_extras.COMMANDS, "serve", _extras.ExtraCommand("loraplex_test_tool.cli", ("bench",)))
    yield package / "cli.py"
    for name in [name for name in sys.modules if name.startswith("loraplex_test_tool")]:
        del sys.modules[name]


def test_arguments_pass_through_untouched(command: Command, tools: Path) -> None:
    tools.write_text("def main(argv):\n    print(argv)\n    return 7\n")
    argv = ["--help", "--model", "x", "--", "-h"]
    assert command("serve", *argv) == (7, f"{argv}\n", "")


def test_a_tool_that_returns_nothing_has_succeeded(command: Command, tools: Path) -> None:
    tools.write_text("def main(argv):\n    pass\n")
    assert command("serve")[0] == 0


def test_what_a_tool_imports_late_is_advised_too(
    command: Command, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_extras.MODULES, "dev", ("no_such_module_of_dev",))
    tools.write_text("def main(argv):\n    import no_such_module_of_dev.part\n")
    code, _, err = command("serve")
    assert code == 2
    assert "no_such_module_of_dev is not installed" in err
    assert "pip install ./clients/python '.[bench,dev]'" in err


def test_a_missing_module_of_nobody_s_is_a_fault(command: Command, tools: Path) -> None:
    tools.write_text("def main(argv):\n    import no_such_module_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        command("serve")


def test_a_reader_that_leaves_is_no_error(server: Any, new_process: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = ["generate", "x", "--server", server.address]
    done = new_process(f"from loraplex.cli import main; sys.exit(main({argv!r}))", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_interrupted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "model", interrupt)
    assert command("model") == (130, "", "")
