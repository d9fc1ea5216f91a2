"""Trains the demo model: the base, then each adapter with PEFT; then checks the answers and records it all.

Stages; `base` and `adapters` skip what is already there (say --force to train it again from the seed):

    base        DATA/base/: config, weights, tokenizer. About half an hour on one busy core; resumes.
    adapters    DATA/adapters/NAME/ for every adapter, or for those named. 1 to 4 minutes each.
    lines       DATA/lines.txt: lines on which base and adapters are right with room to spare.
    record      checks every adapter on every weight format; writes DATA/TRAINING.json: accuracies, hashes.
    all         the four in this order.

A new base makes adapters trained on the old one useless: train them again with `adapters --force`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import GenerationConfig

from demo_training.adapter_training import ADAPTERS, AdapterRecipe, train_adapter
from demo_training.base_training import BaseRecipe, train_base
from demo_training.check import load_tokenizer
from demo_training.margins import write_sure_lines
from demo_training.model import build_tokenizer
from demo_training.record import write_record
from loraplex_bench.demo.tasks import data_dir

_SURE_LINES_SEED = 2_000_003
_NUM_CANDIDATES = 1500


def _train_base(work: Path, data: Path) -> None:
    tokenizer = build_tokenizer()
    recipe = BaseRecipe()
    trained = train_base(tokenizer, recipe, work / "base.pt")
    base = trained.model
    base.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    base.save_pretrained(data / "base")
    tokenizer.save_pretrained(data / "base")
    _name_tokenizer_class(data / "base" / "tokenizer_config.json")
    _note(work, "base", recipe.steps, trained.seconds, {"progress": trained.progress})


def _name_tokenizer_class(path: Path) -> None:
    """Names the class that every transformers release knows, instead of this release's internal one."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _train_adapter(work: Path, data: Path, name: str) -> None:
    recipe = AdapterRecipe()
    tokenizer = load_tokenizer(data / "base")
    seconds, loss = train_adapter(tokenizer, data / "base", name, recipe, data / "adapters" / name)
    _note(work, name, recipe.steps, seconds, {"last_loss": loss})


def _note(work: Path, name: str, steps: int, seconds: float, more: dict[str, object]) -> None:
    """Leaves what `record` reports about a finished run."""
    (work / "runs").mkdir(parents=True, exist_ok=True)
    note = {"steps": steps, "wall_seconds": round(seconds, 1), **more}
    (work / "runs" / f"{name}.json").write_text(json.dumps(note) + "\n")


def main() -> None:
    """Command line: see the module's docstring, which `--help` prints."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("base", "adapters", "lines", "record", "all"), help="what to do")
    parser.add_argument(
        "names", nargs="*", help=f"with `adapters`: which (default: all of {', '.join(ADAPTERS)})"
    )
    parser.add_argument(
        "--data", type=Path, default=data_dir(), help="where results go (default: the shipped data)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(__file__).parents[1] / ".train",
        help="where checkpoints go (default: bench/.train, which git ignores)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--lines", type=int, default=1000, help="lines per check of `record` (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="run stages whose result is already there")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ADAPTERS]
    if unknown:
        parser.error(f"names: no adapter {', '.join(unknown)}; there are {', '.join(ADAPTERS)}")
    torch.set_num_threads(args.threads)
    if args.stage in ("base", "all") and (
        args.force or not (args.data / "base" / "model.safetensors").exists()
    ):
        if args.force:
            (args.work / "base.pt").unlink(missing_ok=True)
        _train_base(args.work, args.data)
    if args.stage in ("adapters", "all"):
        for name in args.names or ADAPTERS:
            if args.force or not (args.data / "adapters" / name / "adapter_model.safetensors").exists():
                _train_adapter(args.work, args.data, name)
    if args.stage in ("lines", "all"):
        write_sure_lines(args.data, _SURE_LINES_SEED, _NUM_CANDIDATES)
    if args.stage in ("record", "all"):
        write_record(args.data, args.work, args.lines)


if __name__ == "__main__":
    main()
