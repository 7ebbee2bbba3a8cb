"""The broker's copy of the charter: a folder that members publish into and whose timestamp the broker keeps fresh.

What is in the folder is judged from the first root that the operator was given, and against the newest charter that
this broker has seen: an older one, or one that does not hold, is not taken, and the last good one serves until it
lapses. A store whose newest snapshot has no current timestamp gets one, if everything else in it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Timestamp

from attestation.broker.storage import Transaction
from attestation.canonical import b64, canonical_bytes
from attestation.errors import BrokerUnavailable
from attestation.ledger.entry import Entry, parse_entry
from policies.charter import Charter, load_charter, read_store, write_store
from policies.charter.signing import sign_timestamp
from policies.errors import ProposalRefused, SealwrightError

TIMESTAMP: Final = "metadata/timestamp.json"
_RETRY: Final = timedelta(seconds=5)


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


def loaded(charter: Charter, store: Mapping[str, bytes]) -> LoadedCharter:
    """Put a verified charter and its files together."""
    message = canonical_bytes({"files": {name: b64(raw) for name, raw in store.items()}})
    digests = {name: sha256(raw).hexdigest() for name, raw in store.items()}
    return LoadedCharter(charter, store, stamped_until(store), digests, message)


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
        self.problem: str | None = None
        """Why what lies in the folder now was not taken, if it was not."""

    def stale(self, at: datetime) -> bool:
        """Whether `load` has something to do: the folder changed, the timestamp ages, or there is no charter yet."""
        if self._current is None or self._fingerprint() != self._seen:
            return True
        if self._retry_at is not None and at >= self._retry_at:
            return True
        return self._ages(self._current.stamped_until, at)

    def load(self, at: datetime) -> LoadedCharter | None:
        """Read the folder; return the charter if it is another than before. What does not hold is told in `problem`."""
        with self._lock:
            self._seen, self._retry_at = self._fingerprint(), None
            try:
                found = self._read(at)
            except SealwrightError as error:
                reasons = getattr(error, "reasons", (error.what,))
                self.problem, self._retry_at = "; ".join(reasons[:5]), at + _RETRY
                return None
            self.problem = None
            if self._current is not None and self._current.digests == found.digests:
                return None
            self._current, self._known = found, found.charter
            return found

    def forget(self) -> None:
        """Take what is in the folder for new at the next `load`."""
        with self._lock:
            self._current = None

    def put(self, store: Mapping[str, bytes]) -> None:
        """Publish a store into the folder. Raises Unusable if it cannot be written."""
        with self._lock:
            write_store(self._folder, store)

    def _stamped(self, store: Mapping[str, bytes], at: datetime) -> dict[str, bytes]:
        """The store with a timestamp by the key that its charter names. Raises ProposalRefused or Unusable."""
        keys = self._keys()
        for key in keys[1:]:
            with suppress(ProposalRefused):
                return sign_timestamp(store, key, at, self._lifetime)
        return sign_timestamp(store, keys[0], at, self._lifetime)

    def _read(self, at: datetime) -> LoadedCharter:
        store = read_store(self._folder)
        charter: Charter | None = None
        try:
            charter = load_charter(store, self._root, at, known=self._known)
            fresh = not self._ages(stamped_until(store), at)
        except SealwrightError:
            fresh = False  # a newer snapshot, a lapsed timestamp, or a charter that does not hold: told apart below
        if charter is None or not fresh:
            stamped = self._stamped(store, at)
            charter = load_charter(stamped, self._root, at, known=self._known)
            write_store(self._folder, stamped)
            store, self._seen = stamped, self._fingerprint()
        return loaded(charter, store)

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
