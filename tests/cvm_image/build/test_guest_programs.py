"""The guest's own programs, on what a host may hand them."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import tty
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvm_image.build.guest import dhcp, disks, network, system
from cvm_image.build.guest.first import Stop, nfs_server, read_parameters
from cvm_image.build.guest.relay import HEADER, MAX_FRAME, Relay

HARDWARE = bytes.fromhex("525400123456")
TRANSACTION = 0x01020304


def answer(kind: int = 5, address: str = "10.0.2.15", **options: bytes) -> bytes:
    asked = dhcp.message(kind, TRANSACTION, HARDWARE, {})
    listed = {53: bytes([kind]), 1: bytes([255, 255, 255, 0]), 3: bytes([10, 0, 2, 2]), 54: bytes([10, 0, 2, 2])}
    listed |= {int(name[1:]): value for name, value in options.items()}
    body = b"".join(bytes([code, len(value)]) + value for code, value in listed.items())
    return b"\x02" + asked[1:16] + IPv4Address(address).packed + asked[20:240] + body + b"\xff"


def test_an_address_is_taken_from_a_well_formed_answer() -> None:
    read = dhcp.parse_answer(answer(), TRANSACTION, HARDWARE)
    assert read is not None
    lease = dhcp.lease_of(read)
    assert lease is not None
    assert (str(lease.address), str(lease.network), str(lease.gateway)) == ("10.0.2.15", "10.0.2.0/24", "10.0.2.2")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        answer()[:200],
        answer()[:-1],
        answer().replace(b"\x63\x82\x53\x63", b"\x63\x82\x53\x64"),
        b"\x01" + answer()[1:],
        answer()[:-1] + b"\x2b\xff",
    ],
)
def test_another_answer_is_none(raw: bytes) -> None:
    assert dhcp.parse_answer(raw, TRANSACTION, HARDWARE) is None


def test_an_answer_to_somebody_else_is_none() -> None:
    assert dhcp.parse_answer(answer(), TRANSACTION + 1, HARDWARE) is None
    assert dhcp.parse_answer(answer(), TRANSACTION, bytes(6)) is None


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("0.0.0.0", {}),  # noqa: S104 - what a hostile server may give
        ("127.0.0.1", {}),
        ("224.0.0.1", {}),
        ("10.0.2.15", {"o1": b"\xff\xff\xff"}),
        ("10.0.2.15", {"o1": b"\xff\x00\xff\x00"}),
    ],
)
def test_an_address_that_makes_no_sense_is_no_lease(address: str, options: dict[str, bytes]) -> None:
    read = dhcp.parse_answer(answer(address=address, **options), TRANSACTION, HARDWARE)
    assert read is not None
    assert dhcp.lease_of(read) is None


def test_a_gateway_outside_the_network_is_left_out() -> None:
    read = dhcp.parse_answer(answer(o3=bytes([8, 8, 8, 8])), TRANSACTION, HARDWARE)
    assert read is not None
    lease = dhcp.lease_of(read)
    assert lease is not None
    assert lease.gateway is None


@given(st.binary(max_size=600))
def test_no_bytes_from_the_network_break_the_client(raw: bytes) -> None:
    for candidate in (raw, answer()[:240] + raw):
        read = dhcp.parse_answer(candidate, TRANSACTION, HARDWARE)
        if read is not None:
            dhcp.lease_of(read)


@given(st.binary(min_size=1, max_size=3000))
def test_init_data_come_back_as_they_were_written(content: bytes) -> None:
    raw = disks.write_init_data(content)
    assert len(raw) % 512 == 0
    path = Path(f"/tmp/init-data-{os.getpid()}")  # noqa: S108 - one file of this process, reused by every example
    path.write_bytes(raw)
    try:
        assert disks.read_init_data(path) == content
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(512),
        b"SEALINIT" + (0).to_bytes(4, "big") + bytes(500),
        b"SEALINIT" + (501).to_bytes(4, "big") + bytes(500),
        b"SEALINIT" + (65537).to_bytes(4, "big") + bytes(66000),
        b"SEALINIT" + (4).to_bytes(4, "big") + b"datax" + bytes(495),
    ],
)
def test_a_disk_of_another_form_holds_no_init_data(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "disk").write_bytes(raw)
    with pytest.raises(ValueError, match="init-data"):
        disks.read_init_data(tmp_path / "disk")


def test_init_data_of_no_or_too_many_bytes_are_not_written() -> None:
    for content in (b"", bytes(disks.MAX_INIT_DATA + 1)):
        with pytest.raises(ValueError, match="bytes"):
            disks.write_init_data(content)


def test_our_words_of_the_command_line_are_there_once() -> None:
    assert read_parameters("quiet a=1 a=2 sealwright.entry=x\n")["sealwright.entry"] == "x"
    with pytest.raises(Stop, match=r"sealwright\.entry is on the command line twice"):
        read_parameters("sealwright.entry=x sealwright.entry=y")
    with pytest.raises(Stop, match="roothash"):
        read_parameters("roothash=x roothash=y")


def test_the_route_has_the_kernels_size() -> None:
    assert struct.calcsize(network._ROUTE) == 120


def test_everything_that_can_be_written_to_is_memory_without_programs() -> None:
    for _, target, kind, flags, _ in system.VOLATILE:
        assert kind in {"tmpfs", "devpts", "cgroup2"}
        assert flags & 2, target
        if kind == "tmpfs":
            assert flags & 14 == 14, target
    assert 16 not in system.KEPT_CAPABILITIES  # CAP_SYS_MODULE
    assert 17 not in system.KEPT_CAPABILITIES  # CAP_SYS_RAWIO


@pytest.fixture
def port(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A relay before a terminal that stands in for the virtio port; the other end is the host's."""
    host, guest = os.openpty()
    tty.setraw(guest)
    tty.setraw(host)
    relay = Relay(tmp_path / "port.sock", Path(os.ttyname(guest)))
    thread = threading.Thread(target=relay.serve)
    thread.start()
    yield tmp_path / "port.sock", host
    relay.close()
    thread.join(timeout=5)
    os.close(host)
    os.close(guest)


