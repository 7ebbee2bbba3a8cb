"""The demonstration with its three guests booted as machines: the same job, result and audit as with processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.demo.job import split_patients
from appliance.demo.setting import GUESTS

pytestmark = pytest.mark.long

SEAL = [sys.executable, "-m", "appliance.cli"]
STORY_SECONDS = 1800.0
"""For two cores that others use as well; alone on them it takes a third of this."""


@pytest.fixture(scope="module")
def told(image: Path) -> tuple[Path, dict[str, Any]]:
    """The demonstration's folder and report."""
    folder = image.parent / "demo-vm"
    done = subprocess.run(
        [*SEAL, "demo", "--vm", str(image), "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=STORY_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return folder, report


def test_the_job_that_booted_guests_trained_is_as_good_as_pooled_training(told: tuple[Path, dict[str, Any]]) -> None:
    _, report = told
    assert report["booted"]
    assert report["accuracy"] >= 0.94
    assert report["pooled_accuracy"] - report["accuracy"] <= 0.02


def test_every_guest_was_affirmed_and_none_was_refused(told: tuple[Path, dict[str, Any]]) -> None:
    _, report = told
    affirmed = {row["who"].rpartition("/")[2] for row in report["decisions"] if row["outcome"] == "affirming"}
    assert affirmed == set(GUESTS)
    assert [row for row in report["decisions"] if row["kind"] == "denial"] == []
    assert {row["image"] for row in report["decisions"] if row["image"]} == {"fl"}


def test_an_auditor_checks_it_offline(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    words = ["audit", "verify", str(folder / "audit"), "--trust", str(folder / "root.json")]
    done = subprocess.run([*SEAL, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_consoles_show_boots_from_verified_roots_and_no_patient(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    for guest in GUESTS:
        console = (folder / f"logs/{guest}.log").read_text(errors="replace")
        assert "is open" in console
        assert '"event": "released"' in console
        assert "mean radius" not in console


def test_when_all_are_off_the_model_and_the_patients_lie_nowhere_in_clear(told: tuple[Path, dict[str, Any]]) -> None:
    """Nor in what the hosts gave QEMU: every file is searched for a stretch of the result and of each site's data."""
    folder, _ = told
    wanted = {"model": next((folder / "result").rglob("model.safetensors")).read_bytes()[-400:-300]}
    wanted |= {site: content[-2000:-1900] for site, content in split_patients().items()}
    holders: dict[str, set[str]] = {name: set() for name in wanted}
    for path in folder.rglob("*"):
        raw = path.read_bytes() if path.is_file() else b""
        for name, stretch in wanted.items():
            if stretch in raw:
                holders[name].add(path.relative_to(folder).parts[0])
    assert holders == {name: {"result"} if name == "model" else set() for name in wanted}
