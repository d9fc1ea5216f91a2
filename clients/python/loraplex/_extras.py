"""Runs the commands that need more than the base install, or says what to install."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

# The packages of each extra, by import name. Those that a server can run without are left out: without triton
# it uses torch, without starlette and uvicorn it serves gRPC alone, without llguidance free text alone.
MODULES = {
    "server": (
        "loraplex_server",
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "msgspec",
        "regex",
        "tqdm",
        "prometheus_client",
        "grpc_health",
        "grpc_reflection",
        "jinja2",
    ),
    "top": ("rich",),
    "bench": ("loraplex_bench", "rich", "tokenizers"),
    "dev": ("peft", "bitsandbytes"),
}


@dataclass(frozen=True, slots=True)
class ExtraCommand:
    """A command that needs an extra."""

    module: str
    """Its `main(argv)` gets the arguments unchanged, `--help` included."""
    extras: tuple[str, ...]
    """Needed before it can start."""


COMMANDS = {
    "serve": ExtraCommand("loraplex_server.cli", ("server",)),
    "config": ExtraCommand("loraplex_server.config.cli", ("server",)),
    "top": ExtraCommand("loraplex.cli.top", ("top",)),
    "bench": ExtraCommand("loraplex_bench.cli", ("bench",)),
    "demo": ExtraCommand("loraplex_bench.scenarios.demo", ("server", "bench")),
}


def run(command: str, argv: Sequence[str]) -> int:
    """The command's exit code; 2 when a package that it needs is not installed."""
    wanted = COMMANDS[command]
    missing = [name for extra in wanted.extras for name in MODULES[extra] if not installed(name)]
    if missing:
        return advise(command, wanted.extras, missing)
    try:
        return int(import_module(wanted.module).main(list(argv)) or 0)
    except ModuleNotFoundError as error:
        # Some commands under `bench` need more than others, and import it only then.
        name = (error.name or "").partition(".")[0]
        extras = tuple(extra for extra, names in MODULES.items() if name in names)
        if not extras or installed(name):
            raise
        return advise(command, tuple(dict.fromkeys((*wanted.extras, *extras))), [name])


def installed(name: str) -> bool:
    """Whether a top-level module can be imported, found out without importing it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _install(extras: Sequence[str]) -> str:
    """The command that installs extras. Nothing is published, so no package index is named."""
    if "top" in extras:
        return "pip install './clients/python[top]'"
    others = ",".join(extra for extra in extras if extra != "server")
    return f"pip install ./clients/python '.[{others}]'" if others else "pip install ./clients/python ."


def advise(command: str, extras: Sequence[str], missing: Sequence[str]) -> int:
    are = "is" if len(missing) == 1 else "are"
    print(
        f"loraplex {command}: {', '.join(missing)} {are} not installed; "
        "the base install of loraplex is the client alone.\n"
        f"Install what this command needs, in a checkout of loraplex: {_install(extras)}",
        file=sys.stderr,
    )
    return 2