def ask(path: Path, raw: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(raw)
        received = b""
        while more := connection.recv(65536):
            received += more
            if len(received) >= HEADER.size and len(received) == HEADER.size + HEADER.unpack(received[:4])[0]:
                break
        return received


def test_a_request_goes_up_and_its_answer_comes_down(port: tuple[Path, int]) -> None:
    path, host = port
    seen = []

    def play_host() -> None:
        for number in range(2):
            seen.append(os.read(host, 4096))
            os.write(host, HEADER.pack(3) + b"yes" if number else HEADER.pack(2) + b"no")

    thread = threading.Thread(target=play_host)
    thread.start()
    assert ask(path, HEADER.pack(5) + b"first") == HEADER.pack(2) + b"no"
    assert ask(path, HEADER.pack(6) + b"second") == HEADER.pack(3) + b"yes"
    thread.join(timeout=5)
    assert seen == [HEADER.pack(5) + b"first", HEADER.pack(6) + b"second"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("raw", [HEADER.pack(0), HEADER.pack(MAX_FRAME + 1)])
def test_a_frame_out_of_bounds_is_not_passed(port: tuple[Path, int], raw: bytes) -> None:
    path, _ = port
    assert ask(path, raw) == b""


def test_the_one_nfs_server_is_that_of_the_init_data() -> None:
    assert nfs_server(b'[user_data]\nserver = "192.0.2.7"\npath = "/exports/volume"\n') == IPv4Address("192.0.2.7")
    assert nfs_server(b'name = "site"\n') is None


@pytest.mark.parametrize("named", ['"192.0.2.7, 192.0.2.8"', '"192.0.2.0/24"', '"nfs.example"', "7", '["192.0.2.7"]'])
def test_what_names_no_server_ends_the_guest(named: str) -> None:
    with pytest.raises(ValueError, match=r"ctet|server|'/'"):
        nfs_server(f"[user_data]\nserver = {named}\n".encode())


@given(st.text(max_size=60))
def test_no_server_s_name_reaches_the_packet_filter_but_an_address(name: str) -> None:
    quoted = json.dumps(name)
    try:
        found = nfs_server(f"[user_data]\nserver = {quoted}\n".encode())
    except ValueError:
        return
    assert found == IPv4Address(name)
