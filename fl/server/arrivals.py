"""Updates on their way to the server, of which a cut loses nothing that has come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fl.errors import PeerLost
from fl.server.calls import StoppedSending
from fl.transport.chunks import Assembly
from fl.transport.frames import Deliver
from fl.transport.spool import Spool


class Arrivals:
    """What was under way when its site was cut off, one transfer a site. Safe to use from many threads."""

    def __init__(self, spool: Spool | None, wanted: Callable[[], bool]) -> None:
        """`wanted`: whether what is cut off now is still to be kept."""
        self._spool = spool
        self._wanted = wanted
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Deliver, Assembly]] = {}

    @contextmanager
    def of(self, name: str, head: Deliver) -> Iterator[Assembly]:
        """Where a site's update is put together. What came before a cut is there again if it is the same transfer."""
        with self._lock:
            kept = self._kept.pop(name, None)
        if kept is not None and (kept[0] != head or not head.transfer):
            kept[1].close()
            kept = None
        assembly = Assembly(head.size, where=name, spool=self._spool) if kept is None else kept[1]
        try:
            yield assembly
        except (StoppedSending, PeerLost):
            if head.transfer and self._wanted():
                with self._lock:
                    older, self._kept[name] = self._kept.get(name), (head, assembly)
                if older is not None:
                    older[1].close()
            else:
                assembly.close()
            raise
        except BaseException:
            assembly.close()
            raise

    def close(self) -> None:
        """Forget them all."""
        with self._lock:
            kept, self._kept = self._kept, {}
        for _, assembly in kept.values():
            assembly.close()
