"""A site's connection to its server: one attendance, on which both sides speak, and transfers beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Annotated, Final

import grpc
from pydantic import Field, TypeAdapter

from fl.errors import PeerLost
from fl.party import Party
from fl.transport.channel import ServerConnection, peer_error
from fl.transport.chunks import assemble, serve_chunks
from fl.transport.frames import (
    TO_ATTENDING_SITE,
    Deliver,
    Fetch,
    Finish,
    Lease,
    Left,
    Logged,
    Prepare,
    Pull,
    Ready,
    Train,
    Verdict,
    pack,
    unpack,
)
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError

CHECK_SECONDS: Final = 5.0
"""How often each side's lease is looked at."""
_PULL_OR_VERDICT: Final = TypeAdapter[Pull | Verdict](Annotated[Pull | Verdict, Field(discriminator="kind")])


class Attending:
    """The attendance of a site at an appraised server."""

    def __init__(self, party: Party, connection: ServerConnection) -> None:
        self._party = party
        self._connection = connection
        self._where = f"server {connection.peer.name}"
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._server_ear = connection.peer.ear.token
        self._own_ear = party.identity().ear
        self._refusal: SealwrightError | None = None
        self._over = threading.Event()
        self._outbox.put(pack(Lease(ear=self._own_ear)))
        self._call = connection.call("Attend", self._outgoing(), timeout=None)
        self._watch = threading.Thread(target=self._watch_leases, name="leases", daemon=True)
        self._watch.start()

    def frames(self) -> Iterator[Prepare | Train | Finish]:
        """What the server says, until the connection ends. Raises PeerRefused, PeerLost, MalformedMessage."""
        try:
            for raw in self._call:
                frame, _ = unpack(TO_ATTENDING_SITE, raw, where=self._where)
                if isinstance(frame, Lease):
                    party = self._party
                    self._connection.appraise(frame.ear, party.charter(), party.clock())
                    self._server_ear = frame.ear
                else:
                    yield frame
        except grpc.RpcError as error:
            raise (self._refusal or peer_error(error, where=self._where)) from error
        finally:
            self.close()
        raise PeerLost("the server ended the connection", where=self._where)

    def send(self, frame: Ready | Left | Logged) -> None:
        """Send a frame on the attendance."""
        self._outbox.put(pack(frame))

    def fetch(self, what: Fetch, *, size: int, seconds: float) -> SealedMemory:
        """Pull a transfer of `size` bytes. Raises PeerLost, Refused, MalformedMessage."""
        call = self._connection.ask("Fetch", what, timeout=seconds)
        try:
            return assemble(call, size=size, sha256=None, where=f"{what.what} of {what.job}")
        except grpc.RpcError as error:
            raise peer_error(error, where=self._where) from error
        finally:
            call.cancel()

    def deliver(self, head: Deliver, memory: SealedMemory, *, seconds: float) -> Verdict:
        """Deliver an update when the server pulls it. Raises PeerLost, Refused, MalformedMessage."""
        pulled: SimpleQueue[int | None] = SimpleQueue()

        def outgoing() -> Iterator[bytes]:
            yield pack(head)
            offset = pulled.get()
            if offset is not None:
                yield from serve_chunks(memory.view, offset)

        call = self._connection.call("Deliver", outgoing(), timeout=seconds)
        try:
            for raw in call:
                frame, _ = unpack(_PULL_OR_VERDICT, raw, where=self._where)
                if isinstance(frame, Verdict):
                    return frame
                pulled.put(min(frame.offset, memory.size))
        except grpc.RpcError as error:
            raise peer_error(error, where=self._where) from error
        finally:
            pulled.put(None)
            call.cancel()
        raise PeerLost("the server gave no verdict on an update", where=self._where)

    def close(self) -> None:
        """End the attendance."""
        self._over.set()
        self._outbox.put(None)
        self._call.cancel()

    def _outgoing(self) -> Iterator[bytes]:
        while (frame := self._outbox.get()) is not None:
            yield frame

    def _watch_leases(self) -> None:
        """Send each newer EAR of our own; end the connection when the server's has lapsed or its place is gone."""
        while not self._over.wait(CHECK_SECONDS):
            try:
                party = self._party
                newer = party.identity().ear
                if newer != self._own_ear:
                    self._own_ear = newer
                    self._outbox.put(pack(Lease(ear=newer)))
                self._connection.appraise(self._server_ear, party.charter(), party.clock())
            except SealwrightError as error:
                self._refusal = error
                self._call.cancel()
                return
