"""Starting from a kit: what each role's command does once the kit has been verified.

Everything that the host adds stands in the kit's `local/`, by fixed names, so that one word starts a place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from policies.charter import Charter, current_charter, read_store, write_store
from policies.documents import BrokerEntry
from policies.errors import KitRefused, Refused, Unusable
from policies.keys import load_private_key, public_pem, write_secret
from policies.kits import INIT_DATA, LOCAL, ROOT, KitImage, SignedKit, open_signed_kit

if TYPE_CHECKING:
    from attestation.virtual.platform import Machine
    from cvm_image.hardware import HardwarePlan
    from cvm_image.qemu import Forward

IMAGE: Final = "image"
VENDOR: Final = "vendor"
CHIP: Final = "chip"
DISKS: Final = "disks"
RUN: Final = "run"


@dataclass(frozen=True, slots=True)
class GuestStart:
    """What a guest's host starts: the files in `local/`, and the measured settings that the kit gives."""

    kit: SignedKit
    folder: Path
    settings: KitImage

    @property
    def image(self) -> Path:
        """The image's folder, or the one that a link leads to."""
        return self.folder / LOCAL / IMAGE

    @property
    def init_data(self) -> bytes:
        """The init-data, as enrolled."""
        return self.kit.files[INIT_DATA]

    @property
    def disks(self) -> Mapping[str, Path]:
        """The disks by name."""
        return {name: self.folder / LOCAL / DISKS / name for name in self.kit.manifest.disks}

    @property
    def run(self) -> Path:
        """Where the guest runs."""
        return self.folder / LOCAL / RUN

    @property
    def vendor(self) -> Path:
        """The virtual vendor's folder."""
        return self.folder / LOCAL / VENDOR

    @property
    def chip(self) -> Path:
        """The virtual chip's folder."""
        return self.folder / LOCAL / CHIP


def guest_start(folder: Path, *, trust: bytes | None = None) -> GuestStart:
    """Verify the guest's kit in `folder` and the image beside it.

    Raises KitRefused for the kit, Refused (every file) for an image that is not the approved one, and Unusable for
    another kind of kit, or where something is missing in `local/`.
    """
    kit = open_signed_kit(folder, trust=trust)
    settings = kit.manifest.image
    if settings is None:
        raise Unusable(
            f"this is the kit of {kit.manifest.place}, which is no guest", where=str(folder), do="See its README.md."
        )
    start = GuestStart(kit, folder, settings)
    reasons = image_reasons(start.image, settings)
    if reasons:
        raise Refused(
            f"the image for {kit.manifest.place} is not the approved one: {reasons[0]}",
            where=str(start.image),
            do=f"Get the image {settings.name} from {settings.source}, and place it there.",
            reasons=tuple(reasons),
        )
    missing = [str(path) for path in start.disks.values() if not path.is_file()]
    if missing:
        raise Unusable(
            f"the disk is missing: {', '.join(missing)}",
            where=str(folder),
            do="Make it with `seal site seal`, `seal vm vault` or `seal vm data`.",
        )
    return start


def image_reasons(folder: Path, wanted: KitImage) -> list[str]:
    """Return why the image in `folder` is not the one that a kit names: every file that was changed or is missing."""
    import hashlib

    from cvm_image.verify import changed_files, read_manifest_file
    from policies.errors import SealwrightError

    if not folder.is_dir():
        return [f"there is no image at {folder}"]
    try:
        raw = read_manifest_file(folder)
        if hashlib.sha256(raw).hexdigest() != wanted.manifest_sha256:
            return [f"manifest.dsse.json: not the one that the charter approved for {wanted.name}"]
        from cvm_image.manifest import read_manifest

        return changed_files(folder, read_manifest(raw))
    except SealwrightError as error:
        return [error.what]


def launch_virtual_guest(start: GuestStart) -> int:
    """Start the guest on the host's virtual chip, its console on standard output; return its exit status.

    An image whose kernel boots is started as a machine, any other as a process.
    """
    from appliance.booted_guest import is_bootable
    from attestation.virtual.__main__ import image_disks
    from attestation.virtual.chip import load_chip
    from attestation.virtual.launch import LaunchSettings, read_measured
    from attestation.virtual.platform import Machine, run_guest
    from attestation.virtual.vendor import load_vendor
    from cvm_image.verify import load_image

    if start.kit.manifest.platform != "virtual":
        raise Unusable(
            "this kit is for SEV-SNP hardware",
            where=str(start.folder),
            do="Start it by `seal vm launch` on such a host.",
        )
    chip = load_chip(start.chip)
    settings, files = start.settings, read_measured(start.image)
    boots = is_bootable(files.kernel)
    machine = Machine(
        chip=chip,
        certificates=chip.certificate_table(load_vendor(start.vendor)),
        files=files,
        init_data=start.init_data,
        settings=LaunchSettings(settings.vcpu_model, settings.vcpus, policy=load_image(start.image).policy),
        disks={} if boots else image_disks(start.image) | dict(start.disks),
    )
    place = start.kit.manifest.place
    sys.stderr.write(f"seal: virtual platform, {place} on {chip.product.value} chip {chip.chip_id.hex()[:16]}\n")
    return _boot(machine, start) if boots else run_guest(machine, start.run)


