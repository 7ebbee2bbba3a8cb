"""The root of a tree as a job at the server: FedBuff, guarded by a lock, and the algorithm's own thread that waits."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np

from fl.edge.contract import ModelVersion
from fl.edge.exchange import Reply, Report, root_reply
from fl.edge.fedbuff import FIRST_VERSION, FedBuff, Noise, Step
from fl.edge.judgement import Judgement
from fl.edge.partial_sum import float_schema
from fl.edge.settings import EdgeSettings
from fl.edge.tree_frames import Offer
from fl.jobs.progress import JobEvent
from fl.jobs.settings import Selection
from fl.server.task import Keeper, Saved
from fl.tensors import Schema
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError

USED: Final = "used"
"""Among what is kept: the contributions of a job that takes each device once."""
SHOW_SECONDS: Final = 2.0
"""How long a child's report that completes a version waits for it."""
FAREWELL_SECONDS: Final = 15.0
"""How long a job that is over stays, so that its nodes hear so."""


class Evaluator(Protocol):
    """What measures versions at the root."""

    metric: str
    frequency: int

    def measure(self, model: SealedMemory) -> float:
        """A version's metric. Raises JobFailed."""

    def keep_best(self, model: SealedMemory) -> None:
        """This is the best version so far."""


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
        *,
        keeper: Keeper | None = None,
        evaluator: Evaluator | None = None,
        selection: Selection | None = None,
    ) -> None:
        """`model` becomes the first version, and this object's; unless `keeper` knows a later one of a server before.

        `evaluator` measures every so many versions, and `selection` says what follows. Raises SealedDataRefused if what
        the keeper has does not fit.
        """
        self.offer = offer.model_copy(update={"start": os.urandom(16).hex()})
        self.bundle = bundle
        self.schema = float_schema(schema)
        self._settings = settings
        self._task_digest = task_digest
        self._observe = observe
        self._keeper = keeper
        self._evaluator = evaluator
        saved = None if keeper is None else keeper.saved()
        version, used = FIRST_VERSION, b""
        if saved is not None:
            model.close()
            version += saved.round
            with saved.model as kept:
                model = kept.in_memory()
            used = np.asarray(saved.state.get(USED, ()), np.uint8).tobytes()
        self.judgement = Judgement(selection, None if saved is None else saved.judged)
        generator = np.random.default_rng(int.from_bytes(os.urandom(8), "big"))
        self._buff = FedBuff(schema, model, settings, generator, noise, version=version, used=used)
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
        """Take a report; the reply, at once, or when the version that the report completes is there."""
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
            if self._buff.full:
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._buff.full and self._newest == self._buff.version, SHOW_SECONDS)
            reply = Reply(reply.duplicates, reply.granted, tuple(sorted(self._versions)), self._ended)
            versions = dict(self._versions)
        self._tell(events)
        return reply, versions

    @property
    def _newest(self) -> int:
        return max(self._versions)

    @property
    def _ended(self) -> bool:
        return self._over or self._newest >= self._settings.models.max_model_version

    # for the algorithm's thread

    def begin(self) -> None:
        """The first version takes updates, or the one with which a server before stopped."""
        self._tell([JobEvent(kind="round", round=self._newest - FIRST_VERSION)])

    def advance(self) -> bool:
        """Make the next version if the buffer is full; whether it was.

        It is told, judged and kept before any child hears of it: what devices have trained from is never made again
        from other updates. Raises what evaluating, observing and keeping raise.
        """
        with self._changed:
            step = self._buff.step()
            if step is None:
                return False
            updates, self._updates = self._updates, Counter()
            model = self._buff.models[self._buff.version].share()
            used = self._buff.contributions.used
        with model:
            self._judge(step, updates, model)
            if self._keeper is not None:
                state = {USED: np.frombuffer(used, np.uint8)} if used else {}
                self._keeper.save(Saved(step.version - FIRST_VERSION, model, state, self.judgement.saved))
        with self._changed:
            self._over = self._over or self.judgement.over is not None
            self._show()
            self._changed.notify_all()
        if not self._ended:
            self._observe(JobEvent(kind="round", round=step.version - FIRST_VERSION))
        return True

    def _judge(self, step: Step, updates: Mapping[str, int], model: SealedMemory) -> None:
        round_ = step.version - FIRST_VERSION - 1
        for name, count in sorted(updates.items()):
            self._observe(JobEvent(kind="update", site=name, round=round_, weight=float(count)))
        mean = sum(tau * count for tau, count in step.staleness.items()) / step.updates
        values, evaluator, better = {"updates": float(step.updates), "staleness": mean}, self._evaluator, False
        if evaluator is not None and (step.version - FIRST_VERSION) % evaluator.frequency == 0:
            metric = evaluator.measure(model)
            values[evaluator.metric] = metric
            better = self.judgement.take(metric)
        self._observe(JobEvent(kind="aggregated", round=round_, values=values))
        if better and evaluator is not None:
            evaluator.keep_best(model)
            self._observe(JobEvent(kind="best", round=round_, values={evaluator.metric: values[evaluator.metric]}))
        for origin, count in step.lost.items():
            text = f"{count} updates that it had counted never came"
            self._observe(JobEvent(kind="lost", site=self._children.get(origin, origin), text=text))

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

    def wait(self, seconds: float) -> bool:
        """Make versions as they are due, for `seconds`; whether the last is made. Raises what `advance` raises, and
        what observing has raised elsewhere."""
        ends = time.monotonic() + seconds
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._buff.full or self._ended or self._failure is not None, ends - time.monotonic()
                )
                if self._failure is not None:
                    raise self._failure
                if self._ended:
                    return True
            if not self.advance() and time.monotonic() >= ends:
                return False

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
