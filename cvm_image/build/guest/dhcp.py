"""A DHCP client that asks for what a guest uses: address, network, gateway (RFC 2131, RFC 2132). Nothing else is read.

Answers come from the host or anyone on its network: they are parsed within bounds, and only well-formed ones count.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

_REQUEST, _REPLY = 1, 2
_COOKIE = b"\x63\x82\x53\x63"
_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
_BROADCAST = 0x8000
_DISCOVER, _OFFER, _ASK, _ACK = 1, 2, 3, 5
_MASK, _ROUTER, _WANTED, _KIND, _SERVER, _PARAMETERS, _END = 1, 3, 50, 53, 54, 55, 255
TRIES = 5
ANSWER_SECONDS = 4.0


@dataclass(frozen=True)
class Lease:
    """What the server gave: the guest's address, the network it is in, and the gateway, if any."""

    address: IPv4Address
    network: IPv4Network
    gateway: IPv4Address | None


@dataclass(frozen=True)
class Answer:
    """A server's well-formed answer to us."""

    kind: int
    address: IPv4Address
    options: dict[int, bytes]


def message(kind: int, transaction: int, hardware: bytes, options: dict[int, bytes]) -> bytes:
    """Return a request of `kind` from the interface with this hardware address (6 bytes)."""
    zero = bytes(4)
    header = _HEADER.pack(_REQUEST, 1, 6, 0, transaction, 0, _BROADCAST, zero, zero, zero, zero, hardware, b"", b"")
    listed = {_KIND: bytes([kind]), **options, _PARAMETERS: bytes([_MASK, _ROUTER])}
    return header + _COOKIE + b"".join(bytes([code, len(value)]) + value for code, value in listed.items()) + b"\xff"


def parse_answer(raw: bytes, transaction: int, hardware: bytes) -> Answer | None:
    """Read an answer, or return None if it is not a well-formed one to this transaction and interface."""
    if len(raw) < _HEADER.size + 4 or raw[_HEADER.size : _HEADER.size + 4] != _COOKIE:
        return None
    operation, kind, length, _, number, _, _, _, yours, _, _, address, _, _ = _HEADER.unpack_from(raw)
    if (operation, kind, length, number, address[:6]) != (_REPLY, 1, 6, transaction, hardware):
        return None
    options: dict[int, bytes] = {}
    position = _HEADER.size + 4
    while position < len(raw) and raw[position] != _END:
        if raw[position] == 0:
            position += 1
            continue
        if position + 2 > len(raw) or position + 2 + raw[position + 1] > len(raw):
            return None
        options.setdefault(raw[position], raw[position + 2 : position + 2 + raw[position + 1]])
        position += 2 + raw[position + 1]
    if position >= len(raw) or len(options.get(_KIND, b"")) != 1:
        return None
    return Answer(options[_KIND][0], IPv4Address(yours), options)


def lease_of(answer: Answer) -> Lease | None:
    """The lease in an answer, or None if mask or gateway make no sense."""
    mask = answer.options.get(_MASK, b"")
    router = answer.options.get(_ROUTER, b"")
    if len(mask) != 4:
        return None
    try:
        network = IPv4Network(f"{answer.address}/{IPv4Address(mask)}", strict=False)
    except ValueError:
        return None
    if answer.address.is_unspecified or answer.address.is_multicast or answer.address.is_loopback:
        return None
    gateway = IPv4Address(router[:4]) if len(router) >= 4 else None
    if gateway is not None and gateway not in network:
        gateway = None
    return Lease(answer.address, network, gateway)


def ask_for_lease(interface: str, hardware: bytes) -> Lease:
    """Ask on `interface`, at most `TRIES` times. Raises RuntimeError if no server gives an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        handle.bind(("0.0.0.0", 68))  # noqa: S104 - the interface has no address yet; it is bound to the device
        for _ in range(TRIES):
            transaction = int.from_bytes(os.urandom(4), "big")
            handle.sendto(message(_DISCOVER, transaction, hardware, {}), ("255.255.255.255", 67))
            offer = _wait(handle, transaction, hardware, _OFFER)
            if offer is None or len(offer.options.get(_SERVER, b"")) != 4:
                continue
            chosen = {_WANTED: offer.address.packed, _SERVER: offer.options[_SERVER]}
            handle.sendto(message(_ASK, transaction, hardware, chosen), ("255.255.255.255", 67))
            granted = _wait(handle, transaction, hardware, _ACK)
            lease = lease_of(granted) if granted is not None else None
            if lease is not None:
                return lease
    raise RuntimeError(f"no DHCP server gave {interface} an address in {TRIES} tries")


def _wait(handle: socket.socket, transaction: int, hardware: bytes, kind: int) -> Answer | None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        handle.settimeout(left)
        try:
            raw = handle.recv(2048)
        except TimeoutError:
            return None
        answer = parse_answer(raw, transaction, hardware)
        if answer is not None and answer.kind == kind:
            return answer
    return None
