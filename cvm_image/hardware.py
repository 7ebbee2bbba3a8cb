"""A launch on SEV-SNP hardware, planned: the image's ID block, HOST_DATA and disks; as QEMU's words or libvirt's XML.

Nothing is started here. QEMU 9.1 and libvirt 10.5 are the first versions that know such guests; neither form has been
seen to run where this was written, for want of such a machine.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE
from attestation.evidence.launch import MAX_CMDLINE
from cvm_image.build.guest.disks import write_init_data
from cvm_image.errors import UnusableImage
from cvm_image.files import read_file
from cvm_image.manifest import ImageManifest
from cvm_image.qemu import GPU_WINDOW_MIB, VAULT, Forward, HardwareLaunch, Machine, hardware_command
from cvm_image.verify import load_image

INIT_DATA_DISK = "initdata"
"""Serial of the disk on which a guest finds its init-data."""

MAX_ID_FILE = 1024 * ID_AUTH_SIZE
MAX_GPUS = 16
_PCI = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the host gives the guest: measured (model and vCPUs) and not (memory, forwarded ports, GPUs).

    `gpus` are PCI addresses on the host; the guest shows its GPUs by their own evidence.
    """

    vcpu_model: str = "EPYC-v4"
    vcpus: int = 2
    memory_mib: int = 4096
    forwards: tuple[Forward, ...] = ()
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HardwarePlan:
    """One guest, ready to be started on SEV-SNP hardware."""

    name: str
    machine: Machine
    launch: HardwareLaunch
    cmdline: str

    def command(self) -> list[str]:
        """Return QEMU's command line."""
        return hardware_command(self.machine, self.launch, cmdline=self.cmdline)

    def domain(self) -> str:
        """Return libvirt's domain XML for the same guest."""
        return libvirt_domain(self)


def plan_hardware(
    image: Path, init_data: bytes, run: Path, shape: Shape, disks: Mapping[str, Path] | None = None
) -> HardwarePlan:
    """Plan the launch of `image` with `init_data`; its disk and the console's file lie in the folder `run` (made).

    Raises UnusableImage for a virtual image, and for vCPU settings that the image was not signed for.
    """
    manifest = load_image(image)
    if manifest.platform != "hardware":
        raise UnusableImage(
            "a virtual image asks for the virtual platform and would end on hardware",
            where=str(image),
            do="Build it with `--variant hardware`.",
        )
    wrong = [address for address in shape.gpus if not _PCI.fullmatch(address)]
    if wrong or len(shape.gpus) > MAX_GPUS or len(set(shape.gpus)) != len(shape.gpus):
        raise UnusableImage(
            f"{wrong[0]!r} is no PCI address" if wrong else f"these are no 1 to {MAX_GPUS} different GPUs",
            where="GPUs",
            do="Write each once, like 0000:41:00.0 (lspci -D).",
        )
    id_block, id_auth = _id_block(image, manifest, shape)
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk = run.absolute() / "init-data.disk"
    disk.write_bytes(write_init_data(init_data))
    machine = Machine(
        image=image.absolute(),
        serial=run.absolute() / "console.log",
        memory_mib=shape.memory_mib,
        vcpus=shape.vcpus,
        disks={INIT_DATA_DISK: disk, **{name: path.absolute() for name, path in (disks or {}).items()}},
        readonly=frozenset({INIT_DATA_DISK, *(disks or {})}) - {VAULT},
        network="user",
        restricted=False,
        forwards=shape.forwards,
    )
    launch = HardwareLaunch(
        policy=manifest.policy,
        host_data=hashlib.sha256(init_data).digest(),
        id_block=id_block,
        id_auth=id_auth,
        cpu=shape.vcpu_model,
        author_key=manifest.author_key_digest is not None,
        gpus=shape.gpus,
    )
    return HardwarePlan(manifest.name, machine, launch, read_file(image / "cmdline", MAX_CMDLINE).decode("ascii"))


