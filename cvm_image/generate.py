"""Generating an image folder whose guest runs as a process of the virtual platform.

The folder has every file of a booted image, and the same measurement, signatures and checks; its kernel and firmware
are generated blobs, and its archive holds the guest's Python sources and the program that starts them.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from attestation.evidence.cpio import Entry, write_archive
from attestation.evidence.id_block import IdBlock, encode_id_block, key_digest, sign_id_block
from attestation.evidence.launch import command_line, measure_launch
from cvm_image.errors import UnusableImage
from cvm_image.firmware import generate_firmware
from cvm_image.manifest import MANIFEST, ImageManifest, Measurement, Vmm, sign_manifest
from cvm_image.packages import Platform, SourceTree, collect, guest_packages
from cvm_image.rootfs import make_rootfs, make_verity
from cvm_image.sbom import make_sbom, read_lock, runtime_closure
from cvm_image.signing import SigningKeys

FILES = (
    "kernel",
    "initrd",
    "cmdline",
    "rootfs.erofs",
    "rootfs.verity",
    "firmware.fd",
    "sbom.cdx.json",
    "id-block",
    "id-auth",
)
"""The files of an image folder beside its manifest."""

KERNEL = b"Sealwright virtual kernel 1\ninit=/init\n"
"""The whole virtual kernel: its platform starts the named program of the archive as a process."""

FAMILY_ID = b"Sealwright"
POLICY = 0x30000
DEFAULT_ENTRY = "appliance.node"
_PROJECT = Path(__file__).resolve().parents[1]
_CMDLINE = "console=ttyS0 panic=-1 lockdown=integrity ro"


@dataclass(frozen=True, slots=True)
class LaunchGrid:
    """Every combination of these is measured, and gets an ID block."""

    vcpu_models: tuple[str, ...] = ("EPYC-v4",)
    vcpus: tuple[int, ...] = (2,)
    vmms: tuple[Vmm, ...] = ("qemu",)
    guest_features: tuple[int, ...] = (0x1,)


def generate_image(
    folder: Path,
    *,
    name: str,
    keys: SigningKeys,
    platform: Platform = "virtual",
    packages: Sequence[SourceTree | Path] | None = None,
    entry: str = DEFAULT_ENTRY,
    svn: int = 1,
    grid: LaunchGrid | None = None,
    policy: int = POLICY,
    lock: Path = _PROJECT / "constraints.txt",
) -> ImageManifest:
    """Write an image to `folder` (made if missing) and return its manifest.

    `packages` are the sources of the guest (default: ours for this `platform`), `entry` the module of them whose
    `main(guest)` runs, `lock` the pinned dependencies that the image names, `grid` the vCPU settings to measure. The
    same arguments give the same bytes. Raises UnusableImage if one of them cannot be used, ToolFailed if a tool fails.
    """
    sources = collect(guest_packages(platform) if packages is None else packages)
    if f"{entry.replace('.', '/')}.py" not in sources and f"{entry.replace('.', '/')}/__init__.py" not in sources:
        raise UnusableImage(f"the entry {entry} is in none of the packages", where="entry", do="Name a module of them.")
    locked = _read(lock)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".image-", dir=folder) as scratch:
        files = _make_files(Path(scratch), name, platform, sources, entry, locked)
        manifest = _describe(files, name, platform, entry, svn, grid or LaunchGrid(), policy, locked, keys)
        files[MANIFEST] = sign_manifest(manifest, keys.builder)
        for file, content in files.items():
            made = Path(scratch) / file
            made.write_bytes(content)
            made.chmod(0o644)
        for file in files:
            (Path(scratch) / file).replace(folder / file)
    return manifest


def archive_entries(platform: Platform, sources: dict[str, bytes]) -> list[Entry]:
    """Return what the measured archive of an image holds: the first program, the attester's world, the sources."""
    init = _read(Path(__file__).resolve().parent / "guest/init.py")
    return [
        Entry("init", init, executable=True),
        Entry("etc/sealwright/attester", platform.encode() + b"\n"),
        *(Entry(f"lib/{path}", content) for path, content in sources.items()),
    ]


