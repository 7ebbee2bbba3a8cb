"""The platform process: it launches one guest, answers its report requests, and ends with it.

The guest is a child in a session of its own that is killed if this process dies; when the guest ends, so does this
process, with the guest's exit status. A guest inherits nothing: its environment is fixed, its standard input empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from attestation.errors import PlatformUnusable
from attestation.virtual.chip import Chip
from attestation.virtual.folders import write_file
from attestation.virtual.launch import (
    LaunchSettings,
    MeasuredFiles,
    guest_command_line,
    launch,
    unpack_guest,
)
from attestation.virtual.port import Port, bind_port
from attestation.virtual.processor import LaunchContext, report_for

GRACE_SECONDS = 5.0
"""How long a guest may take to end after SIGTERM before it is killed."""

PORT = "port.sock"
"""The socket in the run folder by which the guest reaches its secure processor."""

_PR_SET_PDEATHSIG = 1
_STATE_FILE = "platform.json"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest is launched on and with: a chip, the measured files, init-data, and how the host starts it.

    `certificates` is the host's certificate table; `disks` maps names to files that the guest is shown.
    """

    chip: Chip
    certificates: bytes
    files: MeasuredFiles
    init_data: bytes
    settings: LaunchSettings = field(default_factory=LaunchSettings)
    disks: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Program:
    """A process that is, or holds, the guest: what is executed, where, and its whole environment."""

    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str]


def run_guest(machine: Machine, run: Path, *, keep: bool = False) -> int:
    """Launch the guest of `machine` as a process in the folder `run`, serve it, and return its exit status.

    The measured archive is unpacked and its first program started. A guest ended by a signal gives 128 and the signal's
    number. SIGTERM and SIGINT end the guest. `run` must be new, empty, or left by an earlier run; what was unpacked in
    it is removed at the end unless `keep`.
    """
    run = run.absolute()
    guest = run / "guest"

    def prepare() -> Program:
        init = unpack_guest(machine.files, guest)
        _hand_over(machine, run, guest)
        return Program((sys.executable, "-I", str(init), str(guest)), guest, guest_environment(guest))

    try:
        return run_program(machine, run, prepare)
    finally:
        if not keep:
            shutil.rmtree(guest, ignore_errors=True)


def run_program(machine: Machine, run: Path, prepare: Callable[[], Program]) -> int:
    """Launch the guest of `machine` in the program that `prepare` names, serve its port, and return its exit status.

    The general form of `run_guest`: an emulator that boots the same image reaches the port at `run`/port.sock as well.
    """
    run = run.absolute()  # the guest has a working directory of its own
    context = launch(machine.files, machine.settings, machine.init_data, os.urandom(32))
    with _run_folder(run):
        try:
            _write_state(machine, context, run)
            program = prepare()
            return asyncio.run(_serve(machine, context, run, program))
        finally:
            (run / PORT).unlink(missing_ok=True)


async def _serve(machine: Machine, context: LaunchContext, run: Path, program: Program) -> int:
    port = Port(lambda data, vmpl: report_for(machine.chip, context, data, vmpl), machine.certificates)
    server = await asyncio.start_unix_server(port.handle, sock=bind_port(run / PORT))
    loop = asyncio.get_running_loop()
    asked_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    try:
        child = await asyncio.create_subprocess_exec(
            *program.command,
            stdin=asyncio.subprocess.DEVNULL,
            cwd=program.folder,
            env=dict(program.environment),
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        port.admit(child.pid)
        try:
            status = await _end_of(child, asked_to_end)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    finally:
        server.close()
    return status if status >= 0 else 128 - status


def guest_environment(guest: Path) -> dict[str, str]:
    """Return the whole environment of a guest: the host's own would be an unmeasured input."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(guest / "run"),
        "TMPDIR": str(guest / "run"),
        "LANG": "C.UTF-8",
    }


async def _end_of(child: asyncio.subprocess.Process, asked_to_end: asyncio.Event) -> int:
    """Wait for the guest's end; once asked, end it by SIGTERM, and by SIGKILL after the grace time."""
    end = asyncio.ensure_future(child.wait())
    asked = asyncio.ensure_future(asked_to_end.wait())
    await asyncio.wait((end, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not end.done():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        await asyncio.wait((end,), timeout=GRACE_SECONDS)
        if not end.done():
            sys.stderr.write(f"virtual: the guest did not end within {GRACE_SECONDS:g} seconds and is killed\n")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return await end


def _die_with_parent() -> Callable[[], None]:
    """Return what the child runs before exec: the kernel is to kill it when this process dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def before_exec() -> None:
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
            os._exit(127)

    return before_exec


def _hand_over(machine: Machine, run: Path, guest: Path) -> None:
    """Write what the host passes in: init-data, and the boot parameters with the port and the disks."""
    inside = guest / "run"
    if inside.exists():
        raise PlatformUnusable("the archive holds a folder `run`", where="initrd", do="Make the image again.")
    inside.mkdir(mode=0o700)
    write_file(inside / "init-data.toml", machine.init_data)
    boot = {
        "cmdline": guest_command_line(machine.files),
        "init_data": "run/init-data.toml",
        "port": str(run / PORT),
        "disks": {name: str(path.absolute()) for name, path in machine.disks.items()},
    }
    write_file(inside / "boot.json", json.dumps(boot, indent=2).encode() + b"\n")


def _write_state(machine: Machine, context: LaunchContext, run: Path) -> None:
    """Leave beside the guest what was launched, for whoever watches it."""
    state = {
        "platform": "virtual",
        "product": machine.chip.product.value,
        "chip_id": machine.chip.chip_id.hex(),
        "measurement": context.measurement.hex(),
        "host_data": context.host_data.hex(),
        "policy": f"{context.policy:#x}",
        "process": os.getpid(),
    }
    write_file(run / _STATE_FILE, json.dumps(state, indent=2).encode() + b"\n")


@contextlib.contextmanager
def _run_folder(run: Path) -> Iterator[None]:
    """Claim `run` for this process: new or empty, or what an earlier platform process left behind."""
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlatformUnusable(
                "another guest runs in this folder", where=str(run), do="Give each its own."
            ) from None
        ours = (run / _STATE_FILE).is_file()
        if not ours and any(run.iterdir()):
            raise PlatformUnusable(
                "the run folder holds files of something else", where=str(run), do="Give a new or empty folder."
            )
        if ours:
            shutil.rmtree(run / "guest", ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
