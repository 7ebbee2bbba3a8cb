"""The link that a site's jobs have to the server: it outlives a connection that a cut or a lease has ended.

While the site is away, what a job sends is kept, and a transfer waits; when the site attends again, an interrupted
transfer goes on. When it gives up coming back, the link ends, and its jobs with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from fl.errors import PeerLost
from fl.site.link import Attending
from fl.transport.chunks import Assembly
from fl.transport.frames import Deliver, Fetch, Left, Logged, Masking, Ready, Said, Verdict
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored
from policies.errors import SealwrightError

GRACE_SECONDS: Final = 5.0
"""How much later than a transfer that breaks off the end of its connection may be noticed."""
MAX_KEPT: Final = 10_000
"""Frames that are kept while the site is away; logged values beyond are dropped."""

T = TypeVar("T")


class LastingLink:
    """Safe to use from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._attending: Attending | None = None
        self._over: SealwrightError | None = None
        self._kept: list[Ready | Left | Logged | Said | Masking] = []

    def attach(self, attending: Attending) -> None:
        """The site attends: what was kept is sent, transfers go on."""
        with self._changed:
            self._attending = attending
            for frame in self._kept:
                attending.send(frame)
            self._kept.clear()
            self._changed.notify_all()

    def pause(self) -> None:
        """The connection has ended."""
        with self._changed:
            self._attending = None
            self._changed.notify_all()

    def end(self, error: SealwrightError) -> None:
        """There will be no further connection for these jobs: whatever waits fails with `error`."""
        with self._changed:
            self._attending = None
            self._over = self._over or error
            self._changed.notify_all()

    def send(self, frame: Ready | Left | Logged | Said | Masking) -> None:
        """Send a frame on the attendance, now or when there is one again."""
        with self._changed:
            if self._attending is not None:
                self._attending.send(frame)
            elif len(self._kept) < MAX_KEPT or not isinstance(frame, Logged | Said):
                self._kept.append(frame)

    def fetch(self, what: Fetch, *, size: int, seconds: float, sha256: str | None = None) -> SealedMemory:
        """Pull a transfer, of the digest `sha256` if that is given. Raises PeerLost, Refused, MalformedMessage."""
        with Assembly(size, where=f"{what.what} of {what.job}") as assembly:
            self._lasting(lambda attending: attending.fetch(what, assembly, seconds=seconds))
            with assembly.seal(sha256=sha256) as whole:
                return whole.in_memory()

    def deliver(self, head: Deliver, memory: Stored, *, seconds: float) -> Verdict:
        """Deliver an update. Raises PeerLost, Refused, MalformedMessage."""
        return self._lasting(lambda attending: attending.deliver(head, memory, seconds=seconds))

    def _lasting(self, transfer: Callable[[Attending], T]) -> T:
        while True:
            attending = self._present()
            try:
                return transfer(attending)
            except PeerLost:
                if not self._replaced(attending):
                    raise

    def _present(self) -> Attending:
        with self._changed:
            while self._attending is None and self._over is None:
                self._changed.wait()
            if self._attending is None or self._over is not None:
                raise self._over or PeerLost("the site does not attend any more", where="server")
            return self._attending

    def _replaced(self, attending: Attending) -> bool:
        """Whether `attending` has ended, which may be noticed a little later than what it broke."""
        deadline = time.monotonic() + GRACE_SECONDS
        with self._changed:
            while self._attending is attending and self._over is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return self._over is None
