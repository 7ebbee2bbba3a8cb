"""QEMU: the command line that starts an image, and the process, bounded in time.

Two forms. On SEV-SNP hardware the secure processor measures the firmware with the hash table that QEMU puts into it.
On the virtual platform the same firmware runs under emulation (TCG) or KVM, and the hash table is loaded beside it, so
that OVMF's own check of kernel, initrd and command line runs for real. There the host supplies the table, so that check
exercises the firmware's code; what is attested is what `attestation.virtual` measured.

No guest gets a monitor, a display, a keyboard, or a device that is not named here.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from attestation.evidence.launch import kernel_hash_table, read_firmware
from cvm_image.build.errors import BootFailed, UnusableHost

PROGRAM = "qemu-system-x86_64"
PORT_NAME = "sealwright.port"
"""The virtio-serial port by which a guest reaches the virtual platform's processor."""
EMULATED_CPU = "max,-avx,-avx2,-fma,-f16c"
"""Everything TCG can do but the vector units that it emulates slowly."""
VAULT = "vault"
"""Serial of the one disk that a guest writes to: its sealed volume."""
GPU_WINDOW_MIB = 262144
"""Addresses that the firmware sets aside for a GPU's memory (NVIDIA's deployment guide for confidential computing)."""
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Forward:
    """A TCP port of the host's loopback that leads to a port of the guest."""

    host: int
    guest: int


@dataclass(frozen=True)
class Machine:
    """What the guest is given. Paths are those that QEMU sees, `files` names the image's files likewise.

    `disks` maps serials to raw files (read-only if in `readonly`); `port` is a UNIX socket that QEMU connects to.
    `network`: `none`, or `user` (QEMU's own, the host reachable at 10.0.2.2 unless `restricted`).
    """

    image: Path
    serial: Path
    memory_mib: int = 1024
    vcpus: int = 1
    disks: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    readonly: frozenset[str] = frozenset()
    port: Path | None = None
    network: Literal["none", "user"] = "none"
    restricted: bool = False
    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True)
class HardwareLaunch:
    """What the secure processor is told at a launch on SEV-SNP: policy, HOST_DATA, and the image's ID block."""

    policy: int
    host_data: bytes
    id_block: bytes
    id_auth: bytes
    cpu: str = "EPYC-v4"
    cbit: int = 51
    author_key: bool = True
    gpus: tuple[str, ...] = ()
    """PCI addresses on the host (`0000:41:00.0`), each bound to vfio-pci there."""


def virtual_command(machine: Machine, *, cmdline: str, hash_table: Path, table_address: int, kvm: bool) -> list[str]:
    """Return the command line for the virtual platform: emulation, the hash table in its place in guest memory."""
    acceleration = "kvm" if kvm else "tcg,thread=multi"
    return [
        PROGRAM,
        *("-machine", "q35,smm=off,vmport=off,hpet=off,usb=off,graphics=off,i8042=off"),
        *("-accel", acceleration),
        *("-cpu", "host" if kvm else EMULATED_CPU),
        *_measured(machine, cmdline),
        *("-device", f"loader,file={hash_table},addr={table_address:#x},force-raw=on"),
        *_devices(machine),
    ]


def hardware_command(machine: Machine, launch: HardwareLaunch, *, cmdline: str) -> list[str]:
    """Return the command line for SEV-SNP hardware (QEMU 9.1 and later). Not seen to run: it needs such a machine."""
    guest = [
        "sev-snp-guest,id=sev0",
        f"cbitpos={launch.cbit}",
        "reduced-phys-bits=1",
        f"policy={launch.policy:#x}",
        "kernel-hashes=on",
        f"host-data={base64.b64encode(launch.host_data).decode()}",
        f"id-block={base64.b64encode(launch.id_block).decode()}",
        f"id-auth={base64.b64encode(launch.id_auth).decode()}",
        f"author-key-enabled={'on' if launch.author_key else 'off'}",
    ]
    return [
        PROGRAM,
        *("-machine", "q35,confidential-guest-support=sev0,memory-backend=ram1,smm=off,vmport=off,usb=off,i8042=off"),
        *("-object", f"memory-backend-memfd,id=ram1,size={machine.memory_mib}M,share=true,prealloc=false"),
        *("-object", ",".join(guest)),
        *("-accel", "kvm"),
        *("-cpu", launch.cpu),
        *_measured(machine, cmdline),
        *_devices(machine),
        *_gpus(launch.gpus),
    ]


