"""The port's protocol: one guest, one request, bounded in bytes and time; whatever else arrives gets a sentence."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import stat
import threading
import tty
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from attestation.attester.virtual_port import HEADER, MAX_FRAME, VirtualPort, find_virtio_port, short_path
from attestation.errors import AttesterUnavailable, PlatformUnusable
from attestation.evidence.report import Product, parse_report
from attestation.virtual import port as port_module
from attestation.virtual.chip import Chip
from attestation.virtual.port import Port, bind_port
from attestation.virtual.processor import LaunchContext, report_for

CONTEXT = LaunchContext(measurement=b"m" * 48, host_data=b"h" * 32, report_id=b"r" * 32)


@pytest.fixture
def port_of(virtual_chips: dict[Product, Chip], tmp_path: Path) -> Callable[..., Any]:
    """Serve a port to this process's own session, call the function in a thread beside it, and return what it gave."""

    def served(client: Callable[[Path], Any], *, admitted: bool = True) -> Any:
        return asyncio.run(serve(client, admitted))

    async def serve(client: Callable[[Path], Any], admitted: bool) -> Any:
        chip = virtual_chips[Product.MILAN]
        port = Port(lambda data, vmpl: report_for(chip, CONTEXT, data, vmpl), b"table")
        if admitted:
            port.admit(os.getsid(0))
        path = tmp_path / "port.sock"
        server = await asyncio.start_unix_server(port.handle, sock=bind_port(path))
        async with server:
            return await asyncio.to_thread(client, path)

    return served


def exchange(raw: bytes) -> Callable[[Path], dict[str, str]]:
    """Return a client that sends `raw` and reads one answer."""

    def client(path: Path) -> dict[str, str]:
        with socket.socket(socket.AF_UNIX) as connection, short_path(path) as name:
            connection.settimeout(10)
            connection.connect(name)
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while part := connection.recv(65536):
                received += part
        assert int.from_bytes(received[:4], "big") == len(received) - 4
        answer = json.loads(received[4:])
        assert isinstance(answer, dict)
        return answer

    return client


def frame(document: object) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return HEADER.pack(len(body)) + body


def test_the_attester_gets_a_report_over_its_data(port_of: Callable[..., Any]) -> None:
    evidence = port_of(lambda path: VirtualPort(path).evidence(b"d" * 64))
    report = parse_report(evidence.report)
    assert (report.report_data, report.measurement, report.vmpl) == (b"d" * 64, b"m" * 48, 0)
    assert evidence.certificates == b"table"


@pytest.mark.parametrize("vmpl", [0, 1, 3])
def test_a_guest_may_ask_for_a_lesser_privilege(port_of: Callable[..., Any], vmpl: int) -> None:
    answer = port_of(exchange(frame({"report_data": "00" * 64, "vmpl": vmpl})))
    assert parse_report(base64.b64decode(answer["report"])).vmpl == vmpl


@pytest.mark.parametrize(
    "request_",
    [
        b"{",
        b"",
        b"\xff" * 40,
        b"[1]",
        {},
        {"report_data": "00" * 64},
        {"report_data": "00" * 63, "vmpl": 0},
        {"report_data": "0G" * 64, "vmpl": 0},
        {"report_data": "AB" * 64, "vmpl": 0},
        {"report_data": "00" * 64, "vmpl": 4},
        {"report_data": "00" * 64, "vmpl": -1},
        {"report_data": "00" * 64, "vmpl": "0"},
        {"report_data": "00" * 64, "vmpl": True},
        {"report_data": "00" * 64, "vmpl": 0, "measurement": "00"},
    ],
)
def test_another_request_gets_a_sentence(port_of: Callable[..., Any], request_: object) -> None:
    assert set(port_of(exchange(frame(request_)))) == {"error"}


def test_an_oversized_request_is_refused_before_it_is_read(port_of: Callable[..., Any]) -> None:
    answer = port_of(exchange(HEADER.pack(MAX_FRAME + 1)))
    assert "larger than" in answer["error"]


