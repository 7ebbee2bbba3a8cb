"""The demonstration of a tree: devices train through server, inner node and gateway; a bare host gets nothing.

Once with guests that are processes, once with guests booted as machines from the built image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.demo.edge_story import LEAST_ACCURACY, VERSIONS
from appliance.poc import TRUST_DOMAIN

pytest.importorskip("executorch")
pytestmark = pytest.mark.long

STORY_SECONDS = 1800.0
"""For two cores that others use as well, on which three machines are emulated."""
GUESTS = {"poc-server": "server", "inner": "inner", "gateway": "gateway"}


def told(folder: Path, *words: str | Path) -> dict[str, Any]:
    """The report of `seal demo --edge`."""
    command: Sequence[str] = [sys.executable, "-m", "appliance.cli", "demo", "--edge", "--out", str(folder), "--json"]
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=STORY_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(report: dict[str, Any], folder: Path) -> None:
    """What holds of either."""
    assert report["guests"] == {name: f"spiffe://{TRUST_DOMAIN}/{role}/{name}" for name, role in GUESTS.items()}
    assert report["accuracy"] >= LEAST_ACCURACY
    assert report["updates"] >= 8 * (VERSIONS - 1)
    (bare,) = report["attacks"]
    assert bare["refused_by"] == "poc-broker"
    assert any("root" in reason for reason in bare["reasons"])  # that vouches for it is none of the charter's
    logs = {name: (folder / f"poc/logs/{name}.log").read_text(errors="replace") for name in GUESTS}
    assert all('"event": "serving"' in log for log in logs.values())
    assert "inner inner is connected" in logs["poc-server"]
    assert "gateway gateway is connected" in logs["inner"]


def test_devices_train_through_a_tree_of_processes(tmp_path: Path) -> None:
    report = told(tmp_path / "demo")
    assert not report["booted"]
    check(report, tmp_path / "demo")


def test_devices_train_through_a_booted_server_inner_node_and_gateway(image: Path, tmp_path: Path) -> None:
    report = told(tmp_path / "demo", "--vm", image)
    assert report["booted"]
    check(report, tmp_path / "demo")
    for name in GUESTS:
        assert "is open" in (tmp_path / f"demo/poc/logs/{name}.log").read_text(errors="replace")
