"""A guest of the virtual platform that is a booted machine: the platform's chip, port and measurement around QEMU.

What was measured is what boots: the measured files are read once, and QEMU gets copies of those very bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attestation.virtual.launch import KERNEL_HEADER
from attestation.virtual.platform import Machine, Program, run_program
from cvm_image.build.image import new_log
from cvm_image.build.launching import boot_command, find_tools
from cvm_image.build.store import Store, default_cache
from cvm_image.build.tools import Tools
from cvm_image.qemu import VAULT, Forward
from cvm_image.qemu import Machine as Board

DEFAULT_MEMORY_MIB = 3072


def is_bootable(kernel: bytes) -> bool:
    """Whether a kernel is one that boots (the others are started as processes, by the virtual platform itself)."""
    return not kernel.startswith(KERNEL_HEADER)


def cached_tools(cache: Path | None = None) -> Tools:
    """The tools tree with QEMU, from the image cache (default: the user's). Raises UnusableHost if there is none."""
    store = Store(default_cache() if cache is None else cache)
    return find_tools(store, log=new_log(store, "boot"))


def run_booted_guest(
    machine: Machine,
    image: Path,
    run: Path,
    *,
    tools: Tools,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    network: Literal["none", "user"] = "user",
    restricted: bool = False,
    forwards: tuple[Forward, ...] = (),
    disks: Mapping[str, Path] | None = None,
    kvm: bool = False,
) -> int:
    """Boot the image of `machine` under QEMU in the folder `run`, serve its port, and return QEMU's exit status.

    The guest's serial console is this process's standard output. `disks` are shown to the guest by serial, read-only
    but for the one that is its sealed volume (VAULT).
    `restricted` closes QEMU's network but for the `forwards`, each a port of the host's loopback that leads in.
    """

    def prepare() -> Program:
        copies = run / "measured"
        copies.mkdir(exist_ok=True)
        measured = {
            "firmware.fd": machine.files.firmware,
            "kernel": machine.files.kernel,
            "initrd": machine.files.initrd,
            "cmdline": machine.files.cmdline,
        }
        for name, content in measured.items():
            (copies / name).write_bytes(content)
        named = dict(disks or {})
        command = boot_command(
            tools,
            copies,
            run,
            machine=Board(
                image=image,
                serial=run,
                port=run,
                memory_mib=memory_mib,
                vcpus=machine.settings.vcpus,
                network=network,
                restricted=restricted,
                forwards=forwards,
                readonly=frozenset(named) - {VAULT},
            ),
            files={name: image / name for name in ("rootfs.erofs", "rootfs.verity")},
            disks=named,
            init_data=machine.init_data,
            console=Path("/dev/stdout"),
            kvm=kvm,
        )
        return Program(tuple(command), run, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})

    return run_program(machine, run, prepare)
