"""What a guest's role can see and do. Made by the tests, and by nobody else.

With init-data of a charter it is the service of a guest that attests at real brokers (appliance.node); with others it
makes each attempt that should fail and tells the outcome as one JSON line, or reads a data volume.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from appliance import node
from appliance.user_data import PURPOSE, opened_user_data
from appliance.user_data_export import MOUNT_POINT
from attestation.attester.boot import Boot, read_boot
from policies.errors import SealwrightError
from policies.init_data import DataExport, InitData


def main(guest: Path) -> int:
    """Be an attested guest, or read a data volume, or tell everything, as the init-data say."""
    boot = read_boot(guest)
    wishes = tomllib.loads(boot.init_data.decode())
    if "charter" in wishes:
        node.SERVICES["server"] = serve
        return node.main(guest)
    if "user_data" in wishes:
        return read_user_data(boot, wishes["user_data"])
    if "listen" in wishes:
        return listen(wishes["listen"])
    nonce = hashlib.sha512(boot.init_data).digest()
    evidence = boot.attester().evidence(nonce)
    told = {
        "init_data": boot.init_data.decode(),
        "disks": sorted(boot.disks),
        "data": {name: path.read_bytes()[:16].hex() for name, path in boot.disks.items()},
        "report": base64.b64encode(evidence.report).decode(),
        "certificates": base64.b64encode(evidence.certificates).decode(),
        "attempts": {name: outcome(attempt) for name, attempt in ATTEMPTS.items()},
        "processes": sorted(processes()),
        "listening": listening(),
        "writable": [line.split()[1] for line in mounts() if line.split()[2] not in VOLATILE and writable(line)],
        "lockdown": Path("/sys/kernel/security/lockdown").read_text().strip(),
        "capabilities": next(line.split()[1] for line in status() if line.startswith("CapBnd")),
        "new_privileges": next(line.split()[1] for line in status() if line.startswith("NoNewPrivs")),
    }
    sys.stdout.write(json.dumps({"probe": told}) + "\n")
    sys.stdout.flush()
    return 0


def serve(init: InitData, boot: Boot, lease: node.Lease, keys: Mapping[str, bytes], stop: threading.Event) -> None:
    """The service: tell digests of the keys, keep a record in the vault, then do as the host's disk `wish` says."""
    wish = boot.disks["wish"].read_bytes().strip(b"\0").decode().split()
    told: dict[str, Any] = {"keys": {purpose: hashlib.sha256(key).hexdigest() for purpose, key in keys.items()}}
    if lease.vault is not None:
        record = lease.vault.folder / "record"
        if not record.exists():
            record.write_bytes(b"Jane Roe, born 1970-01-01\n" * 200_000)
            (lease.vault.folder / "model").write_bytes(struct.pack("<1000f", *(1 / (3 + n) for n in range(1000))) * 50)
        told["record"] = hashlib.sha256(record.read_bytes()).hexdigest()
    node.say("probe", **told)
    if init.user_data is not None:
        with node.opened_volume(init, boot, lease, keys[PURPOSE]) as (folder, _):
            node.say("volume", attempts=attempts_at(init.user_data, folder), listening=listening())
            if "slow" in wish:
                time.sleep(15)
            node.say("read", files=read_files(folder))
    if "late" in wish:
        node.say("late", digest=hashlib.sha256(Path("/usr/lib/sealwright/late").read_bytes()).hexdigest())
    if "stay" in wish:
        stop.wait()
    if "hang" in wish:
        threading.Event().wait()


def listen(ports: list[int]) -> int:
    """Answer on these ports, as a role might that was taken over, until one connection says so."""
    ended = threading.Event()
    denied: list[int] = []

    def answer(server: socket.socket, port: int) -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                connection.sendall(b"port %d answers" % port)
                if connection.recv(3) == b"end":
                    ended.set()

    for port in ports:
        try:
            server = socket.create_server(("0.0.0.0", port))  # noqa: S104 - every way in is tried
        except PermissionError:
            denied.append(port)
        else:
            threading.Thread(target=answer, args=(server, port), daemon=True).start()
    sys.stdout.write(json.dumps({"listening": listening(), "denied": denied}) + "\n")
    sys.stdout.flush()
    ended.wait(120)
    return 0


