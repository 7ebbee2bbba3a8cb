"""Which charter a broker follows, and the keys of its own that this charter names.

Nothing is decided by a charter that the ledger does not name: a new one is written down first, under the keys that it
gives the broker. Several processes of one broker share a ledger; whoever finds a newer charter in it catches up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from attestation.broker.charters import CharterFolder, LoadedCharter, charter_files
from attestation.broker.own_keys import OwnKeys
from attestation.broker.storage import Storage, Transaction, key_name
from attestation.errors import BrokerUnavailable
from attestation.split import kept_as
from policies.charter import Charter
from policies.documents import BrokerEntry
from policies.errors import Unusable


class Following:
    """The charter of the broker called `name`, and its `keys` under it."""

    def __init__(
        self,
        name: str,
        *,
        storage: Storage,
        charters: CharterFolder,
        keys: OwnKeys,
        find_keys: Callable[[BrokerEntry], OwnKeys],
    ) -> None:
        """`find_keys` finds the keys of a charter's entry; it raises Unusable if they are not here."""
        self.charters = charters
        self.keys = keys
        self.rotated: Callable[[BrokerEntry], object] = lambda _: None
        """Told when the charter has given the broker other keys, which it has taken."""
        self._name = name
        self._storage = storage
        self._find_keys = find_keys
        self._lock = asyncio.Lock()
        self._newest: LoadedCharter | None = None
        self._behind = False

    async def charter(self, at: datetime) -> LoadedCharter:
        """The charter to follow at `at`; a new one is in the ledger before anything is decided by it.

        Raises BrokerUnavailable if none holds.
        """
        if self._behind or self.charters.stale(at):
            async with self._lock:
                if self._behind:
                    await self._catch_up()
                if self.charters.stale(at):
                    await self._reload(at)
        if self._newest is None or at >= self._newest.charter.expires:
            why = self.charters.problem or "it has lapsed"
            raise BrokerUnavailable(f"the broker has no charter that holds: {why}", where="charter")
        return self._newest

    @property
    def newest(self) -> Charter | None:
        """The charter that is followed now, lapsed or not."""
        return None if self._newest is None else self._newest.charter

    async def look_around(self) -> None:
        """Notice that another process on the same database follows a newer charter. Raises BrokerUnavailable."""
        followed = await self._storage.look(lambda step: step.followed())
        if self._newest is not None and _version(followed) > self._newest.charter.version:
            self._behind = True

    def holds(self, step: Transaction, charter: Charter) -> bool:
        """In the writer: whether the ledger named this charter last."""
        followed = step.followed()
        if followed == charter_mark(charter):
            return True
        self._behind = self._behind or _version(followed) > charter.version
        return False

    def demand(self, step: Transaction, charter: Charter) -> None:
        """In the writer: raise BrokerUnavailable if the ledger has named another charter since."""
        if not self.holds(step, charter):
            raise BrokerUnavailable("the charter moved on while this was decided", where="charter")

    async def _reload(self, at: datetime) -> None:
        """Look at the charter's folder again, and follow what is new in it."""
        found = await asyncio.to_thread(self.charters.load, at)
        if found is None:
            return
        try:
            entry = found.charter.broker(self._name)
            if entry is None:
                do = "Put the broker into the charter again, or end it."
                raise Unusable(f"the charter has no broker {self._name} any more", where="charter", do=do)
            keys = self.keys if self.keys.are(entry) else await asyncio.to_thread(self._find_keys, entry)
            key = key_name(keys.signing.public_key())
            self._storage.add_key(keys.signing)
            self._storage.cosigner.follow(found.charter.consortium, entry)
            ahead, _ = await self._storage.transact(lambda step: _write_down(step, found, key, at), cosigned=False)
            if ahead:
                self._behind = True
                what = f"another process of this broker follows version {ahead} of the charter"
                raise BrokerUnavailable(what, where="charter")
        except BaseException:
            self.charters.forget()  # nothing is decided by a charter that the ledger does not name: load it again
            raise
        self._newest = found
        if keys != self.keys:
            self.keys = keys
            self.rotated(entry)

    async def _catch_up(self) -> None:
        """Put the newest charter that the ledger names into the folder, from which it is judged like any other."""
        store = await self._storage.look(charter_files)
        if store is not None:
            await asyncio.to_thread(self.charters.put, store)
        self._behind = False


def charter_mark(charter: Charter) -> str:
    """How the database names the charter that is followed."""
    return f"{charter.id} {charter.version}"


def _version(mark: str | None) -> int:
    return int((mark or "").rpartition(" ")[2] or 0)


def _write_down(step: Transaction, found: LoadedCharter, key: str, at: datetime) -> int:
    """Write down that a charter is followed, from this commit on under this key; 0, or the newer version that is."""
    ahead = _version(step.followed())
    if ahead > found.charter.version:
        return ahead
    step.append(found.entry(at), blobs=found.blobs())
    step.follow(charter_mark(found.charter))
    step.set_signing_key(key)
    for split in found.charter.splits():
        step.drop_resource(split.resource)  # no broker keeps whole what is split, nor a share that was replaced
        for generation in step.generations(split.resource):
            if generation < split.generation:
                step.drop_resource(kept_as(split.resource, generation))
    return 0
