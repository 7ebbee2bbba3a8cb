"""The broker's copy of the charter: a folder that members publish into and whose timestamp the broker keeps fresh.

What is in the folder is judged from the first root that the operator was given, and against the newest charter that
this broker has seen: an older one, or one that does not hold, is not taken, and the last good one serves until it
lapses. A store whose newest snapshot has no current timestamp gets one, if everything else in it holds; where the
charter wants several brokers' signatures on it, the others are asked (attestation.broker.stamping).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Timestamp

from attestation.broker.storage import Transaction
from attestation.canonical import b64, canonical_bytes
from attestation.errors import BrokerUnavailable
from attestation.ledger.entry import Entry, parse_entry
from policies.charter import Charter, current_charter, load_charter, read_store, sign_timestamp, write_store
from policies.charter.proposal import newest_snapshot
from policies.charter.timestamps import Offered, cosign_timestamp, joined, read_offered
from policies.charter.trust import inspect
from policies.documents import Consortium
from policies.errors import CharterRefused, ProposalRefused, SealwrightError

TIMESTAMP: Final = "metadata/timestamp.json"
_RETRY: Final = timedelta(seconds=5)
Signed = TypeVar("Signed")


@dataclass(frozen=True, slots=True)
class LoadedCharter:
    """A charter that holds, and the files it was read from."""

    charter: Charter
    store: Mapping[str, bytes]
    stamped_until: datetime
    """When its timestamp lapses."""
    digests: Mapping[str, str] = field(repr=False)
    message: bytes = field(repr=False)
    """The store as GET /v1/charter answers it."""

    @property
    def timestamp(self) -> int:
        """Version of its timestamp."""
        return self.charter.versions["timestamp"]

    def entry(self, at: datetime) -> Entry:
        """The ledger entry that says which charter is followed from now on."""
        body: dict[str, Any] = {
            "charter": {"id": self.charter.id, "version": self.charter.version},
            "files": dict(self.digests),
            "timestamp": self.timestamp,
        }
        return Entry("charter", at, body)

    def blobs(self) -> dict[str, bytes]:
        """The files by their SHA-256."""
        return {self.digests[name]: raw for name, raw in self.store.items()}


@dataclass(frozen=True, slots=True)
class Offer:
    """The timestamp that a broker shows the others: a current one, or one that it begins and they complete."""

    consortium: Consortium
    version: int
    """The charter's version."""
    timestamp: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a broker says to an offer: which version of the charter it has, and a timestamp for it that it stands by."""

    version: int
    timestamp: bytes | None = field(repr=False)


def loaded(charter: Charter, store: Mapping[str, bytes]) -> LoadedCharter:
    """Put a verified charter and its files together."""
    digests = {name: sha256(raw).hexdigest() for name, raw in store.items()}
    return LoadedCharter(charter, store, stamped_until(store), digests, store_message(store))


def store_message(store: Mapping[str, bytes]) -> bytes:
    """A store as it is answered over HTTP."""
    return canonical_bytes({"files": {name: b64(raw) for name, raw in store.items()}})


def stamped_until(store: Mapping[str, bytes]) -> datetime:
    """When the timestamp of a verified store lapses."""
    metadata: Metadata[Timestamp] = Metadata.from_bytes(store[TIMESTAMP])
    return metadata.signed.expires


class CharterFolder:
    """The charter in a folder. Calls block (files, signatures); they may come from any thread."""

    def __init__(
        self,
        folder: Path,
        root: bytes,
        keys: Callable[[], Sequence[Ed25519PrivateKey]],
        lifetime: timedelta,
        *,
        known: Charter | None = None,
    ) -> None:
        """`keys` gives the signing keys of which the charter may name one. It may raise Unusable."""
        self._folder = folder
        self._root = root
        self._keys = keys
        self._lifetime = lifetime
        self._known = known
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._retry_at: datetime | None = None
        self._current: LoadedCharter | None = None
        self._begun: bytes | None = None
        self._newest: tuple[tuple[int, ...], bytes] | None = None
        self.problem: str | None = None
        """Why what lies in the folder now was not taken, if it was not."""
        self.lacking = False
        """Whether other brokers have yet to sign a timestamp for what lies in the folder."""

    def stale(self, at: datetime) -> bool:
        """Whether `load` has something to do: the folder changed, the timestamp ages, or there is no charter yet."""
        if self._fingerprint() != self._seen:
            return True
        if self._retry_at is not None:
            return at >= self._retry_at
        return self._current is None or self._ages(self._current.stamped_until, at)

    def load(self, at: datetime) -> LoadedCharter | None:
        """Read the folder; return the charter if it is another than before. What does not hold is told in `problem`."""
        with self._lock:
            self._seen, self._retry_at, self.lacking = self._fingerprint(), None, False
            try:
                found = self._read(at)
            except SealwrightError as error:
                reasons = getattr(error, "reasons", (error.what,))
                self.problem, self._retry_at = "; ".join(reasons[:5]), at + _RETRY
                return None
            self.problem = None
            if self.lacking:
                self._retry_at = at + _RETRY
            if self._current is not None and self._current.digests == found.digests:
                return None
            self._current, self._known = found, found.charter
            return found

    def forget(self) -> None:
        """Take what is in the folder for new at the next `load`."""
        with self._lock:
            self._current, self._seen = None, None

    def put(self, store: Mapping[str, bytes]) -> None:
        """Publish a store into the folder. Raises Unusable if it cannot be written."""
        with self._lock:
            write_store(self._folder, store)

    # --- with other brokers -----------------------------------------------------------------------------------------

    def newest(self) -> bytes:
        """What lies in the folder as it is answered over HTTP, whether its timestamp is complete or not."""
        with self._lock:
            mark = self._fingerprint()
            if self._newest is None or self._newest[0] != mark:
                self._newest = mark, store_message(read_store(self._folder))
            return self._newest[1]

    def offer(self, at: datetime) -> Offer:
        """What to show the other brokers. Raises Refused or Unusable if what lies in the folder does not hold."""
        with self._lock:
            current = self._current
            if current is not None and not self.lacking and self._fingerprint() == self._seen and self.problem is None:
                return Offer(current.charter.consortium, current.charter.version, current.store[TIMESTAMP])
            store = read_store(self._folder)
            newest = current_charter(store, self._root)
            if self._begun is None or not self._good(store, self._begun, at):
                self._begun = self._stamped(store, at)[TIMESTAMP]
            return Offer(newest.consortium, newest.version, self._begun)

    def reply(self, raw: bytes, at: datetime) -> Reply:
        """Judge a timestamp that another broker offers: take it if it is complete and newer, sign it if it is not.

        Raises ProposalRefused with every reason for which this broker does neither; CharterRefused, Unusable.
        """
        with self._lock:
            store = read_store(self._folder)
            offered, version = read_offered(store, raw, at), newest_snapshot(store)
            if offered.snapshot != version:
                return Reply(version, None)
            own = self._own(store, at)
            if own is not None and own.version >= offered.version:
                return Reply(version, own.raw)
            if offered.complete and offered.names:
                self._take({**store, TIMESTAMP: raw}, at)
                return Reply(version, raw)
            return Reply(version, self._first(lambda key: cosign_timestamp(store, offered, key, at, self._lifetime)))

    def join(self, stamps: Iterable[bytes], at: datetime) -> bytes | None:
        """Put together what was begun and what other brokers said to it; return the timestamp if a new one is complete.

        What does not hold counts for nothing.
        """
        with self._lock:
            store = read_store(self._folder)
            good = [raw for raw in stamps if self._good(store, raw, at)]
            if self._begun is not None:
                self._begun = joined(self._begun, good)
                good.append(self._begun)
            for raw in good:
                if read_offered(store, raw, at).complete:
                    self._take({**store, TIMESTAMP: raw}, at)
                    return raw
            return None

    def take(self, store: Mapping[str, bytes], at: datetime) -> bool:
        """Put a newer charter from another broker into the folder; its timestamp is still to come.

        Returns whether it is newer. Raises CharterRefused if it does not hold from the trusted root and what was seen.
        """
        with self._lock:
            here, version = read_store(self._folder), newest_snapshot(store)
            if version <= newest_snapshot(here):
                return False
            charter, work = inspect(store, self._root, at, known=self._known, snapshot=version)
            if charter is None or work.shortfalls:
                reasons = (*work.reasons, *map(str, work.shortfalls))
                do = "Look at the charter's folder of that broker."
                raise CharterRefused("another broker's charter does not hold", where="charter", do=do, reasons=reasons)
            write_store(self._folder, {**store, TIMESTAMP: here[TIMESTAMP]} if TIMESTAMP in here else store)
            return True

    def _good(self, store: Mapping[str, bytes], raw: bytes, at: datetime) -> bool:
        """Whether a timestamp is one to complete or to take: over what lies here, not aged, above the last."""
        try:
            offered = read_offered(store, raw, at)
        except ProposalRefused:
            return False
        own = self._own(store, at)
        above = own is None or offered.version > own.version
        return above and offered.names and not self._ages(offered.expires, at)

    def _own(self, store: Mapping[str, bytes], at: datetime) -> Offered | None:
        """The store's timestamp, if it is complete, names the newest snapshot and does not age."""
        try:
            own = read_offered(store, store.get(TIMESTAMP, b""), at)
        except ProposalRefused:
            return None
        return own if own.complete and own.names and not self._ages(own.expires, at) else None

    def _take(self, store: Mapping[str, bytes], at: datetime) -> None:
        load_charter(store, self._root, at, known=self._known)
        write_store(self._folder, store)
        self._begun = None

    # --- within -----------------------------------------------------------------------------------------------------

    def _stamped(self, store: Mapping[str, bytes], at: datetime) -> dict[str, bytes]:
        """The store with a timestamp by the key that its charter names. Raises ProposalRefused or Unusable."""
        return self._first(lambda key: sign_timestamp(store, key, at, self._lifetime))

    def _first(self, attempt: Callable[[Ed25519PrivateKey], Signed]) -> Signed:
        """What the first of the keys that may makes of it."""
        keys = self._keys()
        for key in keys[1:]:
            with suppress(ProposalRefused):
                return attempt(key)
        return attempt(keys[0])

    def _read(self, at: datetime) -> LoadedCharter:
        store = read_store(self._folder)
        charter: Charter | None = None
        try:
            charter = load_charter(store, self._root, at, known=self._known)
            fresh = not self._ages(stamped_until(store), at)
        except SealwrightError:
            fresh = False  # a newer snapshot, a lapsed timestamp, or a charter that does not hold: told apart below
        if charter is not None and fresh:
            return loaded(charter, store)
        stamped = self._stamped(store, at)
        self.lacking = not read_offered(stamped, stamped[TIMESTAMP], at).complete
        if charter is not None and self.lacking:
            return loaded(charter, store)  # it holds for a while yet
        charter = load_charter(stamped, self._root, at, known=self._known)
        write_store(self._folder, stamped)
        self._seen = self._fingerprint()
        return loaded(charter, stamped)

    def _ages(self, stamped_until: datetime, at: datetime) -> bool:
        return stamped_until - at < self._lifetime / 2

    def _fingerprint(self) -> tuple[int, ...]:
        marks: list[int] = []
        for path in (self._folder / "metadata", self._folder / TIMESTAMP):
            try:
                status = path.stat()
                marks += (status.st_ino, status.st_mtime_ns)
            except OSError:
                marks += (0, 0)
        return tuple(marks)


def charter_from_ledger(step: Transaction, root: bytes) -> Charter | None:
    """The newest charter that the ledger names, as it held when it was logged: nothing older is taken after it."""
    raw, store = step.last_entry("charter"), charter_files(step)
    return None if raw is None or store is None else load_charter(store, root, parse_entry(raw).time)


def charter_files(step: Transaction) -> dict[str, bytes] | None:
    """The files of the newest charter that the ledger names, not verified."""
    raw = step.last_entry("charter")
    if raw is None:
        return None
    store: dict[str, bytes] = {}
    for name, digest in parse_entry(raw).body["files"].items():
        content = step.blob(digest)
        if content is None:
            raise BrokerUnavailable(f"the database has lost the charter's file {name}", where="database")
        store[name] = content
    return store
