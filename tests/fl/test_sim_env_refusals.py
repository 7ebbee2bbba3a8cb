"""What a simulation does not come near: released keys, a site's sealed data, other machines. Each is tried."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from fl import FedAvgRecipe, SimEnv
from fl.environments.keeping_out import GUEST_FOLDERS, refuse_in_guest, refuse_remote_cluster
from fl.errors import SimulationRefused
from fl.guard.sealed_data import seal_file
from fl.recipes.recipe import Recipe

NESTED = """
from fl import SimEnv, client as flare
from policies.errors import Refused

{before}
try:
    SimEnv(num_clients=1)
except Refused as refusal:
    print("refused:", refusal.what)
{after}
while flare.is_running():
    flare.send(flare.receive())
"""


def recipe_in(folder: Path, script: str) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "client.py").write_text(script)
    return FedAvgRecipe(
        name="kept-out",
        min_clients=1,
        num_rounds=1,
        initial_model={"w": np.zeros(2, dtype=np.float32)},
        train_script=str(folder / "client.py"),
    )


@pytest.mark.parametrize(("before", "after"), [("flare.init()", ""), ("", "flare.init()")])
def test_a_jobs_script_starts_no_simulation(tmp_path: Path, before: str, after: str) -> None:
    recipe = recipe_in(tmp_path / "code", NESTED.format(before=before, after=after))
    run = recipe.execute(SimEnv(num_clients=1, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished"
    assert run.logs(grep="refused: a job's training script starts no simulation")


def test_a_guest_starts_no_simulation(tmp_path: Path) -> None:
    assert Path("/run/vault") in GUEST_FOLDERS, "where a booted guest opens its vault (appliance.sealed_volume)"
    assert Path("/run/user_data") in GUEST_FOLDERS, "and its data volume (appliance.user_data)"
    refuse_in_guest([tmp_path / "vault"])
    (tmp_path / "vault").mkdir()
    with pytest.raises(SimulationRefused, match=r"a guest starts no simulation: .*vault"):
        refuse_in_guest([tmp_path / "vault"])


def test_a_sites_sealed_data_are_refused_wherever_they_lie_in_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "site-1/more").mkdir(parents=True)
    (data / "site-1/table.csv").write_text("1,2\n")
    assert SimEnv(num_clients=1, data=data).data["site-1"] == data / "site-1"
    seal_file(data / "site-1/more/table.sealed", {"table.csv": b"1,2\n"}, bytes(32))
    for given in (data, {"site-1": data / "site-1"}):
        with pytest.raises(SimulationRefused, match=r"table\.sealed is a site's sealed data"):
            SimEnv(num_clients=1, data=given)


def test_kits_are_refused_with_what_is_in_them(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    (kit / "local/site-1").mkdir(parents=True)
    (kit / "kit.dsse.json").write_text("{}")
    (kit / "local/model.key").write_bytes(bytes(32))
    for data in (tmp_path, kit, kit / "local"):
        with pytest.raises(SimulationRefused, match="is a kit: its keys belong"):
            SimEnv(clients=["kit"], data=data)
    with pytest.raises(SimulationRefused, match="is a kit"):
        SimEnv(num_clients=1, workspace_root=kit / "local")
    recipe = recipe_in(kit / "local/code", "")
    with pytest.raises(SimulationRefused, match="is a kit"):
        recipe.execute(SimEnv(num_clients=1, workspace_root=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/data",
        "https://data.example/x",
        "file://host/x",
        "nas:/export",
        "user@nas:/x",
        "//nas/x",
        r"\\nas\x",
    ],
)
def test_addresses_of_other_machines_are_refused(tmp_path: Path, address: str) -> None:
    for given in ({"data": address}, {"data": {"site-1": address}}, {"workspace_root": address}):
        with pytest.raises(SimulationRefused, match="reaches no other machine"):
            SimEnv(num_clients=1, **given)  # type: ignore[arg-type]  # of one type each


@pytest.mark.parametrize(
    "address", ["ray://192.0.2.7:10001", "192.0.2.7:6379", "[2001:db8::1]:6379", "head.example:1", "x y"]
)
def test_a_cluster_on_other_machines_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SimulationRefused, match="another machine"):
        SimEnv(num_clients=1, backend="ray")
    SimEnv(num_clients=1)


@pytest.mark.parametrize("address", [None, "", "auto", "local", "127.0.0.1:6379", "ray://localhost:10001"])
def test_a_cluster_of_this_machine_is_not(address: str | None) -> None:
    refuse_remote_cluster(address)
    refuse_remote_cluster(f"{socket.gethostname()}:6379")
