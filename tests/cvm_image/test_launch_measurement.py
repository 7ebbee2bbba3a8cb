"""The launch measurement: equal to sev-snp-measure's own command, changed by every byte, refused for unfit firmware."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import UnmeasurableImage
from attestation.evidence.launch import VCPU_MODELS, VMMS, kernel_hash_table, measure_launch, read_firmware
from cvm_image.firmware import FIRMWARE_SIZE, HASH_TABLE, RESET_ADDRESS, SECTIONS, generate_firmware

FIRMWARE = generate_firmware()
INPUTS = {"firmware": FIRMWARE, "kernel": b"kernel", "initrd": b"initrd", "cmdline": b"ro panic=-1"}


def reference_measurements(folder: Path, calls: list[list[str]]) -> list[str]:
    """Run sev-snp-measure's own command line once for each list of arguments (in one process: it is slow to start)."""
    (folder / "firmware").write_bytes(INPUTS["firmware"])
    (folder / "kernel").write_bytes(INPUTS["kernel"])
    (folder / "initrd").write_bytes(INPUTS["initrd"])
    common = ["sev-snp-measure", "--mode", "snp", "--ovmf", "firmware", "--kernel", "kernel", "--initrd", "initrd"]
    common += ["--append", INPUTS["cmdline"].decode()]
    program = (
        f"import sys\nfrom sevsnpmeasure.cli import main\n"
        f"for call in {calls!r}:\n sys.argv = {common!r} + call\n main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_equals_the_reference_command_for_every_model_vmm_count_and_feature_set(tmp_path: Path) -> None:
    grid = [
        (model, vcpus, vmm, features)
        for model in VCPU_MODELS
        for vmm in VMMS
        for vcpus, features in ((1, 0x1), (2, 0x1), (5, 0x21))
    ]
    names = {"qemu": "QEMU", "ec2": "ec2", "gce": "gce"}
    expected = reference_measurements(
        tmp_path,
        [
            ["--vcpu-type", model, "--vcpus", str(vcpus), "--vmm-type", names[vmm], "--guest-features", hex(features)]
            for model, vcpus, vmm, features in grid
        ],
    )
    ours = [
        measure_launch(**INPUTS, vcpu_model=model, vcpus=vcpus, vmm=vmm, guest_features=features).hex()
        for model, vcpus, vmm, features in grid
    ]
    assert ours == expected
    assert len(set(ours)) > len(VMMS)


@pytest.mark.parametrize("name", ["kernel", "initrd", "cmdline"])
def test_every_byte_of_what_the_hash_table_covers_changes_the_measurement(name: str) -> None:
    genuine = measure_launch(**INPUTS)
    for position in range(len(INPUTS[name])):
        changed = bytearray(INPUTS[name])
        changed[position] ^= 1
        assert measure_launch(**(INPUTS | {name: bytes(changed)})) != genuine


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, FIRMWARE_SIZE - 1), bit=st.integers(0, 7))
def test_a_changed_firmware_byte_changes_the_measurement_or_is_refused(position: int, bit: int) -> None:
    changed = bytearray(FIRMWARE)
    changed[position] ^= 1 << bit
    try:
        assert measure_launch(**(INPUTS | {"firmware": bytes(changed)})) != measure_launch(**INPUTS)
    except UnmeasurableImage:
        return


def test_the_hash_table_is_the_one_that_qemu_builds() -> None:
    table = kernel_hash_table(kernel=b"kernel", initrd=b"initrd", cmdline=b"ro")
    assert len(table) == 176
    for digest in (hashlib.sha256(data).digest() for data in (b"kernel", b"initrd", b"ro\x00")):
        assert digest in table


def test_generated_firmware_describes_itself() -> None:
    layout = read_firmware(FIRMWARE)
    assert layout.size == FIRMWARE_SIZE
    assert layout.hash_table == HASH_TABLE[0]
    assert layout.reset_address == RESET_ADDRESS
    assert [(part.address, part.size, part.kind.value) for part in layout.sections] == list(SECTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"firmware": b""}, "whole pages"),
        ({"firmware": FIRMWARE[:-1]}, "whole pages"),
        ({"firmware": bytes(4096)}, "no GUIDed table"),
        ({"kernel": b""}, "kernel"),
        ({"cmdline": b"a\nb"}, "printable ASCII"),
        ({"cmdline": b"a\x00"}, "printable ASCII"),
        ({"cmdline": "ä".encode()}, "printable ASCII"),
        ({"cmdline": b"a" * 5000}, "too long"),
        ({"vcpu_model": "EPYC-Naples"}, "EPYC-Naples"),
        ({"vcpus": 0}, "out of range"),
        ({"vmm": "xen"}, "VMM"),
        ({"guest_features": -1}, "64-bit"),
    ],
)
def test_unfit_inputs_are_refused_with_a_sentence(change: dict[str, object], words: str) -> None:
    with pytest.raises(UnmeasurableImage, match=words):
        measure_launch(**(INPUTS | change))  # type: ignore[arg-type]  # wrong on purpose


def with_metadata(pack: list[tuple[int, int, int]], *, count: int | None = None, signature: bytes = b"ASEV") -> bytes:
    """Return the generated firmware with other SEV metadata sections."""
    body = b"".join(struct.pack("<III", *section) for section in pack)
    metadata = struct.pack("<4sIII", signature, 16 + len(body), 1, len(pack) if count is None else count) + body
    start = FIRMWARE_SIZE - 4096
    return FIRMWARE[:start] + metadata + FIRMWARE[start + len(metadata) :]


@pytest.mark.parametrize(
    ("firmware", "words"),
    [
        (with_metadata([part for part in SECTIONS if part[2] != 0x10]), "no place for the digests"),
        (with_metadata([*SECTIONS[:-1], (0x900000, 0x1000, 0x10)]), "outside the page"),
        (with_metadata([*SECTIONS, (0x800000, 0x1000, 0x01)]), "overlap"),
        (with_metadata([*SECTIONS, (0x900001, 0x1000, 0x01)]), "range of pages"),
        (with_metadata([*SECTIONS, (0x900000, 0, 0x01)]), "range of pages"),
        (with_metadata([*SECTIONS, (0xFFFFF000, 0x1000, 0x01)]), "range of pages"),
        (with_metadata([*SECTIONS, (0x900000, 0x1000, 0x77)]), "unknown type"),
        (with_metadata(list(SECTIONS), count=3), "disagree"),
        (with_metadata(list(SECTIONS), signature=b"XSEV"), "version 1"),
    ],
)
def test_firmware_that_would_boot_any_kernel_or_is_inconsistent_is_refused(firmware: bytes, words: str) -> None:
    with pytest.raises(UnmeasurableImage, match=words):
        read_firmware(firmware)


@settings(max_examples=100, deadline=None)
@given(tail=st.binary(min_size=256, max_size=4096))
def test_any_footer_is_read_or_refused(tail: bytes) -> None:
    firmware = FIRMWARE[: FIRMWARE_SIZE - 48 - len(tail)] + tail + FIRMWARE[FIRMWARE_SIZE - 48 :]
    try:
        read_firmware(firmware)
    except UnmeasurableImage:
        return
