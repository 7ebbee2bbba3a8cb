"""Launching a guest on the virtual platform: from the bytes of an image to what the secure processor remembers.

Each measured file is opened once. The bytes that were measured are the bytes that are unpacked and run, so that nobody
who changes a file in between gets another program under the old measurement.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attestation.errors import MalformedEvidence, PlatformUnusable
from attestation.evidence.cpio import MAX_ARCHIVE, Entry, read_archive
from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE, parse_id_block, verify_id_block
from attestation.evidence.launch import MAX_CMDLINE, MAX_FIRMWARE, MAX_KERNEL, command_line, measure_launch
from attestation.virtual.folders import read_bounded
from attestation.virtual.processor import POLICY, LaunchContext

MAX_INIT_DATA = 64 * 1024
MAX_ID_BLOCKS = 1024

KERNEL_HEADER = b"Sealwright virtual kernel 1\ninit="
"""How a virtual kernel begins; the path of the first program in the archive follows, ended by a line feed."""


@dataclass(frozen=True, slots=True)
class MeasuredFiles:
    """The bytes of an image that enter the measurement, and its ID blocks (`id_blocks`: pairs of block and auth)."""

    firmware: bytes
    kernel: bytes
    initrd: bytes
    cmdline: bytes
    id_blocks: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How the host starts the guest.

    `id_block` False starts it without the image's ID block, as any host may. `overrides` go into the reports
    (`LaunchContext.overrides`): what no honest platform would do.
    """

    vcpu_model: str = "EPYC-v4"
    vcpus: int = 2
    vmm: str = "qemu"
    guest_features: int = 0x1
    policy: int = POLICY
    vmpl: int = 0
    id_block: bool = True
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_measured(image: Path) -> MeasuredFiles:
    """Read an image folder's measured files, each once. Raises PlatformUnusable if one is missing or too large."""
    return MeasuredFiles(
        firmware=read_bounded(image / "firmware.fd", MAX_FIRMWARE),
        kernel=read_bounded(image / "kernel", MAX_KERNEL),
        initrd=read_bounded(image / "initrd", MAX_ARCHIVE),
        cmdline=read_bounded(image / "cmdline", MAX_CMDLINE),
        id_blocks=_read_id_blocks(image),
    )


def launch(files: MeasuredFiles, settings: LaunchSettings, init_data: bytes, report_id: bytes) -> LaunchContext:
    """Measure the guest and return what the secure processor keeps of it.

    HOST_DATA is the SHA-256 of the raw `init_data`; `report_id` is 32 fresh random bytes. With an ID block the launch
    is refused (PlatformUnusable) if measurement or policy is not the block's, as SNP_LAUNCH_FINISH does.
    """
    measurement = measure_launch(
        firmware=files.firmware,
        kernel=files.kernel,
        initrd=files.initrd,
        cmdline=files.cmdline,
        vcpu_model=settings.vcpu_model,
        vcpus=settings.vcpus,
        vmm=settings.vmm,
        guest_features=settings.guest_features,
    )
    named: dict[str, Any] = {}
    if settings.id_block and files.id_blocks:
        named = _named_by_id_block(files.id_blocks, measurement, settings.policy)
    return LaunchContext(
        measurement=measurement,
        host_data=hashlib.sha256(init_data).digest(),
        report_id=report_id,
        policy=settings.policy,
        vmpl=settings.vmpl,
        overrides=settings.overrides,
        **named,
    )


def read_init_data(path: Path) -> bytes:
    """Read an init-data file once, at most 64 KiB."""
    return read_bounded(path, MAX_INIT_DATA)


def unpack_guest(files: MeasuredFiles, guest: Path) -> Path:
    """Unpack the measured archive into the new folder `guest` and return the path of the program to start.

    Raises MalformedArchive for anything but plain files and directories, and PlatformUnusable if the kernel names no
    program of the archive.
    """
    entries = read_archive(files.initrd)
    init = _init_path(files.kernel)
    if not any(entry.name == init and entry.data is not None and entry.executable for entry in entries):
        raise PlatformUnusable(
            f"the initrd holds no program {init!r}, which the kernel starts", where="initrd", do="Make the image again."
        )
    guest.mkdir(mode=0o700)
    for entry in entries:
        _unpack(entry, guest / entry.name)
    return guest / init


def guest_command_line(files: MeasuredFiles) -> str:
    """Return the measured kernel command line as text."""
    return command_line(files.cmdline)


def _unpack(entry: Entry, path: Path) -> None:
    if entry.data is None:
        path.mkdir(mode=0o755)
        return
    mode = 0o755 if entry.executable else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(entry.data)


def _init_path(kernel: bytes) -> str:
    if not kernel.startswith(KERNEL_HEADER):
        raise PlatformUnusable(
            "this kernel is not one that the virtual platform can start as a process",
            where="kernel",
            do="Make the image with `seal image generate`.",
        )
    line, feed, _ = kernel[len(KERNEL_HEADER) :].partition(b"\n")
    path = line.decode("latin-1")
    if not feed or not path.isascii() or not path.startswith("/") or len(path) > 256:
        raise PlatformUnusable("the kernel names no program to start", where="kernel", do="Make the image again.")
    return path[1:]


def _read_id_blocks(image: Path) -> tuple[tuple[bytes, bytes], ...]:
    """Read `id-block` and `id-auth`: one after the other for each measurement of the manifest, or both missing."""
    if not (image / "id-block").exists() and not (image / "id-auth").exists():
        return ()
    blocks = read_bounded(image / "id-block", MAX_ID_BLOCKS * ID_BLOCK_SIZE)
    auths = read_bounded(image / "id-auth", MAX_ID_BLOCKS * ID_AUTH_SIZE)
    count, rest = divmod(len(blocks), ID_BLOCK_SIZE)
    if rest or not count or len(auths) != count * ID_AUTH_SIZE:
        raise PlatformUnusable(
            "the ID blocks and their authentications do not pair", where=str(image), do="Make the image again."
        )
    return tuple(
        (
            blocks[index * ID_BLOCK_SIZE : (index + 1) * ID_BLOCK_SIZE],
            auths[index * ID_AUTH_SIZE : (index + 1) * ID_AUTH_SIZE],
        )
        for index in range(count)
    )


def _named_by_id_block(id_blocks: tuple[tuple[bytes, bytes], ...], measurement: bytes, policy: int) -> dict[str, Any]:
    for raw, auth in id_blocks:
        block = parse_id_block(raw)
        if block.measurement != measurement:
            continue
        if block.policy != policy:
            raise PlatformUnusable(
                f"the secure processor refuses the launch: policy {policy:#x} is not the ID block's {block.policy:#x}",
                where="ID block",
                do="Start the guest with the policy that the image was signed for.",
            )
        try:
            who = verify_id_block(raw, auth)
        except MalformedEvidence as error:
            raise PlatformUnusable(
                f"the secure processor refuses the launch: {error.what}", where="ID block", do=error.do
            ) from error
        return {
            "family_id": block.family_id,
            "image_id": block.image_id,
            "guest_svn": block.guest_svn,
            "id_key_digest": who.id_key_digest,
            "author_key_digest": who.author_key_digest or bytes(48),
            "author_key": who.author_key_digest is not None,
        }
    raise PlatformUnusable(
        f"the secure processor refuses the launch: no ID block of the image is for the measurement {measurement.hex()}",
        where="ID block",
        do="A measured file was changed, or the vCPU settings are none that the image was signed for.",
    )
