"""Process 1 of a guest: close what a guest needs not, take what the host passes in, run the role, power off.

It never reads the console, starts no shell, and holds no secret: what it says on the serial console, the host may read.
The host chose init-data, disks and addresses; they earn nothing here, and attestation binds the first of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import tomllib
from ipaddress import IPv4Address
from pathlib import Path

from . import system
from .disks import find_disk, read_init_data
from .network import configure

RUN = Path("/run")
WORLD_FILE = Path("/etc/sealwright/attester")
RULES = "/etc/sealwright/nftables.conf"
PORT_NAME = "sealwright.port"
INIT_DATA_SERIAL = "initdata"
GRACE_SECONDS = 20.0
_PYTHON = "/usr/bin/python3"
_SEARCH = ("/usr/lib/sealwright/packages", "/usr/lib/sealwright/wheels", "/usr/lib/python3/dist-packages")


class Stop(Exception):
    """Why the guest does not go on; the sentence is its last on the serial console."""


def main() -> None:
    """Run the guest to its end and power off. Does not return."""
    say("first program of the verified root")
    try:
        status = live()
        say(f"the role ended with status {status}")
    except (Stop, OSError, ValueError, RuntimeError) as reason:
        say(f"stopped: {reason}")
    system.power_off()


def say(line: str) -> None:
    """Write one line to the serial console."""
    sys.stdout.write(f"sealwright: {line}\n")
    sys.stdout.flush()


def live() -> int:
    """Prepare the machine, start the role and wait for its end; return its exit status."""
    parameters = read_parameters(Path("/proc/cmdline").read_text())
    entry = parameters.get("sealwright.entry", "")
    if not entry:
        raise Stop("the command line names no entry")
    world = WORLD_FILE.read_text().strip()
    system.mount_volatile()
    system.restrict_kernel()
    system.load_packet_filter(RULES)
    init_data = read_init_data(find_disk(INIT_DATA_SERIAL))
    write_secret(RUN / "init-data.toml", init_data)
    server = nfs_server(init_data)
    if server is not None:
        system.allow_nfs_server(server)
    configure(say)
    port = RUN / "port.sock"
    if world == "virtual":
        from .relay import Relay, find_port  # an image for hardware does not hold this module

        Relay(port, find_port(PORT_NAME)).start()
    write_boot(port)
    child = os.fork()
    if child == 0:
        become_role(entry)
    return reap(child)


def read_parameters(cmdline: str) -> dict[str, str]:
    """The `name=value` words of the measured command line. Raises Stop for one of ours that is there twice."""
    parameters: dict[str, str] = {}
    for word in cmdline.split():
        name, _, value = word.partition("=")
        if name in parameters and name.startswith(("sealwright.", "roothash")):
            raise Stop(f"{name} is on the command line twice")
        parameters[name] = value
    return parameters


def nfs_server(init_data: bytes) -> IPv4Address | None:
    """The NFS server that the init-data name, if any: the one that the packet filter lets the kernel speak to.

    The role's program reads init-data strictly. Raises ValueError for what names no server in its form.
    """
    try:
        table = tomllib.loads(init_data.decode()).get("user_data", {})
    except RecursionError:
        raise ValueError("the init-data are nested too deeply") from None
    named = table.get("server") if isinstance(table, dict) else None
    if named is None:
        return None
    if not isinstance(named, str):
        raise ValueError("the init-data's NFS server is no text")
    return IPv4Address(named)


def write_boot(port: Path) -> None:
    """Write what the role's program reads about its start (the form of the virtual platform's `boot.json`)."""
    words = [word for word in Path("/proc/cmdline").read_text().split() if word.startswith(("sealwright.", "roothash"))]
    disks = {name: str(path) for name, path in system.disks_by_serial().items() if name not in _OWN_DISKS}
    boot = {"cmdline": " ".join(words), "init_data": "run/init-data.toml", "port": str(port), "disks": disks}
    write_secret(RUN / "boot.json", json.dumps(boot).encode())


_OWN_DISKS = frozenset({"rootfs", "verity", INIT_DATA_SERIAL})


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that root alone may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def become_role(entry: str) -> None:
    """In the child: shed what the role needs not, and run its module as a program of its own. Does not return."""
    try:
        os.setsid()
        system.shed_rights()
        program = (
            "import sys, importlib; from pathlib import Path; "
            f"sys.path[:0] = {list(_SEARCH)!r}; "
            f"sys.exit(importlib.import_module({entry!r}).main(Path('/')))"
        )
        environment = {
            "HOME": "/run",
            "LANG": "C.UTF-8",
            "PATH": "/usr/bin:/usr/sbin",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": "/tmp",  # noqa: S108 - a memory-backed mount of this guest's own
        }
        os.execve(_PYTHON, [_PYTHON, "-IS", "-c", program], environment)  # noqa: S606 - no shell: that is the point
    except (OSError, RuntimeError) as error:
        say(f"stopped: the role cannot be started: {error}")
    finally:
        os._exit(127)


def reap(child: int) -> int:
    """Collect every process that ends; when the role does, end the rest and return the role's exit status."""
    while True:
        ended, status = os.wait()
        if ended == child:
            break
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)
        deadline = time.monotonic() + (GRACE_SECONDS if number == signal.SIGTERM else 2.0)
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.05)
            except ChildProcessError:
                break
    return os.waitstatus_to_exitcode(status)
