"""`loraplex serve`: from the command line to a running server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from loraplex_server.config.cli import build_parser, resolve
from loraplex_server.core import log
from loraplex_server.core.errors import ServerError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; `argv` is what follows `loraplex serve`. Returns the exit code."""
    parser = build_parser()
    try:
        config = resolve(sys.argv[1:] if argv is None else argv, os.environ, parser).to_config()
    except ServerError as error:
        parser.error(str(error))
    log.configure(config.engine.log.level, config.engine.log.format)
    hide_torch()
    # Here, not above: `--help` should not wait for gRPC and a tokenizer library.
    from loraplex_server.api.app import serve

    return asyncio.run(serve(config))


def hide_torch() -> None:
    """Keeps torch out of this process, which of transformers needs the tokenizers alone.

    That is 330 MB and seconds of start less. The engine, in its own process, is not concerned.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


if __name__ == "__main__":
    sys.exit(main())
