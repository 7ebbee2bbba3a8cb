"""A planned hardware launch: QEMU's words and libvirt's XML say what the secure processor is to check."""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from virtual_guests import KEYS, make_image

from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE, parse_id_block, verify_id_block
from cvm_image.build.guest.disks import read_init_data
from cvm_image.errors import UnusableImage
from cvm_image.generate import LaunchGrid, generate_image
from cvm_image.hardware import Shape, plan_hardware
from cvm_image.qemu import Forward
from cvm_image.verify import load_image

INIT_DATA = b'version = 1\nrole = "site"\n'
GENOA = Shape("EPYC-Genoa", 4, 8192, (Forward(18443, 8443),))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hardware")
    package = folder / "probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    grid = LaunchGrid(("EPYC-v4", "EPYC-Genoa"), (2, 4))
    generate_image(
        folder / "image", name="site", keys=KEYS, platform="hardware", packages=[package], entry="probe", grid=grid
    )
    return folder / "image"


def guest_object(command: list[str]) -> dict[str, str]:
    """Return the settings of the sev-snp-guest object on a command line."""
    (words,) = [word for word in command if word.startswith("sev-snp-guest,")]
    return dict(part.split("=", 1) for part in words.split(",")[1:])


def test_qemu_is_told_what_the_processor_is_to_check(image: Path, tmp_path: Path) -> None:
    command = plan_hardware(image, INIT_DATA, tmp_path / "run", GENOA).command()
    guest = guest_object(command)
    assert base64.b64decode(guest["host-data"]) == hashlib.sha256(INIT_DATA).digest()
    assert guest["kernel-hashes"] == "on"
    assert guest["policy"] == "0x30000"
    assert guest["author-key-enabled"] == "on"
    block, auth = (base64.b64decode(guest[name]) for name in ("id-block", "id-auth"))
    expected = next(
        value.measurement
        for value in load_image(image).measurements
        if (value.vcpu_model, value.vcpus) == ("EPYC-Genoa", 4)
    )
    assert parse_id_block(block).measurement.hex() == expected
    assert verify_id_block(block, auth).id_key_digest.hex() == load_image(image).id_key_digest
    assert command[command.index("-cpu") + 1] == "EPYC-Genoa"
    assert command[command.index("-smp") + 1] == "4"
    assert command[command.index("-append") + 1] == (image / "cmdline").read_text()
    assert "hostfwd=tcp:127.0.0.1:18443-:8443" in " ".join(command)


def test_a_guest_has_no_monitor_and_no_display(image: Path, tmp_path: Path) -> None:
    command = plan_hardware(image, INIT_DATA, tmp_path / "run", GENOA).command()
    for option in ("-monitor", "-display", "-vga", "-parallel"):
        assert command[command.index(option) + 1] == "none"
    assert "-nodefaults" in command
    assert not {"-qmp", "-gdb", "-vnc", "-s", "-S", "-spice"} & set(command)


def test_init_data_are_on_a_disk_of_their_own(image: Path, tmp_path: Path) -> None:
    plan = plan_hardware(image, INIT_DATA, tmp_path / "run", GENOA, {"data": tmp_path / "data.bin"})
    assert read_init_data(tmp_path / "run/init-data.disk") == INIT_DATA
    words = " ".join(plan.command())
    assert f"id=initdata,file={tmp_path}/run/init-data.disk,format=raw,readonly=on" in words
    assert f"id=data,file={tmp_path}/data.bin,format=raw,readonly=on" in words
    assert "id=rootfs" in words


