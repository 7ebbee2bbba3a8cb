"""Starting an image under QEMU of the tools tree: which paths it sees, and where its console goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cvm_image.build.errors import UnusableHost
from cvm_image.build.guest.disks import write_init_data
from cvm_image.build.store import Store
from cvm_image.build.tools import Mount, Tools
from cvm_image.qemu import Guest, Machine, place_hash_table, running, virtual_command

SEEN = ("firmware.fd", "kernel", "initrd", "rootfs.erofs", "rootfs.verity")
"""The files of an image that QEMU opens."""
INIT_DATA = "initdata"
"""Serial of the disk that carries init-data."""

_IMAGE, _RUN, _DISKS = Path("/build/image"), Path("/build/run"), Path("/build/disks")
_KVM = Path("/dev/kvm")


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


def boot_command(
    tools: Tools,
    image: Path,
    run: Path,
    *,
    machine: Machine | None = None,
    files: Mapping[str, Path] | None = None,
    disks: Mapping[str, Path] | None = None,
    init_data: bytes | None = None,
    table_of: Path | None = None,
    table: bool = True,
    console: Path | None = None,
    kvm: bool = False,
) -> list[str]:
    """Return the command line that starts the image on the virtual platform; `run` takes this run's files.

    `machine` gives memory, processors and network (paths of its own are ignored, but that it has a port: that is then
    `run`/port.sock). `files` are copies to use in place of the image's own; `disks` more disks by serial; `init_data`
    become a disk as the guest looks for it. The hash table is that of the image's own files; `table_of` takes that of
    another image's, and `table` False gives none, as a host may try. The console goes to `console`, if that is given,
    else to `run`/serial.log.
    """
    run.mkdir(parents=True, exist_ok=True)
    address = place_hash_table(table_of or image, run / "hashes.bin")
    if not table:
        (run / "hashes.bin").write_bytes(bytes((run / "hashes.bin").stat().st_size))
    named = dict(disks or {})
    wanted = machine or Machine(image=_IMAGE, serial=_RUN)
    readonly = wanted.readonly
    if init_data is not None:
        (run / "init-data.disk").write_bytes(write_init_data(init_data))
        named[INIT_DATA] = run / "init-data.disk"
        readonly |= {INIT_DATA}
    wanted = replace(
        wanted,
        image=_IMAGE,
        serial=_RUN / "serial.log" if console is None else console,
        disks={name: _DISKS / name for name in named},
        readonly=readonly,
        port=None if wanted.port is None else _RUN / "port.sock",
    )
    own = {name: image / name for name in SEEN} | dict(files or {})
    mounts = [Mount(path.resolve(), str(_IMAGE / name)) for name, path in own.items()]
    mounts.append(Mount(run.resolve(), str(_RUN), writable=True))
    mounts += [Mount(path.resolve(), str(_DISKS / name), writable=name not in readonly) for name, path in named.items()]
    if kvm:
        mounts.append(Mount(_KVM, str(_KVM), writable=True))
    line = virtual_command(
        wanted,
        cmdline=(image / "cmdline").read_text("ascii"),
        hash_table=_RUN / "hashes.bin",
        table_address=address,
        kvm=kvm,
    )
    return tools.command(line, mounts, network=wanted.network != "none")


@contextlib.contextmanager
def booted(
    tools: Tools,
    image: Path,
    run: Path,
    *,
    machine: Machine | None = None,
    disks: Mapping[str, Path] | None = None,
    init_data: bytes | None = None,
    table_of: Path | None = None,
    table: bool = True,
) -> Iterator[Guest]:
    """Start the image by `boot_command` and yield the running guest; it is ended when the block is left.

    `run`/serial.log is the guest's console, `run`/qemu.log takes QEMU's own words.
    """
    line = boot_command(
        tools, image, run, machine=machine, disks=disks, init_data=init_data, table_of=table_of, table=table
    )
    serial = run / "serial.log"
    serial.unlink(missing_ok=True)
    with running(line, serial=serial, words=run / "qemu.log") as guest:
        yield guest
