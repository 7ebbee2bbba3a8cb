"""Which attester a guest uses is said by its measured archive alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attestation.attester.boot import parse_cmdline, read_boot
from attestation.attester.hardware import open_hardware
from attestation.attester.virtual_port import VirtualPort
from attestation.attester.world import open_attester, read_world
from attestation.errors import AttesterUnavailable

BOOT = {"cmdline": "ro a=b", "init_data": "run/init-data.toml", "port": "/run/port.sock", "disks": {"data": "/d"}}


def guest(folder: Path, *, world: bytes | None = b"virtual\n", boot: object = BOOT) -> Path:
    """Lay out a started guest as the platform does."""
    (folder / "etc/sealwright").mkdir(parents=True)
    (folder / "run").mkdir()
    if world is not None:
        (folder / "etc/sealwright/attester").write_bytes(world)
    (folder / "run/boot.json").write_text(json.dumps(boot))
    (folder / "run/init-data.toml").write_bytes(b"version = 1\n")
    return folder


def test_a_started_guest_is_read(tmp_path: Path) -> None:
    boot = read_boot(guest(tmp_path))
    assert boot.world == "virtual"
    assert boot.init_data == b"version = 1\n"
    assert dict(boot.parameters) == {"ro": "", "a": "b"}
    assert dict(boot.disks) == {"data": Path("/d")}
    assert isinstance(boot.attester(), VirtualPort)


@pytest.mark.parametrize(
    "world", [None, b"", b"virtual", b"Virtual\n", b"virtual\n\n", b"hardware virtual\n", b"sample\n"]
)
def test_a_missing_or_unknown_word_is_refused(tmp_path: Path, world: bytes | None) -> None:
    with pytest.raises(AttesterUnavailable, match="attester"):
        read_world(guest(tmp_path, world=world))


def test_a_hardware_guest_ignores_a_port_that_its_host_offers(tmp_path: Path) -> None:
    boot = read_boot(guest(tmp_path, world=b"hardware\n"))
    assert boot.port is None
    with pytest.raises(AttesterUnavailable, match="no SEV-SNP secure processor"):
        open_hardware(tmp_path / "none", tmp_path / "none")


def test_a_virtual_guest_without_a_port_is_refused() -> None:
    with pytest.raises(AttesterUnavailable, match="port was not handed"):
        open_attester("virtual", None)


@pytest.mark.parametrize(
    "change",
    [
        {"cmdline": 7},
        {"cmdline": "a" * 5000},
        {"cmdline": "roothash=a roothash=b"},
        {"init_data": "../../etc/passwd"},
        {"init_data": "/etc/passwd"},
        {"port": None},
        {"disks": {"../data": "/d"}},
        {"disks": []},
        {"more": 1},
    ],
)
def test_other_boot_parameters_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(AttesterUnavailable, match="boot parameters"):
        read_boot(guest(tmp_path, boot=BOOT | change))


def test_init_data_that_are_too_large_are_refused(tmp_path: Path) -> None:
    guest(tmp_path)
    (tmp_path / "run/init-data.toml").write_bytes(bytes(64 * 1024 + 1))
    with pytest.raises(AttesterUnavailable, match="boot parameters"):
        read_boot(tmp_path)


def test_a_folder_that_is_no_guest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="boot parameters"):
        read_boot(tmp_path)


def test_a_word_may_be_on_the_command_line_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_cmdline("roothash=a ro roothash=b")
