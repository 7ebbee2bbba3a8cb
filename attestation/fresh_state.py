"""The fresh-state store of a vault: a few small values in one file, of which brokers remember generation and root.

What must never go back although the host keeps the disk (counters, the newest checkpoint of something larger) stands in
it by name. The file is replaced whole: written beside, synced, renamed, the folder synced. So a crash at any moment
leaves the store of before or the new one. It is sealed with AES-256-GCM under a key that is derived from the vault's.

A root is 64 bytes: HMAC-SHA256 over vault, generation and content, then HMAC-SHA256 over vault, generation and that.
It tells nobody anything of the content; and who has the key knows a made-up one without knowing the content.

File: `seal-state-1`, a zero byte, 12 bytes of nonce, the ciphertext of the canonical JSON of `{"entries": {name:
base64}, "generation", "vault"}`.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.canonical import b64, canonical_bytes, read_canonical, unb64
from attestation.errors import StoreRefused
from attestation.vaults import KEY_SIZE, MAX_GENERATION, Mark
from policies.errors import Unusable

FILE: Final = "fresh-state"
"""The store's file in its folder."""
MAX_ENTRIES: Final = 256
MAX_VALUE: Final = 64 * 1024
MAX_STORE: Final = 1024 * 1024
"""Bytes of all values together."""
_MAGIC: Final = b"seal-state-1\0"
_NONCE: Final = 12
_MAX_FILE: Final = 2 * MAX_STORE
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class VaultKeys:
    """What is derived from a vault's key (KEY_SIZE bytes), each for one purpose. It never prints itself."""

    volume: bytes
    seal: bytes
    root: bytes

    def __repr__(self) -> str:
        return "VaultKeys(…)"


@dataclass(frozen=True, slots=True)
class Store:
    """A store's content: its generation (0: nothing was ever written) and its values by name."""

    generation: int
    entries: Mapping[str, bytes]


def derive_keys(vault: str, key: bytes) -> VaultKeys:
    """The keys of a vault: for its volume, for sealing its store, for roots (HKDF-SHA256, RFC 5869)."""

    def derived(purpose: str) -> bytes:
        info = b"sealwright-vault-v1\0" + canonical_bytes({"purpose": purpose, "vault": vault})
        return HKDF(hashes.SHA256(), KEY_SIZE, None, info).derive(key)

    return VaultKeys(derived("volume"), derived("store"), derived("root"))


def store_root(vault: str, keys: VaultKeys, store: Store) -> Mark:
    """The store's generation and root."""
    content = {name: sha256(value).hexdigest() for name, value in store.entries.items()}
    about = {"generation": store.generation, "vault": vault}
    body = _mac(keys.root, b"content", {**about, "content": content})
    return Mark(generation=store.generation, root=(body + _mac(keys.root, b"root", {**about, "of": b64(body)})).hex())


def is_authentic(vault: str, keys: VaultKeys, mark: Mark) -> bool:
    """Whether the root was made with these keys for a store of this generation."""
    raw = bytes.fromhex(mark.root)
    about = {"generation": mark.generation, "of": b64(raw[:32]), "vault": vault}
    return len(raw) == 64 and hmac.compare_digest(_mac(keys.root, b"root", about), raw[32:])


def check_entries(entries: Mapping[str, bytes]) -> None:
    """Raise Unusable for what no store holds: other names, too many values, too large ones."""
    do = f"Keep at most {MAX_ENTRIES} values of {MAX_VALUE} bytes, {MAX_STORE} in all; more belongs into the volume."
    wrong = [name for name in entries if not _NAME.fullmatch(name)]
    if wrong:
        raise Unusable(
            f"{wrong[0][:80]!r} is no name in a vault's store", where="store", do="Use a short lower-case word."
        )
    if len(entries) > MAX_ENTRIES:
        raise Unusable(f"the store has {len(entries)} values", where="store", do=do)
    if any(len(value) > MAX_VALUE for value in entries.values()) or sum(map(len, entries.values())) > MAX_STORE:
        raise Unusable("the store's values are too large", where="store", do=do)


class StoreFile:
    """The file of a vault's store in `folder`, which must be there. One process uses it at a time."""

    def __init__(
        self, folder: Path, vault: str, keys: VaultKeys, *, randomness: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._path = folder / FILE
        self._vault = vault
        self._keys = keys
        self._randomness = randomness

    def read(self) -> Store | None:
        """What is in it; None if there is no file. Raises StoreRefused if it was not written with this vault's key."""
        raw = self._bytes()
        if raw is None:
            return None
        start = len(_MAGIC) + _NONCE
        try:
            if not raw.startswith(_MAGIC):
                raise ValueError
            plain = AESGCM(self._keys.seal).decrypt(raw[len(_MAGIC) : start], raw[start:], self._bound())
        except (InvalidTag, ValueError) as error:
            raise StoreRefused(("its store was changed, or is another vault's",), vault=self._vault) from error
        content = read_canonical(plain, where=str(self._path), limit=_MAX_FILE)
        generation, entries = content.get("generation"), content.get("entries")
        if type(generation) is not int or not 1 <= generation <= MAX_GENERATION or not isinstance(entries, dict):
            raise StoreRefused(("its store is of another form than this program writes",), vault=self._vault)
        return Store(generation, {name: unb64(value, where=str(self._path)) for name, value in entries.items()})

    def write(self, store: Store) -> None:
        """Put a store in the place of the one that is there: whole or not at all, on the disk when this returns.

        Raises Unusable for entries that no store holds, OSError if the disk does not take it.
        """
        check_entries(store.entries)
        plain = canonical_bytes(
            {
                "entries": {name: b64(value) for name, value in store.entries.items()},
                "generation": store.generation,
                "vault": self._vault,
            }
        )
        nonce = self._randomness(_NONCE)
        raw = _MAGIC + nonce + AESGCM(self._keys.seal).encrypt(nonce, plain, self._bound())
        fresh = self._path.with_name(f".{FILE}.new")
        with suppress(FileNotFoundError):  # what a crash has left
            fresh.unlink()
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        _sync(self._path.parent)

    def _bytes(self) -> bytes | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreRefused((f"its store cannot be read: {error.strerror}",), vault=self._vault) from error
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreRefused(("its store is no regular file",), vault=self._vault)
            raw = file.read(_MAX_FILE + 1)
        if len(raw) > _MAX_FILE:
            raise StoreRefused((f"its store is larger than {_MAX_FILE} bytes",), vault=self._vault)
        return raw

    def _bound(self) -> bytes:
        return _MAGIC + self._vault.encode("ascii")


def _mac(key: bytes, purpose: bytes, about: Mapping[str, object]) -> bytes:
    return hmac.digest(key, purpose + b"\0" + canonical_bytes(dict(about)), "sha256")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
