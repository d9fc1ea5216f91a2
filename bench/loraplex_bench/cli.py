"""`loraplex bench`: measures servers, runs the soak, and compares with transformers + PEFT."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = {
    "serve": (
        "loraplex_bench.load.serve",
        "measure a server under load: latencies, throughput, right and wrong answers",
    ),
    "soak": (
        "loraplex_bench.scenarios.soak.command",
        "minutes of hard use with cancellations and crashes, then look for leaks",
    ),
    "swap-latency": (
        "loraplex_bench.scenarios.swap_latency",
        "what twice as many adapters as slots do to the time to the first token",
    ),
    "many-adapters": (
        "loraplex_bench.scenarios.many_adapters",
        "thousands of adapters by Zipf's law through a few slots: answers, memory, throughput, misses",
    ),
    "prefix-cache": (
        "loraplex_bench.scenarios.prefix_cache",
        "time to the first token of prompts that begin alike, with and without the prefix cache",
    ),
    "speculation": (
        "loraplex_bench.scenarios.speculation",
        "time of answers that copy their prompt, and of others, with and without speculation",
    ),
    "api-cost": (
        "loraplex_bench.scenarios.api_cost.command",
        "the API's cost beside the engine: messages a second, CPU a message, time a token is held",
    ),
    "side-by-side": (
        "loraplex_bench.scenarios.side_by_side.command",
        "compare loraplex with transformers + PEFT on this machine",
    ),
}

DESCRIPTION = """\
Measures loraplex. Begin with `loraplex bench serve --launch`: it needs no server and no model of your own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (without the program's name; the process's own by default).

    Returns the exit code: 0 when all went well, 1 when a result was bad, 2 when nothing could be measured.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the command that is asked for is imported: `serve` works where torch is not installed.
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="loraplex bench", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, help_text) in _COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=help_text)
            continue
        module = import_module(module_name)
        command = commands.add_parser(
            name,
            help=help_text,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
