"""The root of a tree as a job at the server: FedBuff, guarded by a lock, and the algorithm's own thread that waits."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from fl.edge.contract import ModelVersion
from fl.edge.exchange import Reply, Report, root_reply
from fl.edge.fedbuff import FIRST_VERSION, FedBuff, Noise
from fl.edge.partial_sum import float_schema
from fl.edge.settings import EdgeSettings
from fl.edge.tree_frames import Offer
from fl.jobs.progress import JobEvent
from fl.tensors import Schema
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError

FAREWELL_SECONDS: Final = 15.0
"""How long a job that is over stays, so that its nodes hear so."""


class RootJob:
    """One edge job at the server (`fl.edge.parent.TreeJob`)."""

    def __init__(
        self,
        offer: Offer,
        bundle: bytes,
        schema: Schema,
        model: SealedMemory,
        settings: EdgeSettings,
        task_digest: str,
        observe: Callable[[JobEvent], None],
        noise: Noise | None = None,
    ) -> None:
        """`model` becomes the first version, and this object's."""
        self.offer = offer
        self.bundle = bundle
        self.schema = float_schema(schema)
        self._settings = settings
        self._task_digest = task_digest
        self._observe = observe
        generator = np.random.default_rng(int.from_bytes(os.urandom(8), "big"))
        self._buff = FedBuff(schema, model, settings, generator, noise)
        self._changed = threading.Condition()
        self._versions: dict[int, ModelVersion] = {}
        self._children: dict[str, str] = {}
        self._updates: Counter[str] = Counter()  # by node, since the last version
        self._asked = time.monotonic()
        self._failure: SealwrightError | None = None
        self._over = False
        self._connected: set[str] = set()
        self._unaware: set[str] = set()  # of those: which have not heard that the job is over
        self._show()

    # for children, from many threads

    def exchange(self, child: str, report: Report) -> tuple[Reply, Mapping[int, ModelVersion]]:
        """Take a report; the reply at once."""
        events: list[JobEvent] = []
        with self._changed:
            self._connected.add(report.origin)
            if report.origin in self._unaware:
                self._unaware.discard(report.origin)
                self._changed.notify_all()
            if report.origin not in self._children:
                self._children[report.origin] = child
                events.append(JobEvent(kind="joined", site=child))
            for origin in report.claims:
                self._children.setdefault(origin, child)
            before = self._buff.buffered
            reply = root_reply(self._buff, report)
            if report.demand.waiting:
                self._asked = time.monotonic()
            if (arrived := self._buff.buffered - before) > 0:
                self._updates[child] += arrived
            while self._buff.refused:
                why = self._buff.refused.pop()
                events.append(JobEvent(kind="refused", site=child, text=f"a partial sum is refused: {why}"))
            while (step := self._buff.step()) is not None:
                self._show()
                round_ = step.version - FIRST_VERSION - 1
                for name, count in sorted(self._updates.items()):
                    events.append(JobEvent(kind="update", site=name, round=round_, weight=float(count)))
                self._updates.clear()
                mean = sum(tau * count for tau, count in step.staleness.items()) / step.updates
                values = {"updates": float(step.updates), "staleness": mean}
                events.append(JobEvent(kind="aggregated", round=round_, values=values))
                for origin, count in step.lost.items():
                    text = f"{count} updates that it had counted never came"
                    events.append(JobEvent(kind="lost", site=self._children.get(origin, origin), text=text))
                if not self._buff.over:
                    events.append(JobEvent(kind="round", round=round_ + 1))
                self._changed.notify_all()
            over = self._over or self._buff.over
            reply = Reply(reply.duplicates, reply.granted, tuple(sorted(self._buff.models)), over)
            versions = dict(self._versions)
        self._tell(events)
        return reply, versions

    def begin(self) -> None:
        """The first version takes updates."""
        self._tell([JobEvent(kind="round", round=0)])

    def _tell(self, events: list[JobEvent]) -> None:
        """Tell of what happened; whoever hears of it may find that the job must end."""
        for event in events:
            try:
                self._observe(event)
            except SealwrightError as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()

    def model(self, sha256: str) -> bytes | None:
        """The model with this digest, of a version that is alive."""
        with self._changed:
            return next((one.model for one in self._versions.values() if one.digest == sha256), None)

    def drop(self, origin: str) -> None:
        """A child's connection has ended: others have its permits until it is back."""
        with self._changed:
            self._connected.discard(origin)
            self._unaware.discard(origin)
            self._changed.notify_all()
            self._buff.drop(origin)
            name, missing = self._children.get(origin, origin), self._buff.contributions.missing()[origin]
        if missing:
            text = f"its connection has ended; {missing} updates that it counted have not come yet"
            self._tell([JobEvent(kind="paused", site=name, text=text)])

    # for the algorithm's thread

    def wait(self, seconds: float) -> bool:
        """Wait for the last version, or `seconds`; whether it is made. Raises what observing has raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._buff.over or self._failure is not None, seconds)
            if self._failure is not None:
                raise self._failure
            return self._buff.over

    def why_stopped(self) -> str | None:
        """Why the job ends without its last version, if no device has asked for `device_wait_timeout`."""
        wait = self._settings.device_wait_timeout
        with self._changed:
            if wait is None or self._buff.under_way or time.monotonic() - self._asked < wait:
                return None
        return f"no device asked for {wait:g} s"

    @property
    def made(self) -> int:
        """Versions that were made of updates."""
        with self._changed:
            return self._buff.version - FIRST_VERSION

    def end(self, seconds: float = FAREWELL_SECONDS) -> None:
        """The job is over: wait until the nodes that are connected have heard so, `seconds` at most."""
        with self._changed:
            self._over = True
            self._unaware = set(self._connected)
            self._changed.wait_for(lambda: not self._unaware, seconds)

    def close(self) -> None:
        """Give the memory of models back; nothing is asked of it any more."""
        with self._changed:
            self._buff.close()

    def result(self) -> SealedMemory:
        """The newest version, the caller's to close."""
        with self._changed:
            return self._buff.models[self._buff.version].share()

    def _show(self) -> None:
        for version, model in self._buff.models.items():
            if version not in self._versions:
                raw = bytes(model.view)
                digest = hashlib.sha256(raw).hexdigest()
                self._versions[version] = ModelVersion(version, digest, raw, self._task_digest)
        self._versions = {version: self._versions[version] for version in self._buff.models}
