"""`python -m loraplex_server` is `loraplex serve`."""

from __future__ import annotations

import sys

from loraplex_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
