"""The sites that are connected: each with the stream on which the server speaks to it, and its current EAR."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from attestation.identity import appraise_peer
from fl.party import Party
from fl.transport.frames import Finish, Frame, Lease, Prepare, Train
from policies.errors import Refused

if TYPE_CHECKING:
    from attestation.identity import Peer

CHECK_SECONDS: Final = 5.0
"""How often a connection's lease is looked at: a lapsed EAR ends it within this time."""


class Attendance:
    """One site's connection, from its first appraised EAR to its end."""

    def __init__(self, party: Party, certificate: bytes, ear: str) -> None:
        """Appraise the site. Raises PeerRefused."""
        self._party = party
        self.certificate = certificate
        self._outbox: SimpleQueue[Frame | None] = SimpleQueue()
        self._ended = threading.Event()
        self.why = ""
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._peer: Peer = appraise_peer(certificate, party.charter(), party.clock(), role="site", ear=ear)

    @property
    def name(self) -> str:
        """The site's name."""
        return self._peer.name

    def renew(self, ear: str) -> None:
        """Take the site's newer EAR. Raises PeerRefused."""
        self._peer = appraise_peer(self.certificate, self._party.charter(), self._party.clock(), role="site", ear=ear)

    def check_when_due(self) -> None:
        """Every CHECK_SECONDS appraise the site again, by charter and time; a refusal ends the connection."""
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_SECONDS
        try:
            self.renew(self._peer.ear.token)
        except Refused as error:
            self.end("; ".join(error.reasons))

    @property
    def good_until(self) -> datetime:
        """When the site's EAR ends."""
        return self._peer.ear.expires_at

    def send(self, frame: Prepare | Train | Finish | Lease) -> None:
        """Send the site a frame; nothing happens if the connection has ended."""
        self._outbox.put(frame)

    def next_frame(self) -> Frame | None:
        """The next frame to send; None when the connection is to end or the next check is due."""
        try:
            return self._outbox.get(timeout=max(0.01, self._check_at - time.monotonic()))
        except Empty:
            return None

    def end(self, why: str) -> None:
        """End the connection."""
        if not self._ended.is_set():
            self.why = why
            self._ended.set()
            self._outbox.put(None)

    @property
    def ended(self) -> bool:
        """Whether the connection has ended."""
        return self._ended.is_set()


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