def _make_files(
    scratch: Path, name: str, platform: Platform, sources: dict[str, bytes], entry: str, locked: bytes
) -> dict[str, bytes]:
    """Return the image's files, all but the ID blocks and the manifest."""
    version = metadata.version("sealwright")
    os_release = (
        f'NAME="Sealwright"\nID=sealwright\nVERSION_ID={version}\nIMAGE_ID={name}\nVARIANT_ID={platform}\n'.encode()
    )
    rootfs, verity = scratch / "rootfs.erofs", scratch / "rootfs.verity"
    make_rootfs(
        {
            "etc/os-release": os_release,
            "usr/lib/os-release": os_release,
            "usr/share/sealwright/constraints.txt": locked,
        },
        rootfs,
    )
    root = make_verity(rootfs, verity)
    cmdline = f"{_CMDLINE} {root.parameters()} sealwright.entry={entry}".encode("ascii")
    command_line(cmdline)
    return {
        "firmware.fd": generate_firmware(),
        "kernel": KERNEL,
        "initrd": write_archive(archive_entries(platform, sources)),
        "cmdline": cmdline,
        "rootfs.erofs": rootfs.read_bytes(),
        "rootfs.verity": verity.read_bytes(),
        "sbom.cdx.json": make_sbom(name, version, runtime_closure(read_lock(locked)), sources),
    }


def _describe(
    files: dict[str, bytes],
    name: str,
    platform: Platform,
    entry: str,
    svn: int,
    grid: LaunchGrid,
    policy: int,
    locked: bytes,
    keys: SigningKeys,
) -> ImageManifest:
    """Measure the files, add their ID blocks to them, and return the manifest over all."""
    measurements = measure_grid(files, grid)
    image_id = hashlib.sha256(name.encode()).digest()[:16]
    family_id = FAMILY_ID.ljust(16, b"\0")
    blocks = [
        encode_id_block(IdBlock(bytes.fromhex(value.measurement), family_id, image_id, svn, policy))
        for value in measurements
    ]
    files["id-block"] = b"".join(blocks)
    files["id-auth"] = b"".join(sign_id_block(block, keys.id_key, keys.author_key) for block in blocks)
    cmdline = dict(word.partition("=")[::2] for word in files["cmdline"].decode("ascii").split())
    return ImageManifest(
        name=name,
        platform=platform,
        entry=entry,
        svn=svn,
        family_id=family_id.hex(),
        image_id=image_id.hex(),
        policy=policy,
        root_hash=cmdline["roothash"],
        lock_sha256=hashlib.sha256(locked).hexdigest(),
        id_key_digest=key_digest(keys.id_key.public_key()).hex(),
        author_key_digest=None if keys.author_key is None else key_digest(keys.author_key.public_key()).hex(),
        measurements=measurements,
        files={file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    )


def measure_grid(files: dict[str, bytes], grid: LaunchGrid) -> list[Measurement]:
    """Return the launch measurement of an image's `files` for every combination of the grid, in its order."""
    return [
        Measurement(
            measurement=measure_launch(
                firmware=files["firmware.fd"],
                kernel=files["kernel"],
                initrd=files["initrd"],
                cmdline=files["cmdline"],
                vcpu_model=model,
                vcpus=vcpus,
                vmm=vmm,
                guest_features=features,
            ).hex(),
            vcpu_model=model,
            vcpus=vcpus,
            vmm=vmm,
            guest_features=features,
        )
        for vmm in grid.vmms
        for model in grid.vcpu_models
        for vcpus in grid.vcpus
        for features in grid.guest_features
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableImage(f"{path.name} cannot be read", where=str(path), do="Check the path.") from error