def test_a_request_that_does_not_arrive_is_dropped_in_time(
    port_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_module, "REQUEST_SECONDS", 0.2)

    def client(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            connection.sendall(HEADER.pack(100) + b"half")
            try:
                return connection.recv(1)
            except ConnectionResetError:
                return b""

    assert port_of(client) == b""


def test_a_slow_client_does_not_keep_the_guest_from_its_report(port_of: Callable[..., Any]) -> None:
    def client(path: Path) -> Any:
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(str(path))
            slow.sendall(HEADER.pack(100)[:2])
            slow.shutdown(socket.SHUT_WR)
            return VirtualPort(path, timeout=8).evidence(bytes(64))

    assert len(port_of(client).report) == 1184


def test_nobody_is_answered_before_the_guest_is_there(
    port_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_module, "REQUEST_SECONDS", 0.2)
    with pytest.raises(AttesterUnavailable):
        port_of(lambda path: VirtualPort(path, timeout=2).evidence(bytes(64)), admitted=False)


def test_a_guest_of_lower_privilege_gets_no_report_of_a_higher(virtual_chips: dict[Product, Chip]) -> None:
    context = LaunchContext(measurement=bytes(48), host_data=bytes(32), report_id=bytes(32), vmpl=2)
    with pytest.raises(PlatformUnusable, match="VMPL 2 may not have a report for VMPL 0"):
        report_for(virtual_chips[Product.MILAN], context, bytes(64), 0)


def answering(answer: bytes) -> Callable[[Path], Awaitable[asyncio.Server]]:
    """Return what starts a false platform that answers every request with these bytes."""

    async def start(path: Path) -> asyncio.Server:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(4)
            writer.write(answer)
            writer.close()

        return await asyncio.start_unix_server(handle, sock=bind_port(path))

    return start


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed in the middle"),
        (b"\0\0", "closed in the middle"),
        (HEADER.pack(1 << 31), "an answer of 2147483648 bytes"),
        (frame(b"not JSON"), "no JSON"),
        (frame([]), "no object"),
        (frame({"report": "AA=="}), "another form"),
        (frame({"report": 7, "certificates": ""}), "another form"),
        (frame({"report": "A", "certificates": ""}), "another form"),
        (frame({"report": "AAAA", "certificates": ""}), "another size"),
        (frame({"error": "no"}), "the virtual platform refused: no"),
    ],
)
def test_a_false_platform_gets_the_attester_a_sentence(tmp_path: Path, answer: bytes, words: str) -> None:
    async def run() -> None:
        server = await answering(answer)(tmp_path / "port.sock")
        async with server:
            await asyncio.to_thread(VirtualPort(tmp_path / "port.sock", timeout=3).evidence, bytes(64))

    with pytest.raises(AttesterUnavailable, match=words):
        asyncio.run(run())


def test_a_silent_platform_is_given_up(tmp_path: Path) -> None:
    with bind_port(tmp_path / "port.sock"), pytest.raises(AttesterUnavailable, match=r"no answer within 0\.2 seconds"):
        VirtualPort(tmp_path / "port.sock", timeout=0.2).evidence(bytes(64))


def test_a_missing_port_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="no connection"):
        VirtualPort(tmp_path / "none.sock").evidence(bytes(64))
    with pytest.raises(AttesterUnavailable, match="no connection"):
        VirtualPort(tmp_path / "none/none.sock").evidence(bytes(64))


def test_report_data_of_another_size_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        VirtualPort(tmp_path / "port.sock").evidence(bytes(63))


def test_one_connection_carries_many_requests(port_of: Callable[..., Any]) -> None:
    def client(path: Path) -> list[int]:
        sizes = []
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            for document in ({"report_data": "00" * 64, "vmpl": 0}, {}, {"report_data": "11" * 64, "vmpl": 0}):
                connection.sendall(frame(document))
                size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
                sizes.append(len(connection.recv(size, socket.MSG_WAITALL)))
        return sizes

    first, refused, second = port_of(client)
    assert first == second > refused


def test_connections_are_bounded(port_of: Callable[..., Any]) -> None:
    def client(path: Path) -> bytes:
        idle = [socket.socket(socket.AF_UNIX) for _ in range(port_module.MAX_CONNECTIONS)]
        try:
            for one in idle:
                one.connect(str(path))
            with socket.socket(socket.AF_UNIX) as more:
                more.settimeout(5)
                more.connect(str(path))
                return more.recv(4096)
        finally:
            for one in idle:
                one.close()

    assert b"connections already" in port_of(client)


def test_a_virtio_port_is_a_character_device_with_the_same_frames(virtual_chips: dict[Product, Chip]) -> None:
    """A pseudo-terminal in raw mode stands for the device: bytes both ways, and no end of file between requests."""
    report = report_for(virtual_chips[Product.MILAN], CONTEXT, b"d" * 64, 0)
    outer, inner = os.openpty()
    try:
        tty.setraw(inner)

        def platform() -> None:
            for _ in range(2):
                size = int.from_bytes(os.read(outer, 4), "big")
                request = b""
                while len(request) < size:
                    request += os.read(outer, size - len(request))
                assert json.loads(request)["report_data"] == "64" * 64
                answer = {"report": base64.b64encode(report).decode(), "certificates": ""}
                os.write(outer, frame(answer))

        thread = threading.Thread(target=platform)
        thread.start()
        port = VirtualPort(Path(os.ttyname(inner)), timeout=5)
        for _ in range(2):
            assert port.evidence(b"d" * 64).report == report
        thread.join(5)
        with pytest.raises(AttesterUnavailable, match="no answer within"):
            VirtualPort(Path(os.ttyname(inner)), timeout=0.1).evidence(bytes(64))
    finally:
        os.close(outer)
        os.close(inner)


def test_the_virtio_port_is_found_by_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("org.qemu.guest_agent.0", "sealwright.port")):
        (tmp_path / f"vport0p{number}").mkdir()
        (tmp_path / f"vport0p{number}/name").write_text(f"{name}\n")
    (tmp_path / "vport9p9").mkdir()
    assert find_virtio_port("sealwright.port", tmp_path) == Path("/dev/vport0p1")
    with pytest.raises(AttesterUnavailable, match="no virtio port"):
        find_virtio_port("sealwright.other", tmp_path)


def test_ports_bound_at_once_are_their_owners_alone_and_change_no_umask(tmp_path: Path) -> None:
    """A umask belongs to the whole process: set for one port, it would fall on what other threads make meanwhile."""

    def bind(number: int) -> None:
        for turn in range(50):
            bind_port(tmp_path / f"{number}-{turn}").close()

    before = os.umask(0o022)
    try:
        threads = [threading.Thread(target=bind, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 400
