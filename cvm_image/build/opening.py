"""Opening a built image: the words of its command line, its initrd's entries, and its layers laid out as trees."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attestation.evidence.cpio import Entry, read_archive
from cvm_image.build.disk import SECTOR, Root, read_argument
from cvm_image.build.errors import BuildFailed, UnusableRecipe
from cvm_image.build.tools import Mount, Tools


@dataclass(frozen=True)
class Opened:
    """An image, opened: the words of its command line, the entries of its initrd, and its layers as trees."""

    folder: Path
    cmdline: str
    root: Root
    initrd: tuple[Entry, ...]
    base: Path
    workload: Path

    def find(self, name: str) -> Path | None:
        """The file at `name` in the root as the guest sees it: the workload's before the base's."""
        for layer in (self.workload, self.base):
            path = layer / name
            if path.is_symlink() or path.exists():
                return path
        return None

    def walk(self) -> Iterator[tuple[str, Path]]:
        """Every entry of both layers: its name in the root, and where it was laid out."""
        for layer in (self.base, self.workload):
            for folder, folders, files in os.walk(layer):
                for name in sorted([*folders, *files]):
                    path = Path(folder) / name
                    yield str(path.relative_to(layer)), path


@contextmanager
def opened(folder: Path, tools: Tools) -> Iterator[Opened]:
    """Lay the image in `folder` out in a scratch folder for as long as the block lasts.

    Raises UnusableRecipe if the folder holds no image of this kind, and BuildFailed if it cannot be opened.
    """
    cmdline = (folder / "cmdline").read_text("ascii", "replace")
    root = read_argument(cmdline)
    if root is None:
        raise UnusableRecipe(
            "the command line names no root in this build's form", where=str(folder), do="Name a built image."
        )
    with tempfile.TemporaryDirectory(prefix="opened-", dir=tools.log.parent) as name:
        yield _open(folder, cmdline, root, tools, Path(name))


def _open(folder: Path, cmdline: str, root: Root, tools: Tools, work: Path) -> Opened:
    shutil.copyfile(folder / "initrd", work / "initrd.zst")
    with (folder / "rootfs.erofs").open("rb") as disk:
        for name, start, size in (("base", 0, root.offset), ("workload", root.offset, root.length)):
            disk.seek(start * SECTOR)
            with (work / f"{name}.erofs").open("wb") as layer:
                _copy(disk.read, layer.write, size * SECTOR)
    mounts = (Mount(work, "/build/here", writable=True),)
    tools.run(
        ["zstd", "-q", "-d", "/build/here/initrd.zst", "-o", "/build/here/initrd"],
        what="opening the initrd",
        mounts=mounts,
    )
    for name in ("base", "workload"):
        tools.run(
            ["fsck.erofs", "--xattrs", f"--extract=/build/here/{name}", f"/build/here/{name}.erofs"],
            what=f"opening the {name} layer",
            mounts=mounts,
        )
        (work / f"{name}.erofs").unlink()
    entries = read_archive((work / "initrd").read_bytes())
    return Opened(folder, cmdline, root, entries, work / "base", work / "workload")


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], int], size: int) -> None:
    while size > 0:
        piece = read(min(size, 1 << 20))
        if not piece:
            raise BuildFailed(
                "the root is shorter than the command line says", where="rootfs.erofs", do="Build it again."
            )
        write(piece)
        size -= len(piece)
