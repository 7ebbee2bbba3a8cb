"""The first bytes of a TLS connection, read without taking them: which protocols a client offers, in which versions.

A ClientHello (RFC 8446, section 4.1.2) in one record of at most 16 KiB. Nothing of it is believed: it only decides
which server the connection is handed to, and that one terminates TLS. What TLS allows but no client of ours does, a
hello that spans several records, is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from fl.errors import MalformedMessage

RECORD_HEADER: Final = 5
MAX_HELLO: Final = RECORD_HEADER + (1 << 14)
"""Bytes of the largest ClientHello with its record header (RFC 8446, section 5.1)."""
MAX_EXTENSIONS: Final = 64
MAX_PROTOCOLS: Final = 16
TLS_1_3: Final = 0x0304
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SUPPORTED_VERSIONS: Final = 43
_ALPN: Final = 16


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client offers."""

    protocols: tuple[bytes, ...]
    """By ALPN (RFC 7301), in the client's order; empty if it names none."""
    versions: tuple[int, ...]
    """By supported_versions; empty if it does not have that extension, and so speaks at most TLS 1.2."""


def needed(head: bytes) -> int:
    """How many bytes have to be there before `read_client_hello` can read them; `head` is what is there.

    Raises MalformedMessage as soon as what is there cannot become a ClientHello.
    """
    if head[:1] not in (b"", bytes([_HANDSHAKE])):
        raise MalformedMessage("the connection does not begin with TLS", where="hello")
    if len(head) > 1 and head[1] != 3:
        raise MalformedMessage("the first record's version is not TLS's", where="hello")
    if len(head) < RECORD_HEADER:
        return RECORD_HEADER
    length = int.from_bytes(head[3:5], "big")
    if not 4 < length <= MAX_HELLO - RECORD_HEADER:
        raise MalformedMessage(f"the first record has {length} bytes", where="hello")
    if len(head) > RECORD_HEADER and head[RECORD_HEADER] != _CLIENT_HELLO:
        raise MalformedMessage("the first record holds no ClientHello", where="hello")
    return RECORD_HEADER + length


def read_client_hello(raw: bytes) -> ClientHello:
    """Read a whole ClientHello with its record header. Raises MalformedMessage for every deviation."""
    size = needed(raw)
    if len(raw) < size or size <= RECORD_HEADER:
        raise MalformedMessage("the ClientHello is not whole", where="hello")
    message = _Reader(raw[RECORD_HEADER:size])
    message.take(1)
    body = _Reader(message.vector(3))
    message.must_end()
    body.take(2 + 32)  # legacy_version, random
    if len(body.vector(1)) > 32:
        raise MalformedMessage("the session id is too long", where="hello")
    suites, compression = body.vector(2), body.vector(1)
    if not suites or len(suites) % 2 or not compression:
        raise MalformedMessage("the cipher suites or compression methods are none", where="hello")
    if body.at_end:
        return ClientHello((), ())
    extensions = _Reader(body.vector(2))
    body.must_end()
    found: dict[int, bytes] = {}
    while not extensions.at_end:
        kind = extensions.number(2)
        if kind in found or len(found) >= MAX_EXTENSIONS:
            raise MalformedMessage("an extension comes twice, or there are too many", where="hello")
        found[kind] = extensions.vector(2)
    return ClientHello(_protocols(found.get(_ALPN)), _versions(found.get(_SUPPORTED_VERSIONS)))


def _protocols(raw: bytes | None) -> tuple[bytes, ...]:
    if raw is None:
        return ()
    outer = _Reader(raw)
    names = _Reader(outer.vector(2))
    outer.must_end()
    protocols: list[bytes] = []
    while not names.at_end:
        name = names.vector(1)
        if not name or len(protocols) >= MAX_PROTOCOLS:
            raise MalformedMessage("a protocol's name is empty, or there are too many", where="hello")
        protocols.append(name)
    if not protocols:
        raise MalformedMessage("ALPN names no protocol", where="hello")
    return tuple(protocols)


def _versions(raw: bytes | None) -> tuple[int, ...]:
    if raw is None:
        return ()
    outer = _Reader(raw)
    listed = outer.vector(1)
    outer.must_end()
    if not listed or len(listed) % 2:
        raise MalformedMessage("supported_versions lists none", where="hello")
    return struct.unpack(f">{len(listed) // 2}H", listed)


class _Reader:
    """Takes fields from the front of bytes. Raises MalformedMessage where they end too early."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._raw)

    def take(self, count: int) -> bytes:
        piece = self._raw[self._at : self._at + count]
        if len(piece) != count:
            raise MalformedMessage("a field of the ClientHello is cut short", where="hello")
        self._at += count
        return piece

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def vector(self, width: int) -> bytes:
        """A field that its own length of `width` bytes precedes (RFC 8446, section 3.4)."""
        return self.take(self.number(width))

    def must_end(self) -> None:
        if not self.at_end:
            raise MalformedMessage("bytes follow a field's end", where="hello")
