"""The recipes' examples, as their readers run them, on real data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*words: object) -> str:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_logistic_regression_gives_the_weights_of_the_pooled_data(tmp_path: Path) -> None:
    run(EXAMPLES / "breast_cancer" / "prepare.py", tmp_path / "data")
    out = run(EXAMPLES / "logistic_regression" / "job.py", tmp_path / "data", "--workspace", tmp_path / "runs")
    assert "status: finished" in out
    difference, accuracy = re.findall(r": ([0-9.e-]+)$", out, re.MULTILINE)
    assert float(difference) < 1e-6
    assert float(accuracy) >= 0.94


def test_digits_that_differ_by_site_are_learnt_by_each_algorithm(tmp_path: Path) -> None:
    out = run(EXAMPLES / "digits" / "job.py", "--rounds", "8", "--workspace", tmp_path / "runs")
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w+): ([0-9.]+)$", out, re.MULTILINE)}
    assert accuracy.keys() == {"fedavg", "fedprox", "fedopt", "scaffold"}
    assert min(accuracy.values()) > 0.2, "a guess is right one time in ten"
    assert accuracy["scaffold"] > accuracy["fedavg"], "control variates are for sites that differ"


def test_a_scikit_learn_classifier_stops_early_and_is_as_good_as_on_pooled_data(tmp_path: Path) -> None:
    run(EXAMPLES / "breast_cancer" / "prepare.py", tmp_path / "data")
    out = run(EXAMPLES / "scikit_learn" / "job.py", tmp_path / "data", "--workspace", tmp_path / "runs")
    found = dict(re.findall(r"^(\w+): ([\w.]+)$", out, re.MULTILINE))
    assert found["status"] == "finished"
    assert int(found["rounds"]) < 20, "it stops when six rounds are no better"
    assert float(found["accuracy"]) > 0.92
    assert float(found["pooled_accuracy"]) - float(found["accuracy"]) < 0.04
