"""TLS for one who waits, by stretches of many records.

Python's own SSLSocket makes two or three system calls for each record of 16 KiB. Here what has come is taken from the
socket in one call, and what is to go is given to it in one: the records between are memory's business.
"""

from __future__ import annotations

import io
import socket
import ssl
from typing import Any, Final

from fl.tensors import Buffer

STRETCH: Final = 256 << 10
"""Bytes that are moved at once."""


class TlsStream:
    """A TLS client's connection, with what `http.client` asks of a socket. For one thread at a time."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, *, host: str) -> None:
        """Make the handshake within the socket's timeout. Raises OSError; then the socket is the caller's to close."""
        self._plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._tls: Any = tls  # its stubs say bytes of what is an int where a buffer is given
        self._room = bytearray(STRETCH)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
                continue
            self._flush()
            return

    @property
    def certificate(self) -> bytes:
        """What the server has shown (DER); empty if it showed none."""
        shown: bytes = self._tls.getpeercert(binary_form=True) or b""
        return shown

    def settimeout(self, seconds: float | None) -> None:
        """How long one call to the socket may take."""
        self._plain.settimeout(seconds)

    def sendall(self, data: Buffer) -> None:
        """Send all of it. Raises OSError."""
        rest = memoryview(data).cast("B")
        while rest:
            stretch, rest = rest[:STRETCH], rest[STRETCH:]
            while stretch:
                stretch = stretch[self._tls.write(stretch) :]
            self._flush()

    def readinto(self, into: memoryview) -> int:
        """Read what is there, at least one byte; 0 when the peer has ended the stream in good order. Raises OSError."""
        count = 0
        while count < len(into):
            try:
                read = self._tls.read(len(into) - count, into[count:])
            except ssl.SSLWantReadError:
                if count:
                    break
                self._flush()
                self._fill()
                continue
            except ssl.SSLZeroReturnError:
                break
            if not read:
                break
            count += read
        return count

    def makefile(self, _mode: str = "rb") -> io.BufferedReader:
        """What is read of it."""
        return io.BufferedReader(_Readable(self), STRETCH)

    def abort(self) -> None:
        """End the connection under whoever reads or writes it, on any thread. Raises OSError if it has ended."""
        self._plain.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self._plain.close()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._plain.sendall(self._outgoing.read())

    def _fill(self) -> None:
        count = self._plain.recv_into(self._room)
        if count:
            self._incoming.write(memoryview(self._room)[:count])
        else:
            self._incoming.write_eof()  # in the middle of a record, or without its end: reading will say so


class _Readable(io.RawIOBase):
    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        return self._stream.readinto(memoryview(into).cast("B"))
