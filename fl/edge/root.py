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
        self._show()

    # for children, from many threads

    def exchange(self, child: str, report: Report) -> tuple[Reply, Mapping[int, ModelVersion]]:
        """Take a report; the reply at once."""
        events: list[JobEvent] = []
        with self._changed:
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
            reply = Reply(reply.duplicates, reply.granted, tuple(sorted(self._buff.models)), self._buff.over)
            versions = dict(self._versions)
        for event in events:
            self._observe(event)
        return reply, versions

    def model(self, sha256: str) -> bytes | None:
        """The model with this digest, of a version that is alive."""
        with self._changed:
            return next((one.model for one in self._versions.values() if one.digest == sha256), None)

    def drop(self, origin: str) -> None:
        """A child's connection has ended: others have its permits until it is back."""
        with self._changed:
            self._buff.drop(origin)
            name, missing = self._children.get(origin, origin), self._buff.contributions.missing()[origin]
        if missing:
            text = f"its connection has ended; {missing} updates that it counted have not come yet"
            self._observe(JobEvent(kind="paused", site=name, text=text))

    # for the algorithm's thread

    def wait(self, seconds: float) -> bool:
        """Wait for the last version, or `seconds`; whether it is made."""
        with self._changed:
            self._changed.wait_for(lambda: self._buff.over, seconds)
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