def test_libvirt_is_told_the_same(image: Path, tmp_path: Path) -> None:
    plan = plan_hardware(image, INIT_DATA, tmp_path / "run", GENOA, {"data": tmp_path / "data & more"})
    domain = ElementTree.fromstring(plan.domain())  # noqa: S314  # our own words
    security = domain.find("launchSecurity")
    assert security is not None
    assert security.attrib == {"type": "sev-snp", "kernelHashes": "yes", "authorKey": "yes"}
    guest = guest_object(plan.command())
    for tag, name in (("idBlock", "id-block"), ("idAuth", "id-auth"), ("hostData", "host-data"), ("policy", "policy")):
        assert security.findtext(tag) == guest[name]
    assert domain.findtext("os/cmdline") == (image / "cmdline").read_text()
    assert domain.find("os/loader").attrib == {"type": "rom"}  # type: ignore[union-attr]  # it is there
    assert [disk.findtext("serial") for disk in domain.iter("disk")] == ["rootfs", "verity", "initdata", "data"]
    sources = [source.get("file") for source in domain.iterfind("devices/disk/source")]
    assert sources[3] == f"{tmp_path}/data & more"
    assert [disk.find("readonly") is not None for disk in domain.iter("disk")] == [True, True, True, True]
    assert domain.find("devices/interface/portForward/range").attrib == {  # type: ignore[union-attr]  # it is there
        "start": "18443",
        "to": "8443",
    }
    for absent in ("graphics", "video", "console", "channel", "input"):
        assert domain.find(f"devices/{absent}") is None


def test_gpus_are_passed_through_without_their_option_roms(image: Path, tmp_path: Path) -> None:
    shape = Shape("EPYC-Genoa", 4, 8192, gpus=("0000:41:00.0", "0000:c1:00.0"))
    plan = plan_hardware(image, INIT_DATA, tmp_path / "run", shape)
    words = " ".join(plan.command())
    assert "vfio-pci,host=0000:41:00.0,bus=gpu1,romfile=" in words
    assert "vfio-pci,host=0000:c1:00.0,bus=gpu2,romfile=" in words
    assert "opt/ovmf/X-PciMmio64Mb" in words
    domain = ElementTree.fromstring(plan.domain())  # noqa: S314  # our own words
    addresses = [address.attrib for address in domain.iterfind("devices/hostdev/source/address")]
    assert addresses[1] == {"domain": "0x0000", "bus": "0xc1", "slot": "0x00", "function": "0x0"}
    assert [rom.get("enabled") for rom in domain.iterfind("devices/hostdev/rom")] == ["no", "no"]
    assert domain.findtext("sysinfo/entry") == "262144"


@pytest.mark.parametrize(
    "gpus", [("41:00.0",), ("0000:41:00.0,x-no-mmap=on",), ("0000:41:00.0", "0000:41:00.0"), ("0000:41:00.8",)]
)
def test_what_is_no_gpu_s_address_is_refused(image: Path, tmp_path: Path, gpus: tuple[str, ...]) -> None:
    with pytest.raises(UnusableImage, match=r"PCI address|different GPUs"):
        plan_hardware(image, INIT_DATA, tmp_path / "run", Shape("EPYC-Genoa", 4, gpus=gpus))


def test_settings_that_were_not_signed_are_refused(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableImage, match="not signed for EPYC-v4 with 3 vCPUs") as refused:
        plan_hardware(image, INIT_DATA, tmp_path, Shape(vcpus=3))
    assert "EPYC-Genoa with 4" in refused.value.do


def test_a_virtual_image_is_refused(tmp_path: Path) -> None:
    make_image(tmp_path / "image")
    with pytest.raises(UnusableImage, match="virtual image"):
        plan_hardware(tmp_path / "image", INIT_DATA, tmp_path / "run", Shape())


def test_each_setting_has_its_own_block(image: Path, tmp_path: Path) -> None:
    shapes = [Shape(model, vcpus) for model in ("EPYC-v4", "EPYC-Genoa") for vcpus in (2, 4)]
    copy = Path(shutil.copytree(image, tmp_path / "image"))
    plans = [plan_hardware(copy, INIT_DATA, tmp_path / "run", shape) for shape in shapes]
    assert len({plan.launch.id_block for plan in plans}) == 4
    assert {len(plan.launch.id_block) for plan in plans} == {ID_BLOCK_SIZE}
    assert {len(plan.launch.id_auth) for plan in plans} == {ID_AUTH_SIZE}
