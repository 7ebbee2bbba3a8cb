"""Key-encryption keys (KEKs): where they live, and a resource as it lies under one.

A resource lies under a key of its own (AES-256-GCM, bound to its name and serial); that key lies under the KEK. With a
file for the KEK, who can read the file and the database can read the resources: the broker is trusted for its owner's
own resources and no more (docs/how-to/run-a-broker.md). A token (attestation.broker.token_kek) or a vault
(attestation.broker.transit_kek) keeps the KEK from who has copied both, not from who runs the broker.

Whatever a KEK does has an end within seconds; one that is out of reach is BrokerUnavailable, and is asked anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from attestation.broker.transaction import StoredResource
from attestation.canonical import canonical_bytes
from attestation.errors import BrokerUnavailable
from policies.errors import UnusableKey
from policies.keys import read_secret, write_secret

T = TypeVar("T")
KEK_SIZE: Final = 32
NONCE_SIZE: Final = 12
PROBE_SECONDS: Final = 2.0
"""For how long the outcome of a probe is told again."""
_PROBE: Final = b"sealwright-kek-probe-v1"


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A key under a KEK: which one, and what it made of it."""

    key_id: str
    value: bytes


class KeyEncryption(Protocol):
    """Where a key-encryption key lives. Calls block; they may come from any thread."""

    @property
    def key_id(self) -> str:
        """Under which key it wraps now, without saying anything of it. At most 255 characters."""

    def opens(self, key_id: str) -> bool:
        """Whether what lies under this key is its to open: a vault's key has earlier versions."""

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """Encrypt a resource's key, bound to `bound`. Raises BrokerUnavailable."""

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """Decrypt it. Raises BrokerUnavailable if it was changed or moved, or the KEK is out of reach."""

    def close(self) -> None:
        """End its sessions."""


