"""Makes the blocking client from the asyncio one: `make sync`, or into the folder that is named.

`unasync` replaces the keywords and names; this file also treats docstrings, and formats with ruff. Files that
exist only once a side, such as `waiting.py`, are written by hand on both.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

PACKAGE = Path(__file__).parents[1] / "clients/python/loraplex"
BY_HAND = ("__init__.py", "waiting.py")
HEADER = "# Made from ../_async/{name} by `make sync`: change that file.\n"


def make_sync(target: Path) -> None:
    """Writes the blocking twin of each file in `loraplex/_async` into the folder `target`."""
    names = [path.name for path in sorted((PACKAGE / "_async").glob("*.py")) if path.name not in BY_HAND]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "_async"), Path(folder, "_sync")
        source.mkdir()
        for name in names:
            shutil.copy(PACKAGE / "_async" / name, source)
        text = "".join((source / name).read_text() for name in names)
        renamed = {name: name.removeprefix("Async") for name in re.findall(r"\bAsync[A-Z]\w*", text)}
        rule = unasync.Rule("/_async/", "/_sync/", {"_async": "_sync", **renamed})
        unasync.unasync_files([str(source / name) for name in names], [rule])
        for name in names:
            twin = HEADER.format(name=name) + prose(taken_off((made / name).read_text()))
            (target / name).write_text(formatted(twin))


def prose(text: str) -> str:
    """The text with the async words of comments and docstrings left out; the code has none any more."""
    text = re.sub(r"\basync (?=def|for|with)", "", text)
    text = re.sub(r"\bawait ", "", text)
    # A sentence may speak of both clients; an example speaks of one.
    return re.sub(r"^( *(?:>>>|\.\.\.) .*)\bAsync(?=[A-Z])", r"\1", text, flags=re.MULTILINE)


def taken_off(text: str) -> str:
    """The text with the bodies of examples in place of the coroutines that `asyncio.run` runs."""
    example = r"^( *)>>> async def (\w+)\(\):\n((?: *\.\.\. .*\n)+) *>>> asyncio\.run\(\2\(\)\)\n"
    return re.sub(example, lambda found: _statements(found[1], found[3]), text, flags=re.MULTILINE)


def _statements(indent: str, body: str) -> str:
    lines = [line.strip().removeprefix("...")[5:] for line in body.splitlines()]
    return "".join(f"{indent}{'...' if line.startswith(' ') else '>>>'} {line}\n" for line in lines)


def formatted(text: str) -> str:
    """The text as ruff formats it, with sorted imports."""
    ruff, source = [sys.executable, "-m", "ruff"], ["--stdin-filename", PACKAGE / "_sync/made.py", "-"]
    # C416: a comprehension that was asynchronous and only collects becomes `list(...)`.
    for command in (["check", "--select", "I,C416", "--fix", "--unsafe-fixes", "--quiet"], ["format"]):
        call = [*ruff, *command, *source]
        text = subprocess.run(call, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    make_sync(Path(sys.argv[1]) if sys.argv[1:] else PACKAGE / "_sync")
