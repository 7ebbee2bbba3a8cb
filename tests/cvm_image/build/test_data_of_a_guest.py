"""A data volume in a booted guest: the real kernel decrypts and verifies what its owner made, and refuses the rest."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from building import build_or_skip, copy_recipe

from appliance.data_filling import fill_volume, make_volume
from appliance.data_volume import BLOCK, SLOT, Header, read_header
from attestation.evidence.report import Product
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import create_vendor
from cvm_image.signing import create_signing_keys

pytestmark = pytest.mark.long

PROBE = Path(__file__).resolve().parent / "probe"
KEY = hashlib.sha256(b"a volume of a test").digest()
BOOT_SECONDS = 240.0
SCAN = b"".join(hashlib.sha256(b"scan %d" % number).digest() for number in range(4096))
LIST = b"Jane Roe, born 1970-01-01\n" * 200

Reads = Callable[[Path], tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Reads:
    """Boot the probe with a volume; what it told of it, and its console."""
    folder = tmp_path_factory.mktemp("user-data")
    recipe = copy_recipe(PROBE, "probe", folder / "recipe")
    image = build_or_skip(recipe, folder / "image", create_signing_keys(folder / "keys"))
    vendor = create_vendor(folder / "vendor", [Product.MILAN], at=datetime.now(UTC))
    create_chip(vendor, folder / "chip", Product.MILAN, at=datetime.now(UTC))
    (folder / "init-data.toml").write_text(f'version = 1\nname = "probe"\n[user_data]\nkey = "{KEY.hex()}"\n')

    def boot(volume: Path) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", "appliance.cli", "vm", "boot", str(image), "--memory", "512"]
        command += ["--init-data", str(folder / "init-data.toml"), "--vendor", str(vendor.folder)]
        command += ["--chip", str(folder / "chip"), "--run", f"{volume}.run", "--disk", f"user-data={volume}"]
        done = subprocess.run(command, capture_output=True, timeout=BOOT_SECONDS, check=False, stdin=subprocess.DEVNULL)
        console = done.stdout.decode(errors="replace")
        lines = [line for line in console.splitlines() if line.startswith('{"user_data"')]
        assert lines, console[-3000:] + done.stderr.decode(errors="replace")[-2000:]
        told: dict[str, Any] = json.loads(lines[0])["user_data"]
        return told, console

    return boot


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that was filled twice; beside it, as it was after the first time."""
    folder = tmp_path_factory.mktemp("volumes")
    path = folder / "volume"
    make_volume(path, 4, KEY)
    for name, files in (("one", {"list.csv": b"old", "north/scan": SCAN}), ("two", {"list.csv": LIST})):
        for inside, content in files.items():
            (folder / name / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / inside).write_bytes(content)
        for one in (folder / name, *(folder / name).rglob("*")):
            one.chmod(0o755 if one.is_dir() else 0o644)
        fill_volume(path, folder / name, KEY)
        shutil.copy(path, folder / f"after-{name}")
    return path


def header_of(volume: Path) -> Header:
    with volume.open("rb") as file:
        return read_header(file, KEY)


def flipped(volume: Path, target: Path, *positions: int) -> Path:
    raw = bytearray(volume.read_bytes())
    for position in positions:
        raw[position] ^= 1
    target.write_bytes(raw)
    return target


def test_it_shows_the_newest_of_every_file_and_takes_no_write(reads: Reads, volume: Path) -> None:
    before = volume.read_bytes()
    told, console = reads(volume)
    digests = {"list.csv": hashlib.sha256(LIST), "north/scan": hashlib.sha256(SCAN)}
    assert told["files"] == {name: f"done: {one.hexdigest()}" for name, one in digests.items()}
    assert told["generation"] == 3
    assert {name: how.startswith("errno") for name, how in told["attempts"].items()} == {
        "write": True,
        "write disk": True,
    }
    assert told["left"] == []
    assert volume.read_bytes() == before
    assert "Jane Roe" not in console


def test_a_changed_block_does_not_read_and_the_console_says_so(reads: Reads, volume: Path, tmp_path: Path) -> None:
    """A block of the scan, in the first layer; the file in the second layer reads as before."""
    first = header_of(volume).layers[0]
    at = (first.offset + first.data - 2) * BLOCK + 100
    told, console = reads(flipped(volume, tmp_path / "changed", at))
    assert told["files"]["north/scan"] == "errno 5"
    assert told["files"]["list.csv"] == f"done: {hashlib.sha256(LIST).hexdigest()}"
    assert "is corrupted" in console


def test_a_changed_file_system_or_header_does_not_open(reads: Reads, volume: Path, tmp_path: Path) -> None:
    last = header_of(volume).layers[-1]
    told, _ = reads(flipped(volume, tmp_path / "superblock", last.offset * BLOCK + 1024 + 50))
    assert "does not mount, a block of it was changed" in told["refused"]
    told, _ = reads(flipped(volume, tmp_path / "header", 100, SLOT + 100))
    assert "header does not open" in told["refused"]
