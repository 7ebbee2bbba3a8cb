"""The guest's first program in an image for the virtual platform: check the root, then start the measured code.

It is `/init` of the measured archive and uses the standard library alone. It trusts the archive and the command line
(both are in the launch measurement) and nothing else: the root file system is checked against the root hash on the
command line before anything runs, and no module of ours can come from anywhere but the archive.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import struct
import sys
import uuid
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 4096
MAX_ROOT = 1 << 30
WORLD_FILE = "etc/sealwright/attester"


class Stop(Exception):
    """Why the guest does not start."""


def main(arguments: list[str]) -> int:
    """Check and start the guest unpacked in the folder that is the only argument; return its exit status."""
    if len(arguments) != 2:
        sys.stderr.write("init: stopped: it takes the guest's folder\n")
        return 2
    guest = Path(arguments[1]).resolve()
    try:
        if not sys.flags.isolated:
            raise Stop("the interpreter is not isolated from its host (python -I)")
        boot = read_boot(guest)
        parameters = read_command_line(boot["cmdline"])
        if not (guest / WORLD_FILE).is_file():
            raise Stop(f"the archive does not say which attester the guest uses ({WORLD_FILE})")
        check_root(Path(boot["disks"]["rootfs"]), Path(boot["disks"]["verity"]), parameters)
        use_measured_packages(guest / "lib")
        entry = import_entry(guest / "lib", parameters["sealwright.entry"])
    except Stop as reason:
        sys.stderr.write(f"init: stopped: {reason}\n")
        return 1
    status: int = entry.main(guest)
    return status


def read_boot(guest: Path) -> dict[str, Any]:
    """Return what the platform handed over, checked for the fields that are used here."""
    try:
        boot = json.loads((guest / "run/boot.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Stop(f"the boot parameters cannot be read ({error})") from error
    if (
        not isinstance(boot, dict)
        or not isinstance(boot.get("cmdline"), str)
        or not isinstance(boot.get("disks"), dict)
    ):
        raise Stop("the boot parameters lack the command line or the disks")
    for name in ("rootfs", "verity"):
        if not isinstance(boot["disks"].get(name), str):
            raise Stop(f"the disk {name} is missing")
    return boot


def read_command_line(text: str) -> dict[str, str]:
    """Return the `name=value` words of the measured command line, each name once."""
    parameters: dict[str, str] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name in parameters:
            raise Stop(f"{name} is on the command line twice")
        parameters[name] = value
    for name in ("roothash", "sealwright.salt", "sealwright.uuid", "sealwright.entry"):
        if not parameters.get(name):
            raise Stop(f"{name} is not on the command line")
    return parameters


def check_root(rootfs: Path, verity: Path, parameters: dict[str, str]) -> None:
    """Stop unless the root file system has the measured root hash, and the verity tree is exactly the one over it."""
    try:
        salt = bytes.fromhex(parameters["sealwright.salt"])
        identity = uuid.UUID(parameters["sealwright.uuid"])
        with rootfs.open("rb") as file:
            tree, root_hash = verity_tree(file, salt, identity)
        with verity.open("rb") as file:
            same = file.read(len(tree) + 1) == tree
    except ValueError as error:
        raise Stop(f"the verity parameters cannot be used ({error})") from error
    except OSError as error:
        raise Stop(f"a disk cannot be read ({error})") from error
    if root_hash != parameters["roothash"]:
        raise Stop("the root file system is not the one that the measured command line names (rootfs.erofs)")
    if not same:
        raise Stop("the verity tree is not the one over the measured root file system (rootfs.verity)")


def verity_tree(data: BinaryIO, salt: bytes, identity: uuid.UUID) -> tuple[bytes, str]:
    """Return the whole hash device over `data` as `veritysetup format` makes it, and the root hash in hex.

    dm-verity version 1, SHA-256, blocks of 4096 bytes (Linux, Documentation/admin-guide/device-mapper/verity.rst):
    a superblock, then the levels of digests from the top down, each block of digests padded with zeros.
    """
    hasher = hashlib.sha256(salt)
    level = bytearray()
    blocks = 0
    while block := data.read(BLOCK):
        blocks += 1
        if len(block) != BLOCK or blocks > MAX_ROOT // BLOCK:
            raise ValueError(f"the data are not 1 to {MAX_ROOT // BLOCK} whole blocks of {BLOCK} bytes")
        one = hasher.copy()
        one.update(block)
        level += one.digest()
    if not blocks:
        raise ValueError("the data are empty")
    levels: list[bytes] = []
    while len(level) > 32:
        level += bytes(-len(level) % BLOCK)
        levels.insert(0, bytes(level))
        above = bytearray()
        for start in range(0, len(level), BLOCK):
            one = hasher.copy()
            one.update(level[start : start + BLOCK])
            above += one.digest()
        level = above
    superblock = struct.pack(
        "<8sII16s32sIIQH6x256s",
        b"verity\0\0",
        1,
        1,
        identity.bytes,
        b"sha256",
        BLOCK,
        BLOCK,
        blocks,
        len(salt),
        salt,
    )
    return superblock.ljust(BLOCK, b"\0") + b"".join(levels), level.hex()


def use_measured_packages(lib: Path) -> None:
    """Make `lib` the only place that our packages can come from.

    The interpreter and third-party packages are the host's here (see docs/explanation/virtual-platform.md); but import
    hooks of an editable installation, and every path beside the interpreter's own, would reach unmeasured code of ours.
    """
    ours = measured_packages(lib)
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] in ours)
    if loaded:
        raise Stop(f"unmeasured code was loaded before the measured code: {', '.join(loaded)}")
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
    roots = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    kept = [path for path in sys.path if any(Path(path).resolve().is_relative_to(root) for root in roots)]
    sys.path[:] = [str(lib), *kept]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    for name in sorted(ours):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or not Path(found.origin).resolve().is_relative_to(lib):
            raise Stop(f"the package {name} would not come from the measured archive")


def measured_packages(lib: Path) -> set[str]:
    """Return the names of the packages in the archive."""
    try:
        names = {path.name for path in lib.iterdir() if path.is_dir()}
    except OSError as error:
        raise Stop("the archive holds no packages (lib)") from error
    if not names:
        raise Stop("the archive holds no packages (lib)")
    return names


def import_entry(lib: Path, name: str) -> Any:
    """Import the module whose `main(guest)` the guest runs, from the archive."""
    if name.partition(".")[0] not in measured_packages(lib):
        raise Stop(f"the entry {name} is not in the measured archive")
    try:
        entry = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Stop(f"the entry {name} cannot be imported: {error}") from error
    if not callable(getattr(entry, "main", None)):
        raise Stop(f"the entry {name} has no main(guest)")
    return entry


if __name__ == "__main__":
    sys.exit(main(sys.argv))
