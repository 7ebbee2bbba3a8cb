"""`seal site tree`, `seal site simulate-devices`: settings that a plan takes, a report, a sentence for bad input."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from appliance.cli import main
from appliance.kits.plan import read_plan

TREE = ["site", "tree", "--server", "hub", "--member", "acme-pharma", "--image", "edge", "--domain", "edge.example"]
KEY = ["--group-key", "acme-pharma/edge/group"]
PLAN = """
[deployment]
[[deployment.images]]
name = "edge"
folder = "edge"
source = "https://images.example"
roles = ["server", "inner", "gateway"]
[[deployment.guests]]
role = "server"
name = "hub"
member = "acme-pharma"
image = "edge"
listen = "0.0.0.0:8001"
address = "hub.example:8001"
"""


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_a_tree_is_what_a_plan_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "consortium.toml"
    file.write_text(PLAN)
    assert run(*TREE, *KEY, "--depth", "2", "--width", "3", "--out", str(file)) == 0
    assert "3 inner nodes and 9 gateways" in capsys.readouterr().err
    plan = read_plan(file.read_bytes(), "consortium.toml")
    gateways = [guest for guest in plan.guests if guest.role == "gateway"]
    assert len(gateways) == 9
    for gateway in gateways:
        parent = plan.server_of(gateway)
        assert parent is not None
        inner = next(guest for guest in plan.guests if guest.name == gateway.server)
        assert (inner.role, inner.server, inner.address) == ("inner", "hub", parent.address)
        assert gateway.resources == {"group": "acme-pharma/edge/group"}


def test_a_tree_prints_what_it_would_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TREE, *KEY, "--depth", "1", "--width", "2") == 0
    guests = tomllib.loads(capsys.readouterr().out)["deployment"]["guests"]
    assert [(guest["name"], guest["server"]) for guest in guests] == [("gateway-1", "hub"), ("gateway-2", "hub")]
    assert run(*TREE, *KEY, "--depth", "1", "--width", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["guests"] == guests


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--depth", "6", "--width", "100", *KEY], "more than"),
        (["--depth", "1", "--width", "1", "--group-key", "nothing"], "resources"),
        (["--depth", "0", "--width", "1", *KEY], "depth"),
    ],
)
def test_a_tree_that_cannot_be_is_one_sentence(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TREE, *words) == 2
    assert named in capsys.readouterr().err


def test_a_plan_whose_tree_has_a_hole_is_refused(tmp_path: Path) -> None:
    from policies.errors import MalformedDocument

    for row in (
        'role = "gateway"\nlisten = "0.0.0.0:1"\nserver = "nowhere"',
        'role = "gateway"\nserver = "hub"',
        'role = "inner"\nlisten = "0.0.0.0:1"\nserver = "hub"',
        'role = "site"\nserver = "north"',
    ):
        text = f'{PLAN}[[deployment.guests]]\nname = "one"\nmember = "acme-pharma"\nimage = "edge"\n{row}\n'
        with pytest.raises(MalformedDocument):
            read_plan(text.encode(), "plan")


def test_devices_are_simulated_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "devices.toml", tmp_path / "report"
    file.write_text(
        'name = "night"\n[population]\ndevices = 1000\n[models]\nnum_updates_for_model = 10\nmax_model_version = 3\n'
        "global_lr = 1.0\n[selection]\ndevice_selection_size = 20\n[tree]\nmoment_seconds = 20.0\n"
    )
    assert run("site", "simulate-devices", str(file), "--workers", "1", "--out", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    report = json.loads((out / "report.json").read_text())
    assert said["ended"] == report["ended"] == "the last version is made"
    assert len(report["versions"]) == 2
    assert report["real"]["updates_a_second"] > 0
    assert (out / "report.html").read_text().count("<svg") == 3
    file.write_text("[population]\ndevices = -1\n")
    assert run("site", "simulate-devices", str(file)) == 2
    assert "devices" in capsys.readouterr().err
