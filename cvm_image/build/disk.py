"""The root as the guest's disk: one EROFS a layer, one after the other in one file, and one dm-verity tree over both.

The base layer comes first, so that a new workload is appended to a base that was packed long ago. The guest lays the
workload over the base by overlayfs, read-only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.errors import BuildFailed
from cvm_image.build.tools import Mount, Tools

BLOCK = 4096
SECTOR = 512
SALT = hashlib.sha256(b"sealwright dm-verity").hexdigest()
"""Fixed: a salt would only make the same tree look different."""
_NAMESPACE = uuid.UUID("5ea1ed00-0000-5000-8000-000000000001")


@dataclass(frozen=True)
class Root:
    """What the guest must know to open its root: blocks of data, verity's root hash, and where the workload begins."""

    blocks: int
    root_hash: str
    offset: int
    length: int

    def argument(self) -> str:
        """The words of the command line from which the initrd makes the device tables (offset, length in sectors)."""
        layers = f"{self.blocks}:{self.offset}:{self.length}"
        return f"roothash={self.root_hash} sealwright.salt={SALT} sealwright.layers={layers}"


_ARGUMENT = re.compile(
    r"(?:^| )roothash=(?P<hash>[0-9a-f]{64}) sealwright\.salt=(?P<salt>[0-9a-f]{64})"
    r" sealwright\.layers=(?P<blocks>[1-9]\d{0,11}):(?P<offset>[1-9]\d{0,14}):(?P<length>[1-9]\d{0,14})(?= |$)"
)


def read_argument(cmdline: str) -> Root | None:
    """The root that a command line names, or None if it does not name exactly one in this form."""
    found = list(_ARGUMENT.finditer(cmdline))
    if len(found) != 1 or found[0]["salt"] != SALT or cmdline.count("roothash=") != 1:
        return None
    one = found[0]
    return Root(int(one["blocks"]), one["hash"], int(one["offset"]), int(one["length"]))


def make_layer(tools: Tools, tree: Path, target: Path, *, name: str, epoch: int, all_root: bool) -> None:
    """Pack the tree as an EROFS file. `name` gives it its UUID."""
    out = target.parent
    argv = [
        "mkfs.erofs",
        "--quiet",
        "-zlz4hc",
        "-C65536",
        f"-T{epoch}",
        f"-U{uuid.uuid5(_NAMESPACE, name)}",
        "--workers=2",
        *(["--all-root"] if all_root else []),
        f"/build/out/{target.name}",
        "/build/tree",
    ]
    mounts = (Mount(tree, "/build/tree"), Mount(out, "/build/out", writable=True))
    tools.run(argv, what=f"packing the {name} layer", mounts=mounts, timeout=1200)
    size = target.stat().st_size
    if size % BLOCK:
        with target.open("ab") as file:
            file.write(bytes(BLOCK - size % BLOCK))


def join_layers(tools: Tools, base: Path, workload: Path, folder: Path) -> Root:
    """Write `rootfs.erofs` and `rootfs.verity` into `folder`."""
    rootfs = folder / "rootfs.erofs"
    shutil.copyfile(base, rootfs)
    with rootfs.open("ab") as target, workload.open("rb") as source:
        shutil.copyfileobj(source, target, 1 << 20)
    output = tools.run(
        [
            "veritysetup",
            "format",
            f"--salt={SALT}",
            f"--uuid={uuid.uuid5(_NAMESPACE, 'verity')}",
            "/build/out/rootfs.erofs",
            "/build/out/rootfs.verity",
        ],
        what="hashing the root",
        mounts=(Mount(folder, "/build/out", writable=True),),
        timeout=600,
    )
    match = re.search(r"^Root hash:\s+([0-9a-f]{64})$", output, re.MULTILINE)
    if match is None:
        raise BuildFailed("veritysetup named no root hash", where=str(tools.log), do="Read the log.")
    base_size = base.stat().st_size
    return Root(
        blocks=rootfs.stat().st_size // BLOCK,
        root_hash=match.group(1),
        offset=base_size // SECTOR,
        length=workload.stat().st_size // SECTOR,
    )
