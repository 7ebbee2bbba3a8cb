"""Virtual devices against real gateways: each is a device of the Python kit, with key, token and attestation check.

They come and go, take their time and vanish as the description says, in real seconds now. Each worker is a thread with
a connection of its own, which plays its share of the devices, one step at a time.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl.edge.kits.python.connection import GatewayConnection
from fl.edge.kits.python.data import ArrayDataset, Dataset
from fl.edge.kits.python.device import Device, DeviceSettings
from fl.edge.kits.python.trainer import Trainer
from fl.edge.kits.python.trust import Trust
from fl.edge.simulation.engine import Trace
from fl.edge.simulation.population import Population
from fl.edge.simulation.processors import DataOf
from fl.edge.tokens import issue_token
from policies.charter import Charter
from policies.errors import Unusable

MAX_DEVICES: Final = 20_000
"""Each has a folder and a key."""
LOOK_SECONDS: Final = 0.25
AWAY_SECONDS: Final = 5.0
"""Between two looks whether a device is back, and at the most between two questions for a job."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who lets the virtual devices in: its name in the charter, and its key."""

    name: str
    key: Ed25519PrivateKey


@dataclass(slots=True)
class _Seen:
    """What the workers have seen, under a lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcomes: Counter[str] = field(default_factory=Counter)
    versions: dict[int, list[float]] = field(default_factory=dict)
    """When each version was first given to a device, and how many of its updates were taken."""
    errors: list[Exception] = field(default_factory=list)


def simulate_over_http(
    urls: Sequence[str],
    root: bytes,
    issuer: Issuer,
    job: str,
    population: Population,
    data_of: DataOf,
    trainer: Callable[[], Trainer],
    folder: Path,
    *,
    seconds: float,
    workers: int,
    production: bool = True,
    capabilities: Mapping[str, str] | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    stop: threading.Event | None = None,
) -> Trace:
    """Play the population for so many seconds, until `stop`, or until the job is over for all; what happened.

    `urls`: the gateways; devices take them in turn, each its own for good. `root`: the charter's first root, which is
    all that devices trust. `job`: the job's name, or its beginning and `*`. `folder`: an empty one, for the devices'
    own. Raises Unusable, Refused (what answers is no gateway of the charter).
    """
    if population.size > MAX_DEVICES:
        raise Unusable(
            f"{population.size} devices, more than {MAX_DEVICES}", where="population.devices", do="Describe fewer."
        )
    charter = _charter(urls[0], root, clock, production)
    seen, began = _Seen(), time.monotonic()
    settings = DeviceSettings(jobs=(job,), capabilities=dict(capabilities or {}), wait_seconds=0.0)
    stop = threading.Event() if stop is None else stop

    def play(share: range) -> None:
        connections = [GatewayConnection(url) for url in urls]
        try:
            trust = Trust(root, production=production)
            worker = _Worker(population, seen, began, stop)
            for number in share:
                key = generate_private_key(SECP256R1())
                token = _token(charter, issuer, key.public_key(), number, population.settings.seed, clock())
                device = Device(
                    connections[number % len(connections)],
                    trust,
                    token,
                    key,
                    _Source(data_of, number),
                    trainer(),
                    folder / f"device-{number}",
                    settings,
                    event=worker.hears(number),
                    clock=clock,
                    rng=np.random.default_rng([population.settings.seed, number]),
                )
                worker.add(number, device)
            worker.play(seconds)
        except Exception as error:
            with seen.lock:
                seen.errors.append(error)
            stop.set()
        finally:
            for connection in connections:
                connection.close()

    threads = [
        threading.Thread(target=play, args=(range(at, population.size, workers),), name=f"devices {at}", daemon=True)
        for at in range(min(workers, population.size))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if seen.errors:
        raise seen.errors[0]
    return _trace(population, seen, time.monotonic() - began, stopped=time.monotonic() - began >= seconds)


class _Worker:
    """A share of the devices, each with the time of its next step."""

    def __init__(self, population: Population, seen: _Seen, began: float, stop: threading.Event) -> None:
        self._population = population
        self._seen = seen
        self._began = began
        self._stop = stop
        self._queue: list[tuple[float, int]] = []
        self._devices: dict[int, Device] = {}

    def add(self, number: int, device: Device) -> None:
        """A device begins, somewhere in the first second."""
        self._devices[number] = device
        heapq.heappush(self._queue, (number % 97 / 97, number))

    def play(self, seconds: float) -> None:
        """Step devices when their time comes."""
        while self._queue and not self._stop.is_set():
            when, number = self._queue[0]
            now = time.monotonic() - self._began
            if now >= seconds:
                return
            if when > now:
                self._stop.wait(min(when - now, LOOK_SECONDS))
                continue
            heapq.heappop(self._queue)
            wait = self._step(number, now)
            if wait is not None:
                heapq.heappush(self._queue, (time.monotonic() - self._began + wait, number))

    def _step(self, number: int, now: float) -> float | None:
        """One step of a device; seconds to its next, None if there is none."""
        population, device = self._population, self._devices[number]
        here = np.array([number])
        if not population.are_there(here, now)[0]:
            return AWAY_SECONDS
        before = device.standing
        wait = device.step()
        if device.standing.state == "over":
            return None
        if before.state == "training" and device.standing.state == "reporting" and before.task is not None:
            if population.drops(here, before.task.version)[0]:
                with self._seen.lock:
                    self._seen.outcomes["vanished"] += 1
                return None
            return float(population.seconds(here)[0])
        return min(wait, AWAY_SECONDS) if device.standing.state == "idle" else wait

    def hears(self, number: int) -> Callable[[str, Mapping[str, Any]], None]:
        """What a device tells of itself."""

        def hear(event: str, details: Mapping[str, Any]) -> None:
            seen, population = self._seen, self._population
            with seen.lock:
                if event == "task":
                    version = int(details["version"])
                    seen.versions.setdefault(version, [time.monotonic() - self._began, 0])
                    population.last_version[number] = version
                elif event == "reported":
                    said = str(details.get("message") or "counted")
                    seen.outcomes[said] += 1
                    population.contributions[number] += said == "counted"
                    seen.versions[int(population.last_version[number])][1] += said == "counted"
                elif event in ("dropped", "refused"):
                    seen.outcomes[event] += 1

        return hear


@dataclass(frozen=True, slots=True)
class _Source:
    """A device's examples, whatever the job."""

    data_of: DataOf
    number: int

    def dataset(self, job: str, config: Mapping[str, Any]) -> Dataset:
        return ArrayDataset(*self.data_of(self.number))


