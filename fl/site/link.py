"""A site's connection to its server: one attendance, on which both sides speak, and transfers beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, TypeAdapter

from attestation.errors import LeaseEnded, PeerLapsed
from fl.errors import CallFailed, LeaseLapsed, PeerLost
from fl.party import Party
from fl.transport.channel import ServerConnection, peer_error
from fl.transport.chunks import Assembly, serve_chunks
from fl.transport.frames import (
    TO_ATTENDING_SITE,
    Away,
    Deliver,
    Fetch,
    Finish,
    Lease,
    Left,
    Logged,
    Masking,
    Prepare,
    Pull,
    Ready,
    Said,
    Steer,
    Told,
    Train,
    Verdict,
    pack,
    unpack,
)
from fl.transport.lease import CHECK_SECONDS, OwnLease, paused
from fl.transport.stored import Stored
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from attestation.identity import Identity

AWAY_SECONDS: Final = 0.5
"""Between the last word on a connection and its end."""
FLUSH_SECONDS: Final = 0.4
_PULL_OR_VERDICT: Final = TypeAdapter[Pull | Verdict](Annotated[Pull | Verdict, Field(discriminator="kind")])


class Attending:
    """The attendance of a site at an appraised server."""

    def __init__(self, party: Party, connection: ServerConnection) -> None:
        """Raises LeaseEnded if the site has no lease."""
        self._party = party
        self._connection = connection
        self._where = f"server {connection.peer.name}"
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        identity = party.identity()
        self._own = OwnLease(identity.certificate_der)
        self._refusal: SealwrightError | None = None
        self._over = threading.Event()
        self._show(identity)
        self._call = connection.call("Attend", self._outgoing(), timeout=None)
        self._watch = threading.Thread(target=self._watch_leases, name="leases", daemon=True)
        self._watch.start()

    def frames(self, accepted: Callable[[], None]) -> Iterator[Prepare | Train | Finish | Told | Steer | Masking]:
        """What the server says, until the connection ends; `accepted` is called when it has taken this site.

        Raises PeerRefused, Refused (by the server), LeaseLapsed if it may be begun anew, PeerLost, MalformedMessage.
        """
        known = False
        try:
            for raw in self._call:
                frame, _ = unpack(TO_ATTENDING_SITE, raw, where=self._where)
                if isinstance(frame, Lease):
                    self._connection.lease.renew(frame)
                    if not known:
                        known = True
                        accepted()
                else:
                    yield frame
        except PeerLapsed as error:
            pause = self._pause(error)
            self._over.wait(AWAY_SECONDS)
            raise pause from error
        except CallFailed as error:
            raise (self._refusal or peer_error(error, where=self._where)) from error
        finally:
            self.close()
        raise PeerLost("the server ended the connection", where=self._where)

    def check_server(self) -> None:
        """Judge the server again, before a job begins. Raises PeerRefused, PeerLapsed."""
        self._connection.lease.check(anew=True)

    def send(self, frame: Ready | Left | Logged | Said | Masking) -> None:
        """Send a frame on the attendance."""
        self._outbox.put(pack(frame))

    def fetch(self, what: Fetch, into: Assembly, *, seconds: float) -> None:
        """Pull what is missing of a transfer. Raises PeerLost, Refused, MalformedMessage; what has come is kept."""
        call = self._connection.ask("Fetch", what.model_copy(update={"offset": into.at}), timeout=seconds)
        try:
            into.take(call)
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            call.cancel()

    def deliver(self, head: Deliver, memory: Stored, *, seconds: float) -> Verdict:
        """Deliver an update when the server pulls it. Raises PeerLost, Refused, MalformedMessage."""
        pulled: SimpleQueue[int | None] = SimpleQueue()

        def outgoing() -> Iterator[bytes]:
            yield pack(head)
            offset = pulled.get()
            if offset is not None:
                yield from serve_chunks(memory, offset)

        call = self._connection.call("Deliver", outgoing(), timeout=seconds)
        try:
            for raw in call:
                frame, _ = unpack(_PULL_OR_VERDICT, raw, where=self._where)
                if isinstance(frame, Verdict):
                    return frame
                pulled.put(min(frame.offset, memory.size))
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            pulled.put(None)
            call.cancel()
        raise PeerLost("the server gave no verdict on an update", where=self._where)

    def flush(self) -> None:
        """Wait until what was sent is on its way, FLUSH_SECONDS at most."""
        end = time.monotonic() + FLUSH_SECONDS
        while not self._outbox.empty() and time.monotonic() < end:
            time.sleep(0.01)
        self._over.wait(FLUSH_SECONDS / 4)

    def close(self) -> None:
        """End the attendance."""
        self._over.set()
        self._outbox.put(None)
        self._call.cancel()

    def _outgoing(self) -> Iterator[bytes]:
        while (frame := self._outbox.get()) is not None:
            yield frame

    def _show(self, identity: Identity) -> None:
        if (lease := self._own.to_show(identity)) is not None:
            self._outbox.put(pack(lease))

    def _watch_leases(self) -> None:
        """Show each newer EAR of our own; end the connection when a lease has ended or the server's place is gone."""
        while not self._over.wait(CHECK_SECONDS):
            try:
                self._show(self._party.identity())
                self._connection.lease.check()
            except (PeerLapsed, LeaseEnded) as error:
                self._refusal = self._pause(error)
                self._over.wait(AWAY_SECONDS)  # so that the server hears why before the connection is gone
                self._call.cancel()
                return
            except SealwrightError as error:
                self._refusal = error
                self._call.cancel()
                return

    def _pause(self, error: PeerLapsed | LeaseEnded) -> LeaseLapsed:
        """A lease has ended: tell the server that this site will be back."""
        why = paused(error, self._where) if isinstance(error, PeerLapsed) else error.what
        self._outbox.put(pack(Away(why=why[:2000])))
        return LeaseLapsed(why, where=self._where)
