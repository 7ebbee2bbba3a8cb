"""Memory for updates that are on their way to the aggregation: bounded, whatever the number of sites.

A site's update is pulled when there is room for it, and makes room when it has been folded. What would not go on at
all without more (an algorithm that keeps the updates of a round) gets it after WAIT_SECONDS.
"""

from __future__ import annotations

import threading
import time
from typing import Final

ROOM: Final = 512 << 20
"""Bytes of all updates that are received, checked or wait to be folded; one alone may have more."""
WAIT_SECONDS: Final = 30.0


class Room:
    """Safe to use from many threads."""

    def __init__(self, most: int | None = None) -> None:
        """`most` bytes (None: ROOM); one alone may have more."""
        self._most = ROOM if most is None else most
        self._changed = threading.Condition()
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        with self._changed:
            return self._taken

    def take(self, size: int) -> None:
        """Take room for `size` bytes; wait for it, WAIT_SECONDS at most."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while self._taken and self._taken + size > self._most and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._taken += size

    def give_back(self, size: int) -> None:
        """Give room for `size` bytes back."""
        with self._changed:
            self._taken -= size
            self._changed.notify_all()
