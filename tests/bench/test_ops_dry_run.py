"""The op bench walks: every op, case and contender that a CPU has is run, checked and timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_bench import gpu
from loraplex_bench.ops.__main__ import main
from loraplex_bench.ops.catalogue import OPS

# What may be missing: other projects' files, and what a contender cannot do by its nature.
EXCUSES = ("bench/.peers/", "gemlite", "bitsandbytes", "it cannot do this workload")


@pytest.mark.parametrize("name", OPS)
def test_all_that_there_is_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert main([name, "--dry-run", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(OPS[name].tiny)
    ran = set()
    for row in rows:
        for figure in row["figures"]:
            assert figure["not_run"] is None or any(excuse in figure["not_run"] for excuse in EXCUSES), figure
            if figure["us"]:
                ran.add(figure["contender"])
                assert figure["error"] is None or figure["error"] < 0.02
    everyone = {figure["contender"] for row in rows for figure in row["figures"]}
    assert {name for name in everyone - ran if name not in ("vLLM", "SGLang csgmv", "gemlite-int4")} == set()
    assert all(str(case) in capsys.readouterr().out for case in OPS[name].tiny[:1])


def test_cases_of_a_device_are_run_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--repeats", "1", "--only", "demo o, 8 tokens", "--clock", "cpu"]
    assert main(["lora-share", *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if line.startswith("lora-share")]) == 1
    assert "loraplex over base product" in out[-2]


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flash"]) == 2
    assert "no op flash" in capsys.readouterr().err
    assert main(["--clock", "cpu", "--threads", "2"]) == 2


@pytest.mark.parametrize("section", gpu.OP_SECTIONS)
def test_a_section_of_kernels_is_written(section: str, tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--only", section, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu-tiny-on-cpu.json").read_text())
    result = document[section]["result"]
    for name in gpu.OP_SECTIONS[section]:
        assert len(result[name]["rows"]) == len(OPS[name].tiny)
        assert result[name]["summary"]


def test_an_op_is_measured_in_a_process_of_its_own() -> None:
    """The process returns its output as rows, or the reason why it cannot run."""
    (row,) = gpu.rows_apart(OPS["bitsandbytes"], limit_s=0.01)
    assert row.figures[0].not_run == "0 s are over"
