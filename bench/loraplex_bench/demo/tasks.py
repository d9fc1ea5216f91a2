"""The demo's text transformations, the lines they are asked about, and the one right answer to each.

Every adapter of the demo model performs one task; without an adapter the base copies its line. Lines are
drawn so that all right answers to a line, the copy included, differ pairwise: what came from another adapter,
or from none, cannot pass for the right answer.

Pure Python without dependencies: load harness and soak test check millions of answers with it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MIN_LINE_LENGTH = 8
"""Shortest line `make_lines` draws, in characters."""
MAX_LINE_LENGTH = 28
"""Longest line `make_lines` draws, in characters."""
MAX_ANSWER_TOKENS = MAX_LINE_LENGTH + 1
"""Tokens of the longest right answer: one per character and the end-of-sequence token."""

CHECK_SEED = 1_000_003
"""Seed of the lines the shipped accuracies were measured on; training draws from other generators."""

_VOWELS = "aeiou"
_CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in _VOWELS)


@dataclass(frozen=True)
class Task:
    """One text transformation; `apply` maps a line to its right answer, which has the line's length."""

    name: str
    description: str
    apply: Callable[[str], str]


def _substitute(source: str, target: str) -> Callable[[str], str]:
    table = str.maketrans(source, target)
    return lambda line: line.translate(table)


def _rotate(symbols: str, by: int) -> Callable[[str], str]:
    return _substitute(symbols, symbols[by:] + symbols[:by])


def _title(line: str) -> str:
    return "".join(
        char.upper() if position == 0 or line[position - 1] == " " else char
        for position, char in enumerate(line)
    )


_LETTERS = string.ascii_lowercase
_ALL_TASKS = (
    Task("upper", "letters in upper case", _substitute(_LETTERS, _LETTERS.upper())),
    Task("snake", "spaces become underscores", _substitute(" ", "_")),
    Task("redact", "digits become #", _substitute(string.digits, "#" * 10)),
    Task("vowelmask", "vowels become *", _substitute(_VOWELS, "*" * 5)),
    Task("vowelupper", "vowels in upper case", _substitute(_VOWELS, _VOWELS.upper())),
    Task("leet", "a e i o s t become 4 3 1 0 5 7", _substitute("aeiost", "431057")),
    Task("rot5", "digits move on by five", _rotate(string.digits, 5)),
    Task("title", "the first letter of each word in upper case", _title),
    Task("digitflip", "each digit d becomes 9 - d", _substitute(string.digits, string.digits[::-1])),
    Task("hideconsonants", "consonants become -", _substitute(_CONSONANTS, "-" * len(_CONSONANTS))),
    Task("vowelshift", "each vowel becomes the next one", _rotate(_VOWELS, 1)),
    Task("caesar1", "letters move on by one", _rotate(_LETTERS, 1)),
    Task("atbash", "the alphabet reversed", _substitute(_LETTERS, _LETTERS[::-1])),
    Task("rot13", "letters move on by thirteen", _rotate(_LETTERS, 13)),
    Task("caesar3", "letters move on by three", _rotate(_LETTERS, 3)),
    Task("caesar25", "letters move back by one", _rotate(_LETTERS, 25)),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL_TASKS}
"""Task by adapter name; every adapter of the demo has one."""


def expected(name: str | None, line: str) -> str:
    """The right answer of the adapter `name`, or of the base if it is None, to `line`.

    Raises `KeyError` if no task has that name.
    """
    return line if name is None else TASKS[name].apply(line)


def prompt(line: str) -> str:
    """The prompt that asks about `line`; the tokenizer puts the beginning-of-sequence token before it."""
    return line + "\n"


def answers_differ(line: str) -> bool:
    """True if the right answers of all tasks and the copy are pairwise distinct for `line`."""
    answers = {task.apply(line) for task in TASKS.values()}
    return len(answers) == len(TASKS) and line not in answers


def draw_line(rng: random.Random, length: int | None = None) -> str:
    """One line whose answers all differ; `length` in characters fixes its length, else it is drawn uniformly.

    Raises `ValueError` if `length` lies outside `MIN_LINE_LENGTH` .. `MAX_LINE_LENGTH`.
    """
    if length is None:
        length = rng.randint(MIN_LINE_LENGTH, MAX_LINE_LENGTH)
    elif not MIN_LINE_LENGTH <= length <= MAX_LINE_LENGTH:
        raise ValueError(f"length: {length} is outside {MIN_LINE_LENGTH}..{MAX_LINE_LENGTH}")
    while True:
        line = _random_words(rng, length)
        if answers_differ(line):
            return line


def iter_lines(seed: int) -> Iterator[str]:
    """Endless lines, always the same ones for a seed."""
    rng = random.Random(seed)
    while True:
        yield draw_line(rng)


def make_lines(seed: int, n: int) -> list[str]:
    """The first `n` lines of `iter_lines(seed)`."""
    lines = iter_lines(seed)
    return [next(lines) for _ in range(n)]


def sure_lines() -> list[str]:
    """Lines on which base and adapters are right with room to spare in every weight format.

    On these a wrong answer is the server's fault; on others the model errs a few times in ten thousand.
    """
    return (data_dir() / "lines.txt").read_text().splitlines()


def data_dir() -> Path:
    """The folder of the shipped demo data: `base/`, `adapters/<name>/`, `lines.txt`, `TRAINING.json`."""
    return Path(__file__).parent / "data"


def _random_words(rng: random.Random, length: int) -> str:
    """Words of letters, of digits or of both, parted by single spaces, `length` characters in all."""
    words: list[str] = []
    used = -1
    while used < length:
        alphabet = rng.choices((_LETTERS, string.digits, _LETTERS + string.digits), weights=(6, 2, 2))[0]
        size = rng.randint(1, 3) if alphabet == string.digits else rng.randint(2, 7)
        words.append("".join(rng.choices(alphabet, k=size)))
        used += 1 + size
    line = " ".join(words)[:length]
    return line[:-1] + rng.choice(_LETTERS) if line.endswith(" ") else line
