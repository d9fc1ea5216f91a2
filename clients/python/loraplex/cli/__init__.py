"""The command `loraplex`: a client in the shell, and the way to the server and its tools.

Exit codes: 0 done; 1 the server failed or refused; 2 a wrong argument, or something to install first;
3 no such adapter; 69 no server there; 75 busy or too slow, try again later; 77 not allowed;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from loraplex import _extras, errors
from loraplex.cli.parser import parser

# Beyond 3 the numbers are those of sysexits.h: EX_UNAVAILABLE, EX_TEMPFAIL, EX_NOPERM.
EXIT_CODES: dict[type[errors.LoraplexError], int] = {
    errors.InvalidRequestError: 2,
    errors.NotFoundError: 3,
    errors.UnavailableError: 69,
    errors.ResourceExhaustedError: 75,
    errors.DeadlineExceededError: 75,
    errors.PermissionDeniedError: 77,
    errors.UnauthenticatedError: 77,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (the process's own arguments by default) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments[0] in _extras.COMMANDS:
        return _extras.run(arguments[0], arguments[1:])
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except errors.LoraplexError as error:
        print(f"loraplex: {error.code}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CODES.get(type(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
