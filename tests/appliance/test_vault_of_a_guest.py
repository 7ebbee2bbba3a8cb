"""What a guest does about its vault before any disk is touched; `tests/cvm_image/build` boots guests that have one."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from appliance.sealed_volume import VolumeRefused, changed_blocks_refused, format_volume, open_volume
from appliance.vault import opened_vault, vault_of
from attestation.client import GuestSession
from policies.errors import Refused, Unusable
from policies.init_data import BrokerAddress, InitData

VAULT = "acme-pharma/vault-server/hub"


def init_data(**resources: str) -> InitData:
    return InitData(
        version=1,
        algorithm="sha256",
        charter="ab" * 32,
        role="server",
        name="hub",
        brokers=(BrokerAddress(name="acme-broker", url="https://127.0.0.1:8443"),),
        listen="0.0.0.0:8443",
        resources=resources,
    )


def test_a_vault_is_asked_for_by_the_name_of_its_key() -> None:
    assert vault_of(init_data(model="acme-pharma/key/model")) is None
    assert vault_of(init_data(model="acme-pharma/key/model", vault=VAULT)) == VAULT
    with pytest.raises(Unusable, match="several vaults"):
        vault_of(init_data(one=VAULT, two="acme-pharma/vault-site/north"))


def test_a_host_that_leaves_the_disk_away_is_refused_before_a_broker_is_asked() -> None:
    nobody = cast(GuestSession, None)
    said = f"no disk with the serial vault, on which the vault {VAULT} lies"
    with pytest.raises(Refused, match=said), opened_vault(nobody, VAULT, {"data": Path("/dev/null")}):
        raise AssertionError("it opened")


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_a_disk_that_holds_no_volume_of_ours_is_refused(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(size))
    with pytest.raises(Refused, match="header is refused"):
        open_volume(disk, bytes(32))
    with pytest.raises(Unusable, match="smaller than 16 MiB"):
        format_volume(disk, bytes(32))


def test_only_the_kernel_s_word_for_a_changed_block_becomes_one() -> None:
    said = r"a block of the sealed volume was changed.*\(record\)"
    with pytest.raises(VolumeRefused, match=said), changed_blocks_refused():
        raise OSError(errno.EIO, "Input/output error", "record")
    with pytest.raises(OSError, match="No space"), changed_blocks_refused():
        raise OSError(errno.ENOSPC, "No space left")


def seal(*words: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "appliance.cli", "vm", "vault", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_a_vault_s_disk_is_made_once(tmp_path: Path) -> None:
    disk = tmp_path / "disks/vault"
    assert seal(disk, "--size", 64).returncode == 0
    assert (disk.stat().st_size, disk.stat().st_mode & 0o777) == (64 << 20, 0o600)
    disk.write_bytes(b"a guest's")
    again = seal(disk, "--size", 64)
    assert again.returncode == 2
    assert "there is something already" in again.stderr
    assert disk.read_bytes() == b"a guest's"
