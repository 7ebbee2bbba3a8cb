"""Starting an image under QEMU of the tools tree: which paths it sees, and where its console goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cvm_image.build.errors import UnusableHost
from cvm_image.build.store import Store
from cvm_image.build.tools import Mount, Tools
from cvm_image.qemu import Guest, Machine, place_hash_table, running, virtual_command

_IMAGE, _RUN, _DISKS = Path("/work/image"), Path("/work/run"), Path("/work/disks")


def find_tools(store: Store, *, log: Path) -> Tools:
    """The newest tools tree of the cache. Raises UnusableHost if there is none."""
    made = [path for path in (store.root / "made").iterdir() if (path / "usr/bin/qemu-system-x86_64").is_file()]
    if not made:
        raise UnusableHost(
            "there is no tools tree with QEMU in the cache",
            where=str(store.root),
            do="Build an image: seal image build.",
        )
    return Tools(max(made, key=lambda path: path.stat().st_mtime), log)


@contextlib.contextmanager
def booted(
    tools: Tools,
    image: Path,
    run: Path,
    *,
    machine: Machine | None = None,
    disks: Mapping[str, Path] | None = None,
    table_of: Path | None = None,
    table: bool = True,
    kvm: bool = False,
) -> Iterator[Guest]:
    """Start the image on the virtual platform and yield the running guest; it is ended when the block is left.

    `run` is a folder for this run: `serial.log` is the guest's console, `qemu.log` QEMU's own words. `machine` gives
    memory, processors, network and port (paths of its own are ignored), `disks` more disks by serial. The hash table is
    that of the image's own files; `table_of` takes that of another image's, and `table` False gives none, as a host may
    try.
    """
    run.mkdir(parents=True, exist_ok=True)
    serial, words = run / "serial.log", run / "qemu.log"
    serial.unlink(missing_ok=True)
    address = place_hash_table(table_of or image, run / "hashes.bin")
    if not table:
        (run / "hashes.bin").write_bytes(bytes((run / "hashes.bin").stat().st_size))
    named = disks or {}
    wanted = replace(
        machine or Machine(image=_IMAGE, serial=_RUN / serial.name),
        image=_IMAGE,
        serial=_RUN / serial.name,
        disks={name: _DISKS / name for name in named},
    )
    mounts = [Mount(image.resolve(), str(_IMAGE)), Mount(run.resolve(), str(_RUN), writable=True)]
    mounts += [
        Mount(path.resolve(), str(_DISKS / name), writable=name not in wanted.readonly) for name, path in named.items()
    ]
    if kvm:
        mounts.append(Mount(Path("/dev/kvm"), "/dev/kvm", writable=True))
    line = virtual_command(
        wanted,
        cmdline=(image / "cmdline").read_text("ascii"),
        hash_table=_RUN / "hashes.bin",
        table_address=address,
        kvm=kvm,
    )
    with running(tools.command(line, mounts, network=wanted.network != "none"), serial=serial, words=words) as guest:
        yield guest
