"""Writes docs/reference/flags.md, which has every setting: `python -m loraplex_server.config.reference`."""

from __future__ import annotations

import itertools
import math
import sys

from loraplex_server.config.declared import DeclaredSetting
from loraplex_server.config.layers import environment_name, known_settings
from loraplex_server.config.setting import Range

_HEAD = """\
# Flags of `loraplex serve`

<!-- Written by `make reference` from the declarations in server/loraplex_server/config. -->

Every flag is a setting. It can be given in three places:

| where | example |
|---|---|
| command line | `--max-batch-tokens 512` |
| environment | `LORAPLEX_SERVE_MAX_BATCH_TOKENS=512` |
| TOML file of `--config`, or of `LORAPLEX_SERVE_CONFIG` | `max_batch_tokens = 512` |

The command line beats the environment, and the environment beats the file. An unknown name is an error in all
three. `loraplex config show` prints the settings that a server would run with and where each came from;
`loraplex config check` checks them.

- A size is a number of bytes, or a number with a unit: `512MiB`, `2GB`, `1.5g`.
- A flag without a value is `true` or `false` in the file, and `true`, `false`, `1` or `0` in the environment.
- A flag that may be repeated is an array in the file. In the environment, commas separate its values.
"""


def page() -> str:
    """The page in Markdown."""
    parts = [_HEAD]
    for title, settings in itertools.groupby(known_settings().values(), lambda found: found.setting.group):
        parts.append(f"## {title[0].upper()}{title[1:]}\n")
        parts += map(_entry, settings)
    return "\n".join(parts)


def _entry(setting: DeclaredSetting) -> str:
    kind, declared = setting.kind, setting.setting
    value = declared.metavar or kind.metavar or "|".join(kind.choices) or ("" if kind.switch else "TEXT")
    text = f"{declared.help[0].upper()}{declared.help[1:]}."
    detail = f" {declared.detail}" if declared.detail else ""
    facts = [
        declared.unit or kind.unit,
        _range(declared.range) if declared.range else "",
        "may be repeated" if kind.repeatable else "",
    ]
    remarks = "; ".join(fact for fact in facts if fact)
    return (
        f"### `{f'{setting.flag} {value}'.strip()}`\n\n{text}{detail}\n\n"
        f"- default: {_default(setting)}{f' ({remarks})' if remarks else ''}\n"
        f"- environment: `{environment_name(setting)}`, file: `{setting.name}`\n"
    )


def _default(setting: DeclaredSetting) -> str:
    if setting.required:
        return "none; the server needs a value"
    if setting.setting.default:
        return setting.setting.default
    if setting.kind.switch:
        return "`false`"
    if setting.default in (None, []):
        return "none"
    return f"`{setting.kind.show(setting.default)}`"


def _range(allowed: Range) -> str:
    bounds = (
        ("at least", allowed.least),
        ("more than", allowed.above),
        ("at most", allowed.most),
        ("less than", allowed.below),
    )
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if not math.isinf(bound))


if __name__ == "__main__":
    sys.stdout.write(page())
