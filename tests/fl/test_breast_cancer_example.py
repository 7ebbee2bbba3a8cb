"""The breast-cancer example, as its reader runs it: good alone, and as good as on the pooled data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "breast_cancer"


def run(*words: object) -> str:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_two_hospitals_train_as_well_as_one_pool(tmp_path: Path) -> None:
    run(EXAMPLE / "prepare.py", tmp_path / "data")
    files = {path.parent.name: load_file(path) for path in (tmp_path / "data").glob("*/*.safetensors")}
    sizes = {name: len(file["labels"]) for name, file in files.items()}
    benign = {name: float(file["labels"].mean()) for name, file in files.items()}
    assert sum(sizes.values()) == 569
    assert sizes["borealis-hospital"] > 1.5 * sizes["cygnus-bio"], "the split is unequal"
    assert benign["borealis-hospital"] > benign["cygnus-bio"] + 0.2, "the split is skewed"

    out = run(EXAMPLE / "job.py", tmp_path / "data", "--workspace", tmp_path / "runs")
    figures = {name: float(value) for name, value in re.findall(r"^(\w*accuracy): ([0-9.]+)$", out, re.MULTILINE)}
    assert "status: finished" in out
    assert figures["accuracy"] >= 0.94
    assert abs(figures["accuracy"] - figures["pooled_accuracy"]) <= 0.02
