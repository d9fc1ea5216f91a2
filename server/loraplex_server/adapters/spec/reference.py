"""Writes docs/reference/adapter-kinds.md: `python -m loraplex_server.adapters.spec.reference`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from loraplex_kernels.pool import MAX_RANK
from loraplex_server.adapters.spec.kinds import (
    BOTTLENECK_SETTINGS,
    OTHER_PEFT_TYPES,
    PEFT_SETTINGS,
    PEFT_TYPES,
    PeftType,
    Setting,
    Treatment,
)

_HEAD = f"""\
# Adapter kinds

<!-- Written by `make reference` from server/loraplex_server/adapters/spec/kinds.py. -->

An adapter is served whole or refused with the reason, never applied in part. Its configuration is judged by
the tables below. Then its file must hold each tensor that the configuration asks for, in the right shape, and
nothing else.

Weights are read from safetensors files alone. Ranks go up to {MAX_RANK}. LoRA pairs, with `lora_bias` or
without, can be weighted and mixed with others in one request. An adapter that does anything else (DoRA, IA3,
prompts, whole modules, rows of the vocabulary, networks) is named alone, at weight 1.
"""

_BOTTLENECK = """\
## Bottleneck adapters of AdapterHub

What the `adapters` library saves (`adapter_config.json` with a `config` inside) is served if it is a
bottleneck adapter. A setting in neither table is refused, unless it is unset.
"""


def page() -> str:
    """The page in Markdown."""
    others = ", ".join(f"`{name}`" for name in OTHER_PEFT_TYPES)
    return "\n".join(
        [
            _HEAD,
            "## PEFT's types\n",
            "| `peft_type` | served | |\n|---|---|---|",
            *(
                f"| `{name}` | {'yes' if kind.served else 'no'} | {kind.note} |"
                for name, kind in PEFT_TYPES.items()
            ),
            f"| any other | no | {others} |",
            "\n## PEFT's settings\n",
            "A setting in neither table is refused, unless it is unset: null, false or empty.\n",
            _settings(PEFT_SETTINGS),
            _BOTTLENECK,
            _settings(BOTTLENECK_SETTINGS),
        ]
    )


def _type(name: str, kind: PeftType) -> str:
    return f"| `{name}` | {'yes' if kind.served else 'no'} | {kind.note} |"


def _settings(settings: Mapping[str, Setting]) -> str:
    parts = []
    for treatment in (Treatment.APPLIED, Treatment.REFUSED):
        rows = [f"| `{name}` | {it.note} |" for name, it in settings.items() if it.treatment is treatment]
        parts += [f"| {treatment.value} | |\n|---|---|", *rows, ""]
    ignored = [f"`{name}`" for name, it in settings.items() if it.treatment is Treatment.IGNORED]
    parts.append(f"{Treatment.IGNORED.value.capitalize()}: {', '.join(ignored)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