class KekFile:
    """A key-encryption key in a file of 32 bytes, mode 0600."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._id = "file:" + sha256(b"sealwright-kek-id\0" + key).hexdigest()[:16]

    @property
    def key_id(self) -> str:
        """`file:` and a digest."""
        return self._id

    def opens(self, key_id: str) -> bool:
        """Its own."""
        return key_id == self._id

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """AES-256-GCM: nonce, ciphertext, tag."""
        return Wrapped(self._id, _encrypt(self._cipher, key, bound))

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """Undo `wrap`."""
        return _decrypt(self._cipher, wrapped.value, bound, "the key-encryption key")

    def close(self) -> None:
        """Nothing."""


class KeyRing:
    """The KEK under which resources are put, and those from which they still have to be taken. A KeyEncryption itself.

    `replace` changes both while the broker serves; what was begun with the old ones ends with them.
    """

    def __init__(
        self,
        current: KeyEncryption,
        others: Sequence[KeyEncryption] = (),
        *,
        missing: Callable[[], None] = lambda: None,
    ) -> None:
        """`missing` is called when none of them is for a key; it may replace them. It must not raise."""
        self._all: tuple[KeyEncryption, ...] = (current, *others)
        self._missing = missing
        self._lock = threading.Lock()
        self._probed: tuple[float, str | None] = (0.0, None)

    @property
    def key_id(self) -> str:
        """That of the KEK in use."""
        return self._all[0].key_id

    @property
    def members(self) -> tuple[KeyEncryption, ...]:
        """The KEK in use, then the others."""
        return self._all

    def replace(self, current: KeyEncryption, others: Sequence[KeyEncryption] = ()) -> None:
        """Use these from now on."""
        self._all, self._probed = (current, *others), (0.0, None)

    def opens(self, key_id: str) -> bool:
        """Whether any of them is for this key."""
        if not any(kek.opens(key_id) for kek in self._all):
            self._missing()
        return any(kek.opens(key_id) for kek in self._all)

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """Under the KEK in use."""
        return self._with_these(lambda keks: keks[0].wrap(key, bound))

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """By whichever is for it. Raises BrokerUnavailable if none is."""
        return self._with_these(lambda keks: _unwrap(keks, wrapped, bound))

    def _with_these(self, work: Callable[[tuple[KeyEncryption, ...]], T]) -> T:
        """Do `work`, once more if the KEKs were replaced, and the old ones closed, under its hands."""
        keks = self._all
        try:
            return work(keks)
        except BrokerUnavailable:
            if self._all is keks:
                raise
            return work(self._all)

    def probe(self) -> str | None:
        """Why the KEK in use cannot be used now; None if it can. Asks it at most every PROBE_SECONDS."""
        with self._lock:
            at, problem = self._probed
            if time.monotonic() - at < PROBE_SECONDS:
                return problem
            try:
                key = os.urandom(KEK_SIZE)
                whole = self.unwrap(self.wrap(key, _PROBE), _PROBE) == key
                problem = None if whole else "the key-encryption key does not give back what it took"
            except BrokerUnavailable as error:
                problem = error.what
            self._probed = time.monotonic(), problem
            return problem

    def close(self) -> None:
        """End all their sessions."""
        for kek in self._all:
            kek.close()


def _unwrap(keks: Sequence[KeyEncryption], wrapped: Wrapped, bound: bytes) -> bytes:
    for kek in keks:
        if kek.opens(wrapped.key_id):
            return kek.unwrap(wrapped, bound)
    what = f"it is under the key-encryption key {wrapped.key_id}, which this broker has not got"
    raise BrokerUnavailable(what, where="key-encryption key")


def load_kek(path: Path) -> KekFile:
    """Read a KEK file. Raises UnusableKey if it is missing, open to others, or no 32 bytes."""
    raw = read_secret(path)
    if len(raw) != KEK_SIZE:
        raise UnusableKey(
            f"a key-encryption key has {KEK_SIZE} bytes", where=str(path), do="Make it with `seal broker init`."
        )
    return KekFile(raw)


def create_kek(path: Path) -> None:
    """Make a new KEK file."""
    write_secret(path, os.urandom(KEK_SIZE))


def old_keks(path: Path) -> Path:
    """The folder of the KEK files that were in use before the one at `path`."""
    return path.with_name(f"{path.name}.old")


def replace_kek(path: Path) -> tuple[str, str]:
    """Put a new KEK file in place of the one at `path`, which is kept in `old_keks`; return the ids of old and new.

    Dying half-way leaves the old one in use. Raises UnusableKey if there is none.
    """
    old, folder = load_kek(path), old_keks(path)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_secret(folder / old.key_id.removeprefix("file:"), read_secret(path))
    _sync(folder)
    create_kek(path)
    _sync(path.parent)
    return old.key_id, load_kek(path).key_id


def seal_resource(name: str, serial: int, value: bytes, kek: KeyEncryption) -> StoredResource:
    """A resource as it is stored. Raises BrokerUnavailable."""
    key, bound = AESGCM.generate_key(256), _bound(name, serial)
    wrapped = kek.wrap(key, bound)
    return StoredResource(name, serial, wrapped.key_id, wrapped.value, _encrypt(AESGCM(key), value, bound))


def open_resource(stored: StoredResource, kek: KeyEncryption) -> bytes:
    """The value of a stored resource. Raises BrokerUnavailable if its key is another's, or its bytes were changed."""
    if not kek.opens(stored.key_id):
        what = f"{stored.name} is under another key-encryption key ({stored.key_id})"
        raise BrokerUnavailable(what, where="key-encryption key")
    bound = _bound(stored.name, stored.serial)
    key = kek.unwrap(Wrapped(stored.key_id, stored.wrapped_key), bound)
    return _decrypt(AESGCM(key), stored.sealed, bound, f"the key of {stored.name}")


def rewrap_resource(stored: StoredResource, kek: KeyEncryption) -> StoredResource:
    """The same resource with its key under the KEK that is in use now. Raises BrokerUnavailable."""
    bound = _bound(stored.name, stored.serial)
    wrapped = kek.wrap(kek.unwrap(Wrapped(stored.key_id, stored.wrapped_key), bound), bound)
    return StoredResource(stored.name, stored.serial, wrapped.key_id, wrapped.value, stored.sealed)


def changed(what: str) -> BrokerUnavailable:
    """The refusal of stored bytes that do not open."""
    return BrokerUnavailable(f"stored bytes do not open under {what}: they were changed", where="database")


def _bound(name: str, serial: int) -> bytes:
    return b"sealwright-resource-v1\0" + canonical_bytes({"resource": name, "serial": serial})


def _encrypt(cipher: AESGCM, value: bytes, bound: bytes) -> bytes:
    nonce = os.urandom(NONCE_SIZE)
    return nonce + cipher.encrypt(nonce, value, bound)


def _decrypt(cipher: AESGCM, sealed: bytes, bound: bytes, what: str) -> bytes:
    try:
        return cipher.decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], bound)
    except (InvalidTag, ValueError) as error:
        raise changed(what) from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
