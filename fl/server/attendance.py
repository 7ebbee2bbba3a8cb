"""The sites that are connected: each with the stream on which the server speaks to it, and its lease."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from queue import Empty, SimpleQueue

from attestation.errors import LeaseEnded, PeerLapsed
from fl.errors import LeaseLapsed
from fl.party import Party
from fl.transport.frames import Finish, Frame, Lease, Masking, Prepare, Steer, Told, Train
from fl.transport.lease import CHECK_SECONDS, OwnLease, PeerLease, paused
from policies.errors import Refused, SealwrightError
from policies.questions import Place


class Attendance:
    """One site's connection, from its first appraised EARs to its end."""

    def __init__(self, party: Party, certificate: bytes, lease: Lease) -> None:
        """Appraise the site. Raises PeerRefused."""
        self._party = party
        self.certificate = certificate
        self._outbox: SimpleQueue[Frame | None] = SimpleQueue()
        self._ended = threading.Event()
        self.why = ""
        self.cause: SealwrightError | None = None
        """The refusal, or the end of a lease, that ended the connection, if one did."""
        identity = party.identity()
        self.since = party.clock()
        here: Place = ("server", identity.name)
        self._lease = PeerLease(certificate, lease, role="site", here=here, charter=party.charter, clock=party.clock)
        self._own = OwnLease(identity.certificate_der)

    @property
    def name(self) -> str:
        """The site's name."""
        return self._lease.peer.name

    @property
    def good_until(self) -> datetime:
        """When the site's lease ends if it is not renewed."""
        return self._lease.peer.good_until

    def renew(self, lease: Lease) -> None:
        """Take the site's newer EARs. Raises PeerRefused."""
        self._lease.renew(lease)

    def own_lease(self) -> Lease | None:
        """The frame with this server's newest EARs, if the site has not had them. Raises LeaseEnded."""
        return self._own.to_show(self._party.identity())

    def check(self, *, anew: bool = False) -> None:
        """End the connection if the site's lease has ended, its place is gone, it is not what the consortium demands
        of peers, or our own lease has ended. `anew` judges it again although nothing is due."""
        try:
            self._lease.check(anew=anew)
            self._party.identity()
        except (PeerLapsed, LeaseEnded, Refused) as error:
            self.fail(error)

    def fail(self, error: SealwrightError) -> None:
        """End the connection because of `error`, which the site is told."""
        if isinstance(error, PeerLapsed):
            error = LeaseLapsed(paused(error, f"site {self.name}"), where=f"site/{self.name}")
        elif isinstance(error, LeaseEnded):
            error = LeaseLapsed(f"the server's lease was not renewed: {error.what}", where="server")
        reasons = error.reasons if isinstance(error, Refused) else (error.what,)
        self.end("; ".join(reasons), cause=error)

    @property
    def lapsed(self) -> bool:
        """Whether the connection ended because a lease did, so that the site may come back and go on."""
        return isinstance(self.cause, LeaseLapsed)

    def send(self, frame: Prepare | Train | Finish | Lease | Told | Steer | Masking) -> None:
        """Send the site a frame; nothing happens if the connection has ended."""
        self._outbox.put(frame)

    def next_frame(self) -> Frame | None:
        """The next frame to send; None when the connection is to end or the next check is due."""
        try:
            return self._outbox.get(timeout=CHECK_SECONDS)
        except Empty:
            return None

    def end(self, why: str, *, cause: SealwrightError | None = None) -> None:
        """End the connection."""
        if not self._ended.is_set():
            self.why, self.cause = why, cause
            self._ended.set()
            self._outbox.put(None)

    @property
    def ended(self) -> bool:
        """Whether the connection has ended."""
        return self._ended.is_set()

    def ends_within(self, seconds: float) -> bool:
        """Whether the connection has ended, or ends in the next `seconds`, which are waited for."""
        return self._ended.wait(seconds)


class Attendances:
    """All connected sites, by name: one connection each, the newest."""

    def __init__(self, joined: Callable[[Attendance], None], left: Callable[[Attendance], None]) -> None:
        self._joined = joined
        self._left = left
        self._lock = threading.Lock()
        self._by_name: dict[str, Attendance] = {}

    def add(self, attendance: Attendance) -> None:
        """A site has connected; an older connection of its name ends."""
        with self._lock:
            older = self._by_name.get(attendance.name)
            self._by_name[attendance.name] = attendance
        if older is not None:
            older.ends_within(CHECK_SECONDS)  # why it ends may be on its way still: a pause, say
            older.end("the site has connected anew")
            self._left(older)
        self._joined(attendance)

    def remove(self, attendance: Attendance) -> None:
        """A connection has ended."""
        with self._lock:
            current = self._by_name.get(attendance.name) is attendance
            if current:
                del self._by_name[attendance.name]
        if current:
            self._left(attendance)

    def of_certificate(self, certificate: bytes) -> Attendance | None:
        """The connected site with this certificate."""
        with self._lock:
            return next((one for one in self._by_name.values() if one.certificate == certificate), None)

    def all(self) -> list[Attendance]:
        """Every connected site, by name."""
        with self._lock:
            return [self._by_name[name] for name in sorted(self._by_name)]
