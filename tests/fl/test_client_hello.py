"""The first bytes of a TLS connection: what Python's ssl sends is read, and nothing else gets anywhere."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl.errors import MalformedMessage
from fl.transport.client_hello import MAX_EXTENSIONS, MAX_HELLO, ClientHello, needed, read_client_hello
from fl.transport.port import protocol_of


def hello_of(*protocols: str, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, name: str = "hub") -> bytes:
    """The ClientHello that OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = most
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def vector(width: int, body: bytes) -> bytes:
    return len(body).to_bytes(width, "big") + body


def made(extensions: bytes, *, suites: bytes = b"\x13\x01", session: bytes = b"", compression: bytes = b"\0") -> bytes:
    """A ClientHello of these parts."""
    body = b"\x03\x03" + bytes(32) + vector(1, session) + vector(2, suites) + vector(1, compression) + extensions
    return b"\x16\x03\x01" + vector(2, b"\x01" + vector(3, body))


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">H", kind) + vector(2, body)


ALPN_H2 = extension(16, vector(2, vector(1, b"h2")))
VERSIONS = extension(43, vector(1, b"\x03\x04"))


@pytest.mark.parametrize(
    ("protocols", "goes_to"),
    [
        (("h2",), "grpc"),
        (("grpc-exp", "h2"), "grpc"),
        (("http/1.1",), "https"),
        (("h2", "http/1.1"), "https"),
        ((), "https"),
    ],
)
def test_a_clients_offer_decides(protocols: tuple[str, ...], goes_to: str) -> None:
    raw = hello_of(*protocols)
    assert read_client_hello(raw).protocols == tuple(name.encode() for name in protocols)
    assert protocol_of(raw) == goes_to
    for cut in range(len(raw)):
        assert protocol_of(raw[:cut]) is None
    assert protocol_of(raw + b"more") == goes_to


def test_what_begins_like_http_is_plain() -> None:
    assert protocol_of(b"GET /v1/tunnel/grpc HTTP/1.1\r\n") == "plain"


def test_without_tls_1_3_there_is_nothing() -> None:
    raw = hello_of("h2", most=ssl.TLSVersion.TLSv1_2)
    with pytest.raises(MalformedMessage, match=r"does not speak TLS 1\.3"):
        protocol_of(raw)


def test_another_protocol_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="neither"):
        protocol_of(hello_of("spdy/3"))


def test_the_smallest_and_the_oldest_hello() -> None:
    assert read_client_hello(made(b"")) == ClientHello((), ())
    assert read_client_hello(made(vector(2, ALPN_H2 + VERSIONS))) == ClientHello((b"h2",), (0x0304,))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"SSH-2.0-x\r\n", "does not begin with TLS"),
        (b"\x16\x02", "version is not TLS"),
        (b"\x16\x03\x01\xff\xff", "record has 65535 bytes"),
        (b"\x16\x03\x01\x00\x00", "record has 0 bytes"),
        (b"\x16\x03\x01\x00\x20\x02", "no ClientHello"),
        (made(vector(2, ALPN_H2 + ALPN_H2)), "comes twice"),
        (
            made(vector(2, b"".join(extension(1000 + n, b"") for n in range(MAX_EXTENSIONS + 1)))),
            "there are too many",
        ),
        (made(vector(2, extension(16, vector(2, b"")))), "names no protocol"),
        (made(vector(2, extension(16, vector(2, b"\0")))), "is empty"),
        (made(vector(2, extension(16, vector(2, vector(1, b"x") * 17)))), "too many"),
        (made(vector(2, extension(16, vector(2, vector(1, b"h2")) + b"x"))), "follow a field's end"),
        (made(vector(2, extension(43, vector(1, b"\x03")))), "lists none"),
        (made(vector(2, VERSIONS) + b"x"), "follow a field's end"),
        (made(vector(2, VERSIONS[:-1])), "cut short"),
        (made(b"", suites=b""), "none"),
        (made(b"", suites=b"\x13"), "none"),
        (made(b"", compression=b""), "none"),
        (made(b"", session=bytes(33)), "too long"),
        (b"\x16\x03\x01" + vector(2, b"\x01" + vector(3, bytes(60)) + b"x"), "follow a field's end"),
        (b"\x16\x03\x01" + vector(2, b"\x01\x00\x40\x00" + bytes(60)), "cut short"),
    ],
)
def test_a_hello_that_is_none_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        read_client_hello(raw)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(raw: bytes) -> None:
    for reader in (read_client_hello, protocol_of):
        try:
            reader(raw)
        except MalformedMessage:
            continue


@given(st.binary(max_size=80), st.integers(0, 400))
def test_no_damage_does_more_than_be_refused(patch: bytes, at: int) -> None:
    raw = hello_of("h2", "http/1.1")
    damaged = raw[:at] + patch + raw[at + len(patch) :]
    try:
        hello = read_client_hello(damaged)
    except MalformedMessage:
        return
    assert all(hello.protocols)


@given(st.binary(max_size=40))
def test_what_is_needed_never_shrinks_and_is_bounded(raw: bytes) -> None:
    try:
        sizes = [needed(raw[:cut]) for cut in range(len(raw) + 1)]
    except MalformedMessage:
        return
    assert sizes == sorted(sizes)
    assert sizes[-1] <= MAX_HELLO
