"""From signed kits alone, by the operators' own commands: a broker, a server and two sites come up and run a job."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from planning import plan_of

from appliance.demo import job
from appliance.demo.guests import wait_for_event
from appliance.demo.setting import (
    BROKER,
    IMAGE,
    OWNER,
    SCIENTIST,
    SERVER,
    SITES,
    Setting,
    found_consortium,
    now,
    publish,
    seal_site_data,
)
from appliance.demo.story import deposit_keys
from appliance.kits.enrolling import planned_documents
from appliance.kits.making import make_kits, make_user_kit, write_kit
from appliance.kits.user_keys import write_user_keys
from appliance.processes import Processes
from fl import ProdEnv
from fl.jobs.bundle import make_bundle
from policies.charter import Changes, files_of
from policies.documents import BundleApproval, ServerAddress

SEAL = [sys.executable, "-m", "appliance.cli"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path / "logs")
    try:
        yield running
    finally:
        running.stop_all()


def lay_out(setting: Setting, kits: Path) -> None:
    """What each operator puts into its kit's `local`: a broker's folder; a guest's image, chip, vendor and disk."""
    shutil.copytree(setting.folder / "broker", kits / f"broker-{BROKER}" / "local")
    for guest in (SERVER, *SITES):
        local = kits / f"{'server' if guest == SERVER else 'site'}-{guest}" / "local"
        (local / "disks").mkdir(parents=True)
        (local / "root.json").write_bytes(setting.first_root)
        (local / "image").symlink_to(setting.image)
        shutil.copytree(setting.vendor.folder, local / "vendor")
        shutil.copytree(setting.chip_folder(guest), local / "chip")
        if guest in SITES:
            shutil.copy(setting.sealed_data(guest), local / "disks/data")


def test_three_members_run_a_job_from_their_kits(tmp_path: Path, processes: Processes) -> None:
    recipe = job.make_recipe()
    bundle = make_bundle(recipe.folder, recipe.settings)
    setting = found_consortium(tmp_path / "made")
    plan = plan_of(setting).model_copy(update={"users": ()})
    approval = BundleApproval(
        bundle=bundle.digest, job=recipe.name, sites=tuple(SITES), expires=now().replace(year=now().year + 1)
    )
    documents = [*planned_documents(plan, setting.charter(), setting.folder), approval]
    setting = publish(setting, Changes(put=files_of(documents)), now())
    kits, key = tmp_path / "kits", setting.members[OWNER]
    for kit in make_kits(plan, setting.store, setting.first_root, key, now()):
        write_kit(kit, kits / kit.name)
    server = ServerAddress(name=SERVER, address=setting.server_address)
    write_kit(make_user_kit(setting.store, f"{OWNER}/{SCIENTIST}", server, key, now()), kits / "user")
    write_user_keys(kits / "user/local", setting.scientist, model_key=setting.model_key)
    seal_site_data(setting, job.split_patients())
    lay_out(setting, kits)

    processes.start(BROKER, [*SEAL, "broker", "run", str(kits / f"broker-{BROKER}")])
    wait_for_event(processes.log_of(BROKER), "ready")
    deposit_keys(setting)
    for guest in (SERVER, *SITES):
        role = "server" if guest == SERVER else "site"
        processes.start(guest, [*SEAL, "vm", "launch", str(kits / f"{role}-{guest}")])
    for guest, ready in {SERVER: "serving", **dict.fromkeys(SITES, "joined")}.items():
        wait_for_event(processes.log_of(guest), ready)
    run = ProdEnv(kits / "user", workspace_root=tmp_path / "runs").execute(recipe)
    result = run.get_result(timeout=120)
    assert run.get_status() == "finished"
    assert job.evaluate(result)["accuracy"] >= 0.94
    assert processes.dead() is None
    assert IMAGE in processes.log_of(SERVER).read_text()