def _charter(url: str, root: bytes, clock: Callable[[], datetime], production: bool) -> Charter:
    """The charter that the gateway shows, verified from the root."""
    connection, trust = GatewayConnection(url), Trust(root, production=production)
    try:
        raw = connection.charter(None)
        if raw is None:
            raise Unusable("the gateway shows no charter", where=url, do="See that it is a gateway.")
        return trust.follow(raw, clock())
    finally:
        connection.close()


def _token(charter: Charter, issuer: Issuer, key: Any, number: int, seed: int, at: datetime) -> str:
    named = charter.device_issuer(issuer.name)
    if named is None:
        raise Unusable(
            f"{issuer.name} is no issuer of the charter", where="issuer", do="Have it enrolled: let-devices-in.md."
        )
    device = sha256(f"virtual device {number} of {seed}".encode()).hexdigest()[:32]
    return issue_token(named, issuer.key, charter.id, key, device, at)


def _trace(population: Population, seen: _Seen, seconds: float, *, stopped: bool) -> Trace:
    trace = Trace(registered=population.size, seconds=seconds)
    trace.ended = "the time is up" if stopped else "the job is over"
    trace.outcomes = seen.outcomes
    trace.contributed = int(np.count_nonzero(population.contributions))
    trace.versions = [
        {
            "version": version,
            "seconds": first,
            "updates": int(count),
            "weight": None,
            "staleness": 0.0,
            "lost": 0,
            "accuracy": None,
        }
        for version, (first, count) in sorted(seen.versions.items())
    ]
    return trace
