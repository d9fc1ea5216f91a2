"""Flags, environment and file are one schema, and what is in none of it is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.config import ServerConfig
from loraplex_server.config.cli import main as config_main
from loraplex_server.config.cli import resolve as resolve_flags
from loraplex_server.config.layers import Origin, environment_name, known_settings
from loraplex_server.core.errors import InvalidArgumentError


def resolve(*argv: str, file: Path | None = None, **environ: str) -> tuple[ServerConfig, dict[str, Origin]]:
    flags = [*argv, *(["--config", str(file)] if file else [])]
    prefixed = {f"LORAPLEX_SERVE_{name}": value for name, value in environ.items()}
    settings = resolve_flags(flags, {"PATH": "/bin", **prefixed})
    return settings.to_config(), settings.origins


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def make(text: str) -> Path:
        path = tmp_path / "loraplex.toml"
        path.write_text(text)
        return path

    return make


def test_flag_beats_environment_beats_file_beats_default(write: Any) -> None:
    file = write('model = "a"\nmax_queue = 1\nmax-batch-tokens = 2\nport = 3\n')
    config, origins = resolve("--port", "7", file=file, MAX_BATCH_TOKENS="5", PORT="6")
    scheduler = config.engine.scheduler
    assert (config.engine.model.model, scheduler.max_queue, scheduler.max_batch_tokens) == ("a", 1, 5)
    assert (config.api.port, scheduler.max_num_requests) == (7, 64)
    names = ("model", "max_queue", "max_batch_tokens", "port", "max_num_requests")
    assert [origins[name].value for name in names] == ["file", "file", "environment", "flag", "default"]


def test_the_file_may_be_named_in_the_environment(write: Any) -> None:
    config, _ = resolve(CONFIG=str(write('model = "a"\n')))
    assert config.engine.model.model == "a"


def test_every_kind_of_value(write: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    file = write(
        f'model = "m"\nadapters = ["{one}", "{two}"]\ndouble_quant = true\nkv_cache_bytes = "8MiB"\n'
        'adapter_host_bytes = 1048576\nmax_adapter_wait = 2.5\nquantization = "int4"\n'
    )
    config, _ = resolve(file=file)
    assert config.engine.adapters.folders == (one, two)
    assert config.engine.model.double_quant
    assert config.engine.model.quantization == "int4"
    assert config.engine.scheduler.kv_cache_bytes == 8 << 20
    assert config.engine.adapters.host_bytes == 1 << 20
    assert config.engine.scheduler.max_adapter_wait_s == 2.5
    # A flag that may be repeated replaces what stands below it.
    config, _ = resolve("--adapters", str(two), file=file)
    assert config.engine.adapters.folders == (two,)
    config, _ = resolve(MODEL="m", ADAPTERS=f"{one}, {two}", DOUBLE_QUANT="1", ALLOW_INSECURE="false")
    assert config.engine.adapters.folders == (one, two)
    assert config.engine.model.double_quant
    assert not config.api.allow_insecure


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            'model = "m"\nmax_batch_token = 1',
            "max_batch_token: is not a setting; did you mean max_batch_tokens",
        ),
        ('model = "m"\n[scheduler]\nmax_queue = 1', "scheduler: is not a setting"),
        ('model = "m"\nmax_queue = "many"', "max_queue: 'many' is wrong"),
        ('model = "m"\nmax_queue = 0', "max_queue: 0 is less than 1"),
        ('model = "m"\nmax_queue = [1]', "is neither text nor a number"),
        ('model = "m"\nadapters = "a"', "adapters: 'a' is not an array"),
        ('model = "m"\nadapters = ["/no/such/folder"]', "is not a folder"),
        ('model = "m"\ndouble_quant = "yes"', "neither true nor false"),
        ('model = "m"\nquantization = "int3"', "'int3' is none of nf4, int4, none"),
        ('model = "m"\nconfig = "x"', "config: is not a setting"),
        ('model = "m"\nmodel = "n"', "is not valid TOML"),
        ("\x00", "is not valid TOML"),
    ],
)
def test_bad_files(write: Any, text: str, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match="(?s)" + problem.replace("[", r"\[")):
        resolve(file=write(text))


def test_bad_environment(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="LORAPLEX_SERVE_MAX_QUEU: is not a setting; did you mean"):
        resolve("--model", "m", MAX_QUEU="1")
    with pytest.raises(InvalidArgumentError, match="LORAPLEX_SERVE_MAX_QUEUE: 'x' is wrong"):
        resolve("--model", "m", MAX_QUEUE="x")
    with pytest.raises(InvalidArgumentError, match="cannot read"):
        resolve("--model", "m", file=tmp_path / "none.toml")


def test_a_model_is_needed_from_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        resolve()
    assert "--model is required" in capsys.readouterr().err


def test_what_is_shown_can_be_read_again(write: Any, tmp_path: Path) -> None:
    flags = ["--model", 'a "b"', "--adapters", str(tmp_path), "--kv-cache-bytes", "1GiB", "--double-quant"]
    flags += ["--cuda-graph-sizes", "1,2,8"]
    settings = resolve_flags(flags, {})
    text = settings.to_toml()
    assert set(tomllib.loads(text)) >= {"model", "adapters", "port", "log_level"}
    again = resolve_flags(["--config", str(write(text))], {})
    assert again.values == settings.values


class TestCommand:
    def test_show_changed(self, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
        file = write('model = "m"\nmax_queue = 7\n')
        assert config_main(["show", "--changed", "--config", str(file), "--port", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split() for line in lines] == [
            ["model", "=", '"m"', "#", "file"],
            ["max_queue", "=", "7", "#", "file"],
            ["port", "=", "1", "#", "flag"],
        ]

    def test_check(self, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert config_main(["check", "--config", str(write('model = "m"\n'))]) == 0
        assert "valid" in capsys.readouterr().out
        for text in ('model = "m"\nprot = 1\n', 'model = "m"\nhost = "0.0.0.0"\n'):
            with pytest.raises(SystemExit) as caught:
                config_main(["check", "--config", str(write(text))])
            assert caught.value.code == 2
        assert "did you mean port" in capsys.readouterr().err

    @pytest.mark.parametrize("name", known_settings())
    def test_every_flag_is_a_setting(self, name: str, write: Any, tmp_path: Path) -> None:
        """Flag, environment and file give the same value."""
        setting = known_settings()[name]
        kind = setting.kind
        text = str(tmp_path) if kind.repeatable else kind.choices[-1] if kind.choices else "1"
        flags = [setting.flag] if kind.switch else [setting.flag, text]
        value = "true" if kind.switch else f'["{text}"]' if kind.repeatable else f'"{text}"'
        file = write(f"{name} = {value}\n")
        model = ["--model", "m"] if name != "model" else []
        layers = {
            Origin.FLAG: resolve_flags([*model, *flags], {}),
            Origin.ENVIRONMENT: resolve_flags(model, {environment_name(setting): text}),
            Origin.FILE: resolve_flags([*model, "--config", str(file)], {}),
        }
        for origin, settings in layers.items():
            assert settings.origins[name] is origin
            assert settings.values == layers[Origin.FLAG].values
