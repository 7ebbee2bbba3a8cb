"""The initrd: what runs before the root is verified, so it is kept small: busybox, dmsetup, drivers and one script.

It is made by the same strict archive writer that the virtual platform's folder images use, so it holds directories and
regular files alone; zstd of the tools tree packs it.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from attestation.evidence.cpio import Entry, write_archive
from cvm_image.build.errors import BuildFailed, UnusableRecipe
from cvm_image.build.tools import Mount, Tools

_EMPTY = ("dev", "layers/base", "layers/workload", "proc", "root", "run", "sys")
_PROGRAMS = {"bin/busybox": "usr/bin/busybox", "sbin/dmsetup": "usr/sbin/dmsetup"}
ROOT_MODULES = ("virtio_blk", "dm_mod", "dm_verity", "erofs", "overlay")
"""What opening the root needs; a recipe's drivers come after these."""
_MAX_MODULE = 64 << 20


@dataclass(frozen=True)
class LoadableModule:
    """A kernel module, unpacked. `optional`: the guest starts even where the kernel refuses it (no such hardware)."""

    name: str
    data: bytes
    optional: bool


def module_index(modules_dep: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Read `modules.dep`: module name → its path, and the names of the modules that it needs."""
    index: dict[str, tuple[str, tuple[str, ...]]] = {}
    for line in modules_dep.splitlines():
        path, _, needs = line.partition(":")
        index[module_name(path)] = (path, tuple(module_name(one) for one in needs.split()))
    return index


def module_name(path: str) -> str:
    """`kernel/drivers/md/dm-verity.ko.xz` → `dm_verity`, as the kernel names it."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def loading_order(
    wanted: Sequence[str], index: dict[str, tuple[str, tuple[str, ...]]], built_in: set[str]
) -> list[str]:
    """Return the names of `wanted` and of all they need, each after what it needs; built-in ones are left out.

    Raises UnusableRecipe for a module that this kernel does not have.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in built_in:
            return
        if name not in index:
            raise UnusableRecipe(
                f"the kernel has no module {name}", where="kernel.modules", do="Correct the recipe's modules."
            )
        for need in reversed(index[name][1]):
            visit(need)
        if name not in order:
            order.append(name)

    for name in wanted:
        visit(name.replace("-", "_"))
    return order


def pick_modules(kernel: Path, wanted: Sequence[str], optional: Iterable[str]) -> list[LoadableModule]:
    """Unpack the wanted modules of the kernel package laid out at `kernel` (after depmod), in loading order."""
    folder = modules_folder(kernel)
    index = module_index((folder / "modules.dep").read_text())
    built_in = {module_name(line) for line in (folder / "modules.builtin").read_text().split()}
    spared = {name.replace("-", "_") for name in optional}
    picked = []
    for name in loading_order(wanted, index, built_in):
        path = folder / index[name][0]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, _MAX_MODULE)
        picked.append(LoadableModule(name, data, name in spared))
    return picked


def modules_folder(kernel: Path) -> Path:
    """The one folder of modules in a kernel package. Raises BuildFailed if there is not exactly one."""
    found = [*kernel.glob("usr/lib/modules/*/"), *kernel.glob("lib/modules/*/")]
    if len(found) != 1:
        raise BuildFailed(
            f"the kernel package holds {len(found)} folders of modules", where=str(kernel), do="Name another package."
        )
    return found[0]


def make_initrd(tools: Tools, modules: Sequence[LoadableModule]) -> bytes:
    """Return the packed initrd."""
    entries = [Entry(name, None) for name in _EMPTY]
    script = resources.files("cvm_image.build").joinpath("guest", "initrd-init").read_bytes()
    entries.append(Entry("init", script, executable=True))
    for name, source in _PROGRAMS.items():
        entries.append(Entry(name, (tools.tree / source).read_bytes(), executable=True))
    for library in _libraries(tools, "/usr/sbin/dmsetup"):
        path = tools.tree / library.lstrip("/")
        entries.append(Entry(library.lstrip("/"), path.read_bytes(), executable=True))
    order = []
    for number, module in enumerate(modules):
        file = f"{number:03d}-{module.name}.ko"
        entries.append(Entry(f"modules/{file}", module.data))
        order.append(f"{'optional' if module.optional else 'needed'} {file}\n")
    entries.append(Entry("modules/order", "".join(order).encode()))
    return _pack(tools, write_archive(entries))


def _libraries(tools: Tools, program: str) -> list[str]:
    listing = tools.run(["ldd", program], what=f"asking what {program} needs", timeout=60)
    return sorted(set(re.findall(r"(/\S+\.so\S*)", listing)))


def _pack(tools: Tools, archive: bytes) -> bytes:
    folder = tools.log.parent / f"{tools.log.stem}.initrd"
    folder.mkdir()
    try:
        (folder / "initrd.cpio").write_bytes(archive)
        tools.run(
            ["zstd", "-q", "-19", "-T1", "--check", "/build/here/initrd.cpio", "-o", "/build/here/initrd"],
            what="packing the initrd",
            mounts=(Mount(folder, "/build/here", writable=True),),
            timeout=300,
        )
        return (folder / "initrd").read_bytes()
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