def _boot(machine: Machine, start: GuestStart) -> int:
    """Start the guest as a machine that QEMU emulates; its ports keep their numbers."""
    from appliance.booted_guest import cached_tools, run_booted_guest

    return run_booted_guest(
        machine,
        start.image.resolve(),
        start.run,
        tools=cached_tools(),
        memory_mib=start.settings.memory_mib,
        forwards=_forwards(start),
        disks=start.disks,
    )


def _forwards(start: GuestStart) -> tuple[Forward, ...]:
    from cvm_image.qemu import Forward

    ports = [int(port.listen.rpartition(":")[2]) for port in start.kit.manifest.ports]
    return tuple(Forward(port, port) for port in ports)


def hardware_plan(start: GuestStart, gpus: tuple[str, ...] = ()) -> HardwarePlan:
    """The guest as QEMU or libvirt is to start it on SEV-SNP hardware; its ports keep their numbers.

    `gpus` are PCI addresses of this host, as many as the plan gives the guest: Unusable for another number.
    """
    from cvm_image.hardware import Shape, plan_hardware

    settings = start.settings
    if len(gpus) != settings.gpus:
        raise Unusable(
            f"the guest has {settings.gpus} GPUs, and {len(gpus)} are named",
            where=start.kit.manifest.place,
            do="Name each by its address on this host: --gpu 0000:41:00.0.",
        )
    shape = Shape(settings.vcpu_model, settings.vcpus, settings.memory_mib, _forwards(start), gpus)
    return plan_hardware(start.image, start.init_data, start.run, shape, start.disks)


def broker_settings(folder: Path, *, trust: bytes | None = None) -> Path:
    """Verify the broker's kit in `folder`, put its charter into the broker's own folder (`local/`), unless that has a
    newer one, and return the settings to run.

    Raises KitRefused for the kit, and Unusable where the broker's own keys are missing or not the charter's.
    """
    kit = open_signed_kit(folder, trust=trust)
    entry = kit.charter.broker(kit.manifest.name)
    if kit.manifest.role != "broker" or entry is None:
        raise Unusable(
            f"this is the kit of {kit.manifest.place}, not of a broker", where=str(folder), do="See its README.md."
        )
    home = folder / LOCAL
    problem = broker_key_problem(home, entry)
    if problem:
        raise Unusable(
            problem,
            where=str(home),
            do="Move the folder that `seal broker init` made there: its entry is in the charter.",
        )
    _place_charter(kit, home)
    return home / "broker.toml"


def broker_key_problem(home: Path, entry: BrokerEntry) -> str | None:
    """Return why the broker's folder is not the one whose keys the charter has; None if it is."""
    from attestation.broker.config import load_config
    from policies.errors import SealwrightError

    if not (home / "broker.toml").is_file():
        return "the broker's own folder is missing"
    try:
        config = load_config(home / "broker.toml")
        signing = load_private_key(home / config.signing_key)
    except SealwrightError as error:
        return error.what
    if config.name != entry.name:
        return f"this is the folder of broker {config.name}, not of {entry.name}"
    if public_pem(signing) != entry.signing_key:
        return "the broker's signing key is not the one in the charter"
    return None


def _place_charter(kit: SignedKit, home: Path) -> None:
    own = home / ROOT
    if own.is_file() and own.read_bytes() != kit.root:
        raise KitRefused(
            "the broker's folder follows another charter than the kit's",
            where=str(own),
            do="Compare the charter's id with the members; a broker serves one charter for its whole life.",
        )
    if not own.is_file():
        write_secret(own, kit.root)
    there = _charter_at(home / "charter", kit.root)
    if there is None or there.version < kit.charter.version:
        write_store(home / "charter", kit.store)


def _charter_at(folder: Path, root: bytes) -> Charter | None:
    return current_charter(read_store(folder), root) if (folder / "metadata").is_dir() else None