def libvirt_domain(plan: HardwarePlan) -> str:
    """Return the plan as libvirt's domain XML (libvirt, formatdomain.html, "Launch Security", type `sev-snp`)."""
    machine, launch = plan.machine, plan.launch
    domain = ElementTree.Element("domain", type="kvm")
    _add(domain, "name", plan.name)
    _add(domain, "memory", str(machine.memory_mib), unit="MiB")
    _add(domain, "vcpu", str(machine.vcpus), placement="static")
    backing = _add(domain, "memoryBacking")
    _add(backing, "source", type="memfd")
    _add(backing, "access", mode="shared")
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine="q35")
    _add(system, "loader", str(machine.image / "firmware.fd"), type="rom")
    _add(system, "kernel", str(machine.image / "kernel"))
    _add(system, "initrd", str(machine.image / "initrd"))
    _add(system, "cmdline", plan.cmdline)
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "smm", state="off")
    cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
    _add(cpu, "model", launch.cpu, fallback="forbid")
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _add(domain, event, "destroy")
    devices = _add(domain, "devices")
    _add_devices(devices, machine)
    if launch.gpus:
        _add_gpus(domain, devices, launch.gpus)
    security = _add(
        domain,
        "launchSecurity",
        type="sev-snp",
        kernelHashes="yes",
        authorKey="yes" if launch.author_key else "no",
    )
    _add(security, "cbitpos", str(launch.cbit))
    _add(security, "reducedPhysBits", "1")
    _add(security, "policy", f"{launch.policy:#x}")
    _add(security, "idBlock", base64.b64encode(launch.id_block).decode("ascii"))
    _add(security, "idAuth", base64.b64encode(launch.id_auth).decode("ascii"))
    _add(security, "hostData", base64.b64encode(launch.host_data).decode("ascii"))
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode") + "\n"


def _add_devices(devices: ElementTree.Element, machine: Machine) -> None:
    """Add the root, the verity tree, the other disks, the console's file, and a network of the host's choice."""
    disks = {"rootfs": machine.image / "rootfs.erofs", "verity": machine.image / "rootfs.verity", **machine.disks}
    for index, (serial, path) in enumerate(disks.items()):
        disk = _add(devices, "disk", type="file", device="disk")
        _add(disk, "driver", name="qemu", type="raw")
        _add(disk, "source", file=str(path))
        _add(disk, "target", dev=f"vd{chr(ord('a') + index)}", bus="virtio")
        _add(disk, "serial", serial)
        if serial in {"rootfs", "verity"} or serial in machine.readonly:
            _add(disk, "readonly")
    serial_port = _add(devices, "serial", type="file")
    _add(serial_port, "source", path=str(machine.serial))
    interface = _add(devices, "interface", type="user")
    _add(interface, "model", type="virtio")
    _add(interface, "rom", enabled="no")
    if machine.forwards:
        # libvirt forwards ports of a user network only where passt is its back end.
        _add(interface, "backend", type="passt")
        ports = _add(interface, "portForward", proto="tcp", address="127.0.0.1")
        for forward in machine.forwards:
            _add(ports, "range", start=str(forward.host), to=str(forward.guest))
    _add(devices, "memballoon", model="none")


def _add_gpus(domain: ElementTree.Element, devices: ElementTree.Element, addresses: tuple[str, ...]) -> None:
    """Add each GPU without its option ROM, and the window that the firmware sets aside for their memory."""
    for address in addresses:
        found = _PCI.fullmatch(address)
        parts = found.groups() if found else ()
        device = _add(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
        names = ("domain", "bus", "slot", "function")
        numbers = {name: f"0x{part}" for name, part in zip(names, parts, strict=True)}
        _add(_add(device, "source"), "address", **numbers)
        _add(device, "rom", enabled="no")
    entries = _add(domain, "sysinfo", type="fwcfg")
    _add(entries, "entry", str(GPU_WINDOW_MIB), name="opt/ovmf/X-PciMmio64Mb")


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _id_block(image: Path, manifest: ImageManifest, shape: Shape) -> tuple[bytes, bytes]:
    """Return the ID block and its authentication for the guest's vCPU settings."""
    blocks, auths = (read_file(image / name, MAX_ID_FILE) for name in ("id-block", "id-auth"))
    for index, value in enumerate(manifest.measurements):
        asked = (shape.vcpu_model, shape.vcpus, "qemu", 0x1)
        if (value.vcpu_model, value.vcpus, value.vmm, value.guest_features) == asked:
            return (
                blocks[index * ID_BLOCK_SIZE :][:ID_BLOCK_SIZE],
                auths[index * ID_AUTH_SIZE :][:ID_AUTH_SIZE],
            )
    signed = sorted(
        {f"{value.vcpu_model} with {value.vcpus}" for value in manifest.measurements if value.vmm == "qemu"}
    )
    raise UnusableImage(
        f"the image was not signed for {shape.vcpu_model} with {shape.vcpus} vCPUs under QEMU",
        where=str(image),
        do=f"It was for {', '.join(signed) or 'other monitors'}.",
    )
