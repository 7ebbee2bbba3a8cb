"""Somebody at the host tries every way into a booted guest: ports, the emulator's monitor, the serial console.

The guest's role is made a willing one: it answers on ports that the recipe does not open.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from building import build_or_skip, copy_recipe
from one_broker import free_port

from attestation.evidence.report import Product
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import create_vendor
from cvm_image.build.launching import boot_command, find_tools
from cvm_image.build.store import Store, default_cache
from cvm_image.qemu import Machine, running
from cvm_image.signing import create_signing_keys

pytestmark = pytest.mark.long

PROBE = Path(__file__).resolve().parent / "probe"
OPEN, CLOSED, DENIED = 8443, (2222, 5900, 8444, 9999), (22, 23, 80)
"""The port that the recipe lets in; some that it does not, on all of which the role answers; some that it may not."""
BOOT_SECONDS = 240.0
TYPED = b"\r\nroot\r\n\x03\x04\x1a\x1c\r\nsh\r\necho $((6*7))x\r\ncat /etc/passwd\r\n\x1bc\x01c"
"""What is typed, again and again from the first second: names, commands, interrupts, QEMU's own escape."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ways-in")
    recipe = copy_recipe(PROBE, "probe", folder / "recipe")
    return build_or_skip(recipe, folder / "probe", create_signing_keys(folder / "keys"))


@contextmanager
def started(image: Path, folder: Path, forwards: dict[int, int]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The probe under `seal vm boot`, listening on all of the ports; its process and console."""
    vendor = create_vendor(folder / "vendor", [Product.MILAN], at=datetime.now(UTC))
    create_chip(vendor, folder / "chip", Product.MILAN, at=datetime.now(UTC))
    (folder / "init-data.toml").write_text(f'version = 1\nname = "probe"\nlisten = {[OPEN, *CLOSED, *DENIED]}\n')
    command = [sys.executable, "-m", "appliance.cli", "vm", "boot", str(image), "--memory", "512"]
    command += ["--init-data", str(folder / "init-data.toml"), "--vendor", str(folder / "vendor")]
    command += ["--chip", str(folder / "chip"), "--run", str(folder / "run")]
    for guest, host in forwards.items():
        command += ["--forward", f"{host}:{guest}"]
    console = folder / "console.log"
    with console.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + BOOT_SECONDS
        while b'"listening"' not in console.read_bytes():
            gone = process.poll() is not None or time.monotonic() > deadline
            assert not gone, console.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        yield process, console
    finally:
        process.terminate()
        process.wait(30)


def said_by(port: int, send: bytes = b"") -> bytes:
    """What answers at a port of this host within a few seconds; nothing if the way leads nowhere."""
    said = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(5)
        said = connection.recv(64)
        if send:
            connection.sendall(send)
    return said


def listening_below(pid: int) -> dict[str, list[str]]:
    """Where the processes from `pid` down listen: TCP ports, and the names of UNIX sockets."""
    below = [pid]
    for one in below:
        with suppress(OSError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                below += map(int, children.read_text().split())
    inodes = set()
    for one in below:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{one}/fd").iterdir():
                with suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    tcp = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {
        "tcp": sorted(str(int(row[1].rpartition(":")[2], 16)) for row in tcp if row[3] == "0A" and row[9] in inodes),
        "unix": sorted(Path(row[7]).name for row in unix if row[3] == "00010000" and row[6] in inodes and len(row) > 7),
    }


def test_only_the_recipe_s_port_answers_and_the_emulator_has_no_door(image: Path, tmp_path: Path) -> None:
    forwards = {guest: free_port() for guest in (OPEN, *CLOSED, *DENIED)}
    with started(image, tmp_path, forwards) as (process, console):
        told = next(line for line in console.read_text().splitlines() if line.startswith('{"listening"'))
        heard = json.loads(told)
        assert sorted(heard["listening"]) == sorted(f"tcp {port}" for port in (OPEN, *CLOSED))
        assert heard["denied"] == list(DENIED)
        assert said_by(forwards[OPEN]) == b"port 8443 answers"
        shut = (*CLOSED, *DENIED)
        assert {port: said_by(forwards[port]) for port in shut} == dict.fromkeys(shut, b"")
        doors = listening_below(process.pid)
        assert doors["tcp"] == sorted(str(host) for host in forwards.values())
        assert doors["unix"] == ["port.sock"], "the virtual processor's port, and no monitor"
        said_by(forwards[OPEN], b"end")
        assert process.wait(60) == 0
    assert "Power down" in console.read_text(errors="replace")


def test_nobody_reads_what_is_typed_at_the_serial_console(image: Path, tmp_path: Path) -> None:
    """The serial port gets a keyboard, which no host of ours attaches; from boot to end it is never heeded."""
    store = Store(default_cache())
    tools = find_tools(store, log=store.logs / "tests.log")
    board = Machine(image=image, serial=tmp_path, memory_mib=512)
    run = tmp_path / "run"
    line = boot_command(tools, image, run, machine=board, init_data=b'version = 1\nname = "probe"\n')
    at = line.index("-serial")
    chardev = "socket,id=typed,path=/build/run/typed.sock,server=on,wait=on,logfile=/build/run/serial.log"
    line[at : at + 2] = ["-chardev", chardev, "-serial", "chardev:typed"]
    with running(line, serial=run / "serial.log", words=run / "qemu.log") as guest:
        deadline = time.monotonic() + BOOT_SECONDS
        while not (run / "typed.sock").exists():
            assert time.monotonic() < deadline, (run / "qemu.log").read_text()
            time.sleep(0.1)
        with socket.socket(socket.AF_UNIX) as keyboard:
            keyboard.connect(str(run / "typed.sock"))
            keyboard.settimeout(0.5)
            typed = 0
            while guest.process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    keyboard.sendall(TYPED)
                    typed += 1
                with suppress(OSError):
                    keyboard.recv(65536)
        console = guest.wait(within=5, what="ignoring a keyboard")
    assert typed > 5
    assert "sealwright: stopped: the host attached no virtio port" in console
    assert "Power down" in console
    assert "42x" not in console, "somebody did the sum"
    assert "root:x:0:0" not in console
    assert not re.search(r"login:|password:|^[#$] |BusyBox v", console, re.IGNORECASE | re.MULTILINE)