def _gpus(addresses: tuple[str, ...]) -> list[str]:
    """Each GPU behind a port of its own, without its option ROM, which nobody has measured."""
    words = ["-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={GPU_WINDOW_MIB}"] if addresses else []
    for number, address in enumerate(addresses, 1):
        words += ["-device", f"pcie-root-port,id=gpu{number},bus=pcie.0,chassis={number}"]
        words += ["-device", f"vfio-pci,host={address},bus=gpu{number},romfile="]
    return words


def _measured(machine: Machine, cmdline: str) -> list[str]:
    image = machine.image
    return [
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-vga", "none", "-monitor", "none", "-parallel", "none"),
        *("-m", f"{machine.memory_mib}M", "-smp", str(machine.vcpus)),
        *("-bios", str(image / "firmware.fd")),
        *("-kernel", str(image / "kernel"), "-initrd", str(image / "initrd"), "-append", cmdline),
    ]


def _devices(machine: Machine) -> list[str]:
    words = ["-serial", f"file:{machine.serial}"]
    disks = {"rootfs": machine.image / "rootfs.erofs", "verity": machine.image / "rootfs.verity", **machine.disks}
    for serial, path in disks.items():
        readonly = serial in {"rootfs", "verity"} or serial in machine.readonly
        words += [
            "-drive",
            f"if=none,id={serial},file={_escaped(path)},format=raw,readonly={'on' if readonly else 'off'}",
        ]
        words += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
    if machine.port is not None:
        words += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=port,path={_escaped(machine.port)}"]
        words += ["-device", f"virtserialport,chardev=port,name={PORT_NAME}"]
    if machine.network == "user":
        options = f"user,id=net0,ipv6=off,restrict={'on' if machine.restricted else 'off'}"
        for forward in machine.forwards:
            options += f",hostfwd=tcp:127.0.0.1:{forward.host}-:{forward.guest}"
        words += ["-netdev", options, "-device", "virtio-net-pci,netdev=net0,romfile="]
    return words


def _escaped(path: Path) -> str:
    """QEMU's option values end at a comma; a doubled one stands for itself."""
    return str(path).replace(",", ",,")


def place_hash_table(image: Path, target: Path) -> int:
    """Write the hash table of the image's kernel, initrd and command line to `target`; return where it belongs.

    Raises UnmeasurableImage for a firmware that has no place for it.
    """
    layout = read_firmware((image / "firmware.fd").read_bytes())
    table = kernel_hash_table(
        kernel=(image / "kernel").read_bytes(),
        initrd=(image / "initrd").read_bytes(),
        cmdline=(image / "cmdline").read_bytes(),
    )
    target.write_bytes(table)
    return layout.hash_table


class Guest:
    """A running QEMU: its process and the file that takes the guest's serial console."""

    def __init__(self, process: subprocess.Popen[bytes], serial: Path, words: Path) -> None:
        self.process = process
        self.serial = serial
        self._words = words

    def console(self) -> str:
        """What the guest has written to its serial console so far."""
        return self.serial.read_bytes().decode(errors="replace") if self.serial.exists() else ""

    def wait(self, *, within: float, until: Callable[[str], bool] = lambda _: False, what: str) -> str:
        """Wait until the guest has ended, or `until(console)` holds, and return the console.

        Raises BootFailed after `within` seconds.
        """
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            console = self.console()
            if ended or until(console):
                return console
            time.sleep(0.1)
        lines = self.console().strip().splitlines()[-8:]
        raise BootFailed(
            f"the guest did not end within {within:.0f} s while {what}",
            where=str(self.serial),
            do="Its console's last lines are below.",
            reasons=(*lines, *self._words.read_text(errors="replace").splitlines()[-4:]),
        )

    def end(self) -> None:
        """End the machine, by force if it does not go."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE_SECONDS)


@contextlib.contextmanager
def running(argv: Sequence[str], *, serial: Path, words: Path) -> Iterator[Guest]:
    """Start QEMU by `argv` and yield the guest; it is ended when the block is left. `words` takes QEMU's own output."""
    with words.open("wb") as output:
        try:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except FileNotFoundError:
            raise UnusableHost(f"{argv[0]} is not installed", where="QEMU", do="See `seal doctor`.") from None
    guest = Guest(process, serial, words)
    try:
        yield guest
    finally:
        guest.end()
        process.wait()
