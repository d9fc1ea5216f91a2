"""`python -m loraplex.cli`."""

from __future__ import annotations

from loraplex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