def read_user_data(boot: Boot, wanted: dict[str, Any]) -> int:
    """Open the data volume under the key that stands in this test's init-data, read every file, tell how it went."""
    told: dict[str, Any] = {}
    try:
        with opened_user_data(boot.disks["user-data"], bytes.fromhex(wanted["key"])) as (folder, header):
            told["generation"] = header.generation
            told["attempts"] = {
                "write": outcome(lambda: (folder / "new").write_bytes(b"x")),
                "write disk": outcome(partial(write_disk, boot.disks["user-data"])),
            }
            told["files"] = read_files(folder)
        told["left"] = sorted(path.name for path in Path("/dev/mapper").glob("user-data*"))
    except SealwrightError as error:
        told["refused"] = error.what
    sys.stdout.write(json.dumps({"user_data": told}) + "\n")
    sys.stdout.flush()
    return 0


def read_files(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, or how reading it ended."""
    return {
        path.relative_to(folder).as_posix(): outcome(partial(digest, path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def attempts_at(export: DataExport, folder: Path) -> dict[str, str]:
    """What may not be done to a volume on an export, nor with the way to its server."""
    there = MOUNT_POINT / export.path.rpartition("/")[2]
    return {
        "write": outcome(lambda: (folder / "new").write_bytes(b"x")),
        "write device": outcome(partial(write_disk, Path("/dev/loop0"))),
        "write export": outcome(lambda: there.write_bytes(b"x")),
        "make on export": outcome(lambda: there.with_name("new").write_bytes(b"x")),
        "another port of the server": outcome(partial(connect, export.server, 2050)),
        "another server": outcome(partial(connect, "10.0.2.3", 2049)),
    }


def connect(address: str, port: int) -> object:
    """Connect to somebody."""
    with socket.socket() as connection:
        connection.settimeout(2)
        return connection.connect((address, port))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


VOLATILE = {"tmpfs", "devtmpfs", "proc", "sysfs", "devpts", "cgroup2", "configfs", "securityfs", "mqueue"}


def outcome(attempt: Callable[[], object]) -> str:
    """How an attempt ended: the error's name, or what it got."""
    try:
        return f"done: {attempt()}"
    except (OSError, ImportError) as error:
        return type(error).__name__ if not isinstance(error, OSError) else f"errno {error.errno}"


def write_root() -> object:
    """Change a file of the verified root."""
    return Path("/etc/passwd").write_text("x")


def write_disk(device: Path = Path("/dev/vda")) -> object:
    """Write to a disk; that of the root, if none is named."""
    with device.open("r+b") as disk:
        return disk.write(b"x")


def load_module() -> object:
    """init_module(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(175, b"x" * 64, 64, b"") != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "loaded"


def write_memory() -> object:
    """Open the machine's memory."""
    with Path("/dev/mem").open("r+b") as memory:
        return len(memory.read(1))


def run_from_tmp() -> object:
    """Run a program that was written at run time."""
    path = Path("/tmp/program")  # noqa: S108
    path.write_text("#!/usr/bin/python3\n")
    path.chmod(0o755)
    os.posix_spawn(path, [str(path)], {})
    return "ran"


def start_shell() -> object:
    """Start any shell."""
    for shell in ("/bin/sh", "/bin/bash", "/bin/dash", "/bin/busybox"):
        if Path(shell).exists():
            return shell
    raise FileNotFoundError(2, "no shell")


def connect_elsewhere() -> object:
    """Connect to a port that the recipe does not name."""
    return connect("10.0.2.2", 22)


def set_clock() -> object:
    """Set the system's clock."""
    return time.clock_settime(time.CLOCK_REALTIME, 0)


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write root": write_root,
    "write disk": write_disk,
    "load module": load_module,
    "write memory": write_memory,
    "run from tmp": run_from_tmp,
    "start shell": start_shell,
    "connect elsewhere": connect_elsewhere,
    "set clock": set_clock,
}


def processes() -> list[str]:
    """Every process that is no kernel thread."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[0]:
                found.append(words[0].decode())
    return found


def listening() -> list[str]:
    """Local ports in the state LISTEN, and all UDP ports."""
    found = []
    for table, states in (("tcp", {"0A"}), ("udp", {"07"})):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] in states:
                found.append(f"{table} {int(fields[1].rpartition(':')[2], 16)}")
    return found


def mounts() -> list[str]:
    """The mount table."""
    return Path("/proc/mounts").read_text().splitlines()


def writable(line: str) -> bool:
    """Whether a mount is read-write."""
    return "rw" in line.split()[3].split(",")


def status() -> list[str]:
    """What the kernel says of this process."""
    return Path("/proc/self/status").read_text().splitlines()
