"""The root file system of a generated image: EROFS with a dm-verity tree, the same bits every time.

It holds what says which software the image was made of: os-release and the dependency lock. A guest on the virtual
platform runs as a process, so that nothing is executed from it; its check is the real one all the same.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cvm_image.errors import ToolFailed
from cvm_image.tools import run_tool

EPOCH = 1577836800
"""Modification time of every file: 2020-01-01T00:00:00Z."""

FILESYSTEM_UUID = uuid.UUID("5ea15ea1-0000-4000-8000-000000000001")
VERITY_UUID = uuid.UUID("5ea15ea1-0000-4000-8000-000000000002")
_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class VerityRoot:
    """The root hash of a dm-verity tree (hex), with the salt (hex) and identity that it was made with."""

    root_hash: str
    salt: str
    identity: uuid.UUID

    def parameters(self) -> str:
        """Return the words of the kernel command line by which the guest finds its root."""
        return f"roothash={self.root_hash} sealwright.salt={self.salt} sealwright.uuid={self.identity}"


def make_rootfs(files: Mapping[str, bytes], target: Path) -> None:
    """Write an EROFS of `files` (relative path → content, all readable, owned by root) to `target`."""
    with tempfile.TemporaryDirectory(prefix="sealwright-root-") as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        for name, content in sorted(files.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        made = Path(scratch) / "rootfs.erofs"
        run_tool(
            [
                "mkfs.erofs",
                "--quiet",
                "-zlz4hc",
                "-x-1",
                f"-T{EPOCH}",
                f"-U{FILESYSTEM_UUID}",
                "--all-root",
                str(made),
                str(root),
            ],
            seconds=_SECONDS,
            environment={"SOURCE_DATE_EPOCH": str(EPOCH)},
        )
        shutil.copyfile(made, target)


def make_verity(rootfs: Path, target: Path) -> VerityRoot:
    """Write the dm-verity tree over `rootfs` to `target` and return its root.

    The salt is the digest of the file system: known to all, different for each image, the same in each build.
    """
    with rootfs.open("rb") as file:
        salt = hashlib.file_digest(file, "sha256").hexdigest()
    target.unlink(missing_ok=True)
    said = run_tool(
        [
            "veritysetup",
            "format",
            "--hash=sha256",
            "--data-block-size=4096",
            "--hash-block-size=4096",
            f"--salt={salt}",
            f"--uuid={VERITY_UUID}",
            str(rootfs),
            str(target),
        ],
        seconds=_SECONDS,
    )
    target.chmod(0o644)
    found = re.search(r"^Root hash:\s*([0-9a-f]{64})$", said, re.MULTILINE)
    if found is None:
        raise ToolFailed("veritysetup named no root hash", where=str(rootfs), do="Check its version (2.4 or later).")
    return VerityRoot(found[1], salt, VERITY_UUID)
