"""A site's work in a booted guest of the FL image: a round of private training, and a script that reads its volume."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from building import build_or_skip, copy_recipe
from safetensors.torch import save, save_file

from appliance.data_filling import fill_volume, make_volume
from attestation.evidence.report import Product
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import create_vendor
from cvm_image.build.image import PROJECT, new_log
from cvm_image.build.inspection import inspect_image
from cvm_image.build.launching import find_tools
from cvm_image.build.lock import load_lock, write_lock
from cvm_image.build.store import Store, default_cache
from cvm_image.signing import create_signing_keys
from fl import FedAvgRecipe, train_privately
from fl.guard.accounting import debited, epsilon
from fl.jobs.privacy import DpSgd
from fl.local.graph import export_graph

pytestmark = pytest.mark.long

SITE = Path(__file__).resolve().parent / "site_at_work"
FL = PROJECT / "cvm_image/recipes/fl.toml"
PRIVACY = DpSgd(
    data="train.safetensors", loss="cross_entropy", steps=8, sample_rate=0.25, expected_batch=25.0,
    learning_rate=0.5, max_grad_norm=1.0, noise_multiplier=1.0, delta=1e-5,
)  # fmt: skip
BOOT_SECONDS = 900.0
KEY = hashlib.sha256(b"a volume of a test").digest()
SCAN, LIST = os.urandom(100_000), b"age,outcome\n44,1\n"


def put_job(folder: Path) -> None:
    """A private job and one site's data, as files of the image."""
    folder.mkdir()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    (folder / "graph.json").write_bytes(export_graph(model, torch.zeros(1, 4)))
    recipe = FedAvgRecipe(
        name="private", model=model, min_clients=2, num_rounds=2, train_script=str(folder / "graph.json")
    )
    train_privately(recipe, **PRIVACY.model_dump(exclude_defaults=True))
    (folder / "settings.json").write_text(recipe.settings.model_dump_json())
    (folder / "model.safetensors").write_bytes(save(dict(model.state_dict())))
    features = torch.randn(100, 4)
    save_file({"features": features, "labels": (features[:, 0] > 0).long()}, folder / "train.safetensors")


def put_volume(folder: Path) -> None:
    """A data volume that was filled twice."""
    make_volume(folder / "volume", 4, KEY)
    for name, files in (("one", {"list.csv": b"old", "north/scan": SCAN}), ("two", {"list.csv": LIST})):
        for inside, content in files.items():
            (folder / name / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / inside).write_bytes(content)
        for one in (folder / name, *(folder / name).rglob("*")):
            one.chmod(0o755 if one.is_dir() else 0o644)
        fill_volume(folder / "volume", folder / name, KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def image(folder: Path) -> Path:
    """The FL image, with a site's job laid over it."""
    recipe = copy_recipe(SITE, "site", folder / "recipe")
    shutil.copy(FL, recipe.with_name("fl.toml"))
    lock = load_lock(FL, "fl", "trixie").model_copy(update={"recipe": "site"})
    recipe.with_name("site.lock.json").write_text(write_lock(lock))
    put_job(recipe.parent / "files/usr/lib/sealwright/packages/site_job")
    return build_or_skip(recipe, folder / "image", create_signing_keys(folder / "keys"))


@pytest.fixture(scope="module")
def told(folder: Path, image: Path) -> dict[str, Any]:
    """What the guest told of its round."""
    vendor = create_vendor(folder / "vendor", [Product.MILAN], at=datetime.now(UTC))
    create_chip(vendor, folder / "chip", Product.MILAN, at=datetime.now(UTC))
    (folder / "init-data.toml").write_text(f'version = 1\nname = "site"\n[user_data]\nkey = "{KEY.hex()}"\n')
    put_volume(folder)
    command = [sys.executable, "-m", "appliance.cli", "vm", "boot", str(image), "--memory", "2048"]
    command += ["--init-data", str(folder / "init-data.toml"), "--vendor", str(vendor.folder)]
    command += [
        "--chip",
        str(folder / "chip"),
        "--run",
        str(folder / "run"),
        "--disk",
        f"user-data={folder / 'volume'}",
    ]
    done = subprocess.run(command, capture_output=True, timeout=BOOT_SECONDS, check=False, stdin=subprocess.DEVNULL)
    console = done.stdout.decode(errors="replace")
    lines = [line for line in console.splitlines() if line.startswith('{"site"')]
    assert lines, console[-3000:] + done.stderr.decode(errors="replace")[-2000:]
    found: dict[str, Any] = json.loads(lines[0])["site"]
    assert "refused" not in found, found
    return found


def test_the_fl_image_passes_its_own_inspection(image: Path) -> None:
    """What Debian's packages bring changes with the recipe's globs: a private key of somebody's tests, for one."""
    store = Store(default_cache())
    found = inspect_image(image, find_tools(store, log=new_log(store, "inspect")))
    assert {finding.check: finding.seen for finding in found if not finding.ok} == {}


def test_the_round_is_trained_in_the_guest_s_sandbox(told: dict[str, Any]) -> None:
    assert sorted(told["private"]["moved"]) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(math.isfinite(moved) and moved > 0 for moved in told["private"]["moved"].values())


def test_the_guest_s_accountant_says_what_ours_says(told: dict[str, Any]) -> None:
    assert told["private"]["epsilon"] == pytest.approx(epsilon(PRIVACY, 2), rel=1e-9)
    assert tuple(told["private"]["debited"]) == debited(PRIVACY, 0)


def test_a_sandboxed_script_reads_the_data_volume_and_cannot_write_it(told: dict[str, Any]) -> None:
    assert told["volume"] == {
        "ended": "finished",
        "said": {
            "list.csv": hashlib.sha256(LIST).hexdigest(),
            "north/scan": hashlib.sha256(SCAN).hexdigest(),
            "write": errno.EROFS,
        },
        "generation": 3,
    }
