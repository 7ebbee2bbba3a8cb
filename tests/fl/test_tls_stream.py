"""TLS by stretches: what Python's own TLS says at the other end arrives whole, and an end that is none is told."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import certificate_of_proxy

from fl.transport.tls_stream import STRETCH, TlsStream

SECONDS = 10.0


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext, bytes]:
    """A server's, a client's, and what the server shows (DER)."""
    key, certificate = certificate_of_proxy()
    file: Path = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_text(key + certificate)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.load_cert_chain(file)
    client = ssl.create_default_context(cadata=certificate)
    client.check_hostname = False
    return server, client, ssl.PEM_cert_to_DER_cert(certificate)


Contexts = tuple[ssl.SSLContext, ssl.SSLContext, bytes]


@contextmanager
def connected(contexts: Contexts, serve: Callable[[ssl.SSLSocket], None]) -> Iterator[TlsStream]:
    """A stream to `serve`, which has Python's own TLS."""
    ours, theirs = socket.socketpair()
    failed: list[BaseException] = []

    def target() -> None:
        try:
            theirs.settimeout(SECONDS)
            with contexts[0].wrap_socket(theirs, server_side=True) as secure:
                serve(secure)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    ours.settimeout(SECONDS)
    stream = TlsStream(ours, contexts[1], host="proxy")
    try:
        yield stream
    finally:
        stream.close()
        thread.join(SECONDS)
    assert not failed


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(0, 3), st.integers(1, 3 * STRETCH))
@settings(max_examples=15, deadline=None)
def test_what_goes_in_comes_out(contexts: Contexts, words: list[bytes], large: int, at_once: int) -> None:
    """Whatever its size, by whatever steps it is read."""
    said = b"".join(words) + bytes(range(256)) * (large * STRETCH // 256) + b"end"
    with connected(contexts, lambda secure: secure.sendall(said)) as stream, stream.makefile() as file:
        found = b""
        while len(found) < len(said):
            piece = file.read(min(at_once, len(said) - len(found)))
            assert piece, "the stream has ended"
            found += piece
        assert found == said


def test_both_ways_and_whose_certificate(contexts: Contexts) -> None:
    said = bytes(range(256)) * (5 * STRETCH // 256)
    parts = (b"word", said[: STRETCH + 1], b"", said, b"!")

    def echo(secure: ssl.SSLSocket) -> None:
        for part in parts:
            heard = b""
            while len(heard) < len(part):
                heard += secure.recv(len(part) - len(heard))
            secure.sendall(heard)

    with connected(contexts, echo) as stream, stream.makefile() as file:
        assert stream.certificate == contexts[2]
        for part in parts:
            stream.sendall(part)
            assert file.read(len(part)) == part


def test_an_end_in_good_order_is_an_end_and_a_cut_is_none(contexts: Contexts) -> None:
    def ends(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"whole")
        with suppress(OSError):  # the client's close is no answer to it
            secure.unwrap()

    def cuts(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"whole")
        socket.socket.shutdown(secure, socket.SHUT_RDWR)  # a host that lets no more through

    with connected(contexts, ends) as stream, stream.makefile() as file:
        assert file.read() == b"whole"
    with connected(contexts, cuts) as stream, stream.makefile() as file:
        assert file.read(5) == b"whole"
        with pytest.raises(OSError, match="EOF"):
            file.read(1)


def test_what_is_no_tls_or_another_s_is_refused(contexts: Contexts) -> None:
    def tampered(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"one")
        secure.recv(1)
        socket.socket.send(secure, b"\x17\x03\x03\x00\x20" + bytes(32))  # a record of somebody on the way

    with connected(contexts, tampered) as stream, stream.makefile() as file:
        assert file.read(3) == b"one"
        stream.sendall(b"x")
        with pytest.raises(ssl.SSLError):
            file.read(1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ssl.SSLError):
            TlsStream(ours, contexts[1], host="proxy")


def test_silence_and_an_end_from_another_thread_end_a_wait(contexts: Contexts) -> None:
    over = threading.Event()
    with connected(contexts, lambda _: over.wait(SECONDS) and None) as stream, stream.makefile() as file:
        stream.settimeout(0.2)
        with pytest.raises(TimeoutError):
            file.read(1)
        stream.settimeout(SECONDS)
        threading.Timer(0.2, stream.abort).start()
        with pytest.raises(OSError, match="EOF"):
            file.read(1)
        over.set()
