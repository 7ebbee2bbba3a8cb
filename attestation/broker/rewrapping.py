"""Replacing the key-encryption key while the broker serves.

The settings and files say which KEK is in use and which were before; they are read again when the operator says so
(SIGHUP), every half minute, and when a resource is under a KEK that is not known here: another process may have put it
there. Then, resource by resource: unwrap its key with the KEK that it is under, wrap it with the one in use, and keep
it if it is still the one that was read. A deposit that comes between wins; a process that dies leaves each resource
under one KEK or the other, and both are at hand until none is left under the old one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.broker.config import BrokerConfig, load_config
from attestation.broker.keks import KekFile, KeyEncryption, KeyRing, rewrap_resource
from attestation.broker.peer_kek import PeerKek
from attestation.broker.storage import Storage
from attestation.broker.transaction import StoredResource, Transaction
from policies.charter import Charter
from policies.errors import SealwrightError

BATCH: Final = 32
"""Resources in one transaction."""
REFRESH_SECONDS: Final = 1.0
"""How often an unknown KEK makes the settings be read again."""


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What was done: how many resources are under the KEK in use now, and what is against the others."""

    key_id: str
    done: int
    problems: tuple[str, ...]


class KekKeeper:
    """The KEKs of one broker, as its settings have them now. Calls block; they may come from any thread."""

    def __init__(self, settings: Path) -> None:
        """`settings`: the path of broker.toml. Raises Unusable or UnusableKey if it names no usable KEK."""
        self._path = settings
        self._lock = threading.Lock()
        self._refreshed = 0.0
        self._named: object = None
        self.ring = KeyRing(*self._open(load_config(settings)), missing=self._missing)

    def look(self) -> bool:
        """Read the settings again; return whether other KEKs are used from now on. Raises Unusable or UnusableKey."""
        with self._lock:
            config = load_config(self._path)
            before, named = self.ring.members, self._named
            if named == (config.kek, config.old_keks) and not any(isinstance(kek, KekFile) for kek in before):
                return False
            found = self._open(config)
            same = [kek.key_id for kek in (found[0], *found[1])] == [kek.key_id for kek in before]
            if same and named == self._named:
                return False
            self.ring.replace(*found)
            for kek in before:
                if kek not in self.ring.members:
                    kek.close()
            return True

    def tend(self, charter: Charter | None) -> bool:
        """Have the keys that lie with peers; return whether others are used from now on. Raises SealwrightError."""
        changed = False
        for kek in self.ring.members:
            changed |= isinstance(kek, PeerKek) and kek.tend(charter)
        return changed

    def _open(self, config: BrokerConfig) -> tuple[KeyEncryption, list[KeyEncryption]]:
        current, others = config.open_keks(self._path.parent)
        self._named = (config.kek, config.old_keks)
        return current, others

    def _missing(self) -> None:
        """A resource is under a KEK that is not in the ring."""
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = time.monotonic()
        try:
            self.look()
        except SealwrightError:
            return  # whoever asked hears that the KEK is not here


async def rewrap_all(storage: Storage, keks: KeyRing) -> Rewrapped:
    """Put every resource under the KEK in use. Raises BrokerUnavailable if the database is out of reach."""
    problem = await asyncio.to_thread(keks.probe)  # a vault's newest version is known by asking it
    current, after, done, problems = keks.key_id, "", 0, list[str]()
    while problem is None:
        found = await storage.look(_next_under_others(current, after))
        if not found:
            break
        after, moved = found[-1].name, list[tuple[StoredResource, StoredResource]]()
        for stored in found:
            try:
                moved.append((stored, await asyncio.to_thread(rewrap_resource, stored, keks)))
            except SealwrightError as error:
                problems.append(f"{stored.name}: {error.what}")
        if moved:
            done += await _keep(storage, moved)
    return Rewrapped(current, done, (*([problem] if problem else []), *problems))


def _next_under_others(key_id: str, after: str) -> Callable[[Transaction], list[StoredResource]]:
    return lambda step: step.resources_under_others(key_id, after, BATCH)


async def _keep(storage: Storage, moved: Sequence[tuple[StoredResource, StoredResource]]) -> int:
    kept, _ = await storage.transact(
        lambda step: sum(step.replace_resource(old, new) for old, new in moved), cosigned=False
    )
    return kept
