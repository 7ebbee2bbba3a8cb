"""A gateway's jobs: branches that devices' service works on, and that the tree's link empties every moment."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fl.edge.branch import TreeBranch, bounds_of
from fl.edge.child import NodeJob
from fl.edge.contract import Branch, EdgeJob, ModelVersion, Update, Verdict
from fl.edge.exchange import Gateway, Reply, Report
from fl.edge.masks import capabilities_of
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import Offer
from fl.jobs.bundle import Bundle
from fl.jobs.settings import FedBuffOptions


class GuardedBranch:
    """A branch (`fl.edge.contract.Branch`) and its exchanges (`NodeJob`), for the service's thread and the link's."""

    def __init__(self, branch: TreeBranch, changed: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._changed = changed
        self._gateway = Gateway(branch)

    @property
    def job(self) -> EdgeJob:
        """The job."""
        return self._gateway.branch.job

    @property
    def origin(self) -> str:
        """A random name of this beginning of the job here."""
        return self._gateway.branch.origin

    @property
    def over(self) -> bool:
        """Whether the job is over."""
        return self._gateway.branch.over

    def current(self) -> Sequence[ModelVersion]:
        """The versions that take updates, the newest last."""
        with self._lock:
            return self._gateway.branch.current()

    def select(self, device: str) -> ModelVersion | None:
        """The version that this device is to train now."""
        with self._lock:
            return self._gateway.branch.select(device)

    def task(self, digest: str) -> DeviceTask | None:
        """The task with this digest."""
        with self._lock:
            return self._gateway.branch.task(digest)

    def add(self, update: Update) -> Verdict:
        """Take an update."""
        with self._lock:
            return self._gateway.branch.add(update)

    def reserve(self, version: int, contribution: str) -> Verdict:
        """Claim a contribution of which only a sum will come."""
        with self._lock:
            return self._gateway.branch.reserve(version, contribution)

    def add_sum(
        self, version: int, contributions: Sequence[str], tensors: Mapping[str, npt.NDArray[np.float64]], weight: float
    ) -> bool:
        """Add a sum of contributions that were admitted."""
        with self._lock:
            return self._gateway.branch.add_sum(version, contributions, tensors, weight)

    def report(self) -> Report:
        """What to say to the parent next."""
        with self._lock:
            return self._gateway.report()

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply."""
        with self._lock:
            self._gateway.hear(reply, versions)
        self._changed()


class GatewayTree:
    """The jobs of a gateway (`fl.edge.child.Node`)."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each exchange: devices that wait for a task may have one now."""
        self._changed = changed
        self._branches: dict[str, GuardedBranch] = {}

    def begin(self, offer: Offer, bundle: Bundle, task: DeviceTask) -> NodeJob:
        """A job that was checked begins here."""
        settings, options = bundle.settings, bundle.settings.options
        if not isinstance(options, FedBuffOptions):
            raise TypeError("only an edge job has devices")
        edge = options.edge
        job = EdgeJob(
            offer.job,
            settings.name,
            "edge",
            dict(options.config),
            capabilities_of(task.config),
            bounds_of(edge),
            edge.devices.device_reuse,
        )
        origin = os.urandom(16).hex()
        branch = TreeBranch(job, settings.schema_of_model, origin, time.monotonic, task_seconds=edge.task_seconds)
        branch.advance([], {task.digest: task})
        guarded = GuardedBranch(branch, self._changed)
        self._branches = {**self._branches, offer.job: guarded}
        return guarded

    def end(self, job: str) -> None:
        """A job is over."""
        self._branches = {name: branch for name, branch in self._branches.items() if name != job}

    def branches(self) -> Mapping[str, Branch]:
        """The branches that are alive, by job."""
        return dict(self._branches)
