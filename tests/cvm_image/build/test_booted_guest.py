"""A guest is booted on the virtual platform: it attests from the inside, and can do none of what it should not.

The image is a probe (beside this file): our guest's first program, our packages, and a role that tries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from building import build_or_skip, copy_recipe

from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.report import Product
from attestation.verifier import SHOW, Expected, verify_snp, with_virtual_roots
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import Vendor, create_vendor
from cvm_image.build.inspection import inspect_image
from cvm_image.build.launching import booted, find_tools
from cvm_image.build.store import Store, default_cache
from cvm_image.qemu import Machine
from cvm_image.signing import SigningKeys, create_signing_keys
from cvm_image.verify import load_image

pytestmark = pytest.mark.long

PROBE = Path(__file__).resolve().parent / "probe"
INIT_DATA = b'version = 1\nname = "probe"\n'
BOOT_SECONDS = 240.0
MISPLACED = Machine(image=Path("/"), serial=Path("/"), memory_mib=512)
"""A board without what the guest needs; its paths are not used."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SigningKeys:
    return create_signing_keys(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, keys: SigningKeys) -> Path:
    recipe = copy_recipe(PROBE, "probe", tmp_path_factory.mktemp("recipe") / "copy")
    return build_or_skip(recipe, tmp_path_factory.mktemp("image") / "probe", keys)


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Vendor:
    return create_vendor(tmp_path_factory.mktemp("vendor") / "vendor", [Product.MILAN], at=datetime.now(UTC))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, image: Path, vendor: Vendor) -> Mapping[str, Any]:
    """What the probe told from inside a guest that `seal vm boot` started."""
    folder = tmp_path_factory.mktemp("guest")
    create_chip(vendor, folder / "chip", Product.MILAN, at=datetime.now(UTC))
    (folder / "init-data.toml").write_bytes(INIT_DATA)
    (folder / "data").write_bytes(b"sixteen bytes: 1" + bytes(1000))
    command = [sys.executable, "-m", "appliance.cli", "vm", "boot", str(image), "--memory", "512"]
    command += ["--init-data", str(folder / "init-data.toml"), "--vendor", str(vendor.folder)]
    command += ["--chip", str(folder / "chip"), "--run", str(folder / "run"), "--disk", f"data={folder / 'data'}"]
    done = subprocess.run(command, capture_output=True, timeout=BOOT_SECONDS, check=False, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith('{"probe"')]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0
    found: Mapping[str, Any] = json.loads(lines[0])["probe"]
    return found


def test_the_guest_attests_what_was_signed(told: Mapping[str, Any], image: Path, vendor: Vendor) -> None:
    pins = [RootPin(one.product, one.ark_spki_sha256, virtual=True) for one in vendor.authorities.values()]
    expected = Expected(
        report_data=hashlib.sha512(INIT_DATA).digest(),
        measurements=load_image(image).reference_values(),
        host_data=hashlib.sha256(INIT_DATA).digest(),
    )
    appraisal = verify_snp(
        base64.b64decode(told["report"]),
        from_certificate_table(base64.b64decode(told["certificates"])),
        with_virtual_roots(SHOW, pins),
        expected,
        datetime.now(UTC),
    )
    assert appraisal.affirming, appraisal.failures
    assert appraisal.claims["platform"] == "virtual"


def test_the_guest_sees_what_its_host_handed_over(told: Mapping[str, Any]) -> None:
    assert told["init_data"].encode() == INIT_DATA
    assert told["disks"] == ["data"]
    assert bytes.fromhex(told["data"]["data"]) == b"sixteen bytes: 1"


def test_no_attempt_from_inside_succeeds(told: Mapping[str, Any]) -> None:
    attempts = told["attempts"]
    assert sorted(attempts) == [
        "connect elsewhere",
        "load module",
        "run from tmp",
        "set clock",
        "start shell",
        "write disk",
        "write memory",
        "write root",
    ]
    assert {name: how for name, how in attempts.items() if not how.startswith("errno")} == {}


def test_nothing_runs_and_nothing_listens_but_the_role(told: Mapping[str, Any]) -> None:
    assert told["processes"] == ["/usr/bin/python3", "/usr/bin/python3"]
    assert told["listening"] == []
    assert told["writable"] == []
    assert "[integrity]" in told["lockdown"]
    assert told["new_privileges"] == "1"
    assert int(told["capabilities"], 16) & (1 << 16 | 1 << 17 | 1 << 25) == 0


def test_inspection_affirms_the_image(image: Path) -> None:
    store = Store(default_cache())
    findings = inspect_image(image, find_tools(store, log=store.logs / "tests.log"))
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize(
    ("init_data", "reason"),
    [
        (None, "the host attached no disk with the serial initdata"),
        (INIT_DATA, "the host attached no virtio port sealwright.port"),
    ],
)
def test_a_guest_without_init_data_or_processor_says_so_and_powers_off(
    image: Path, tmp_path: Path, init_data: bytes | None, reason: str
) -> None:
    store = Store(default_cache())
    tools = find_tools(store, log=store.logs / "tests.log")
    with booted(tools, image, tmp_path / "run", machine=MISPLACED, init_data=init_data) as guest:
        console = guest.wait(within=BOOT_SECONDS, what="refusing to start")
    assert f"sealwright: stopped: {reason}" in console
    assert "Power down" in console
