"""Key-encryption keys that a broker has from its peers: it is an attested guest, and they lie in its vault.

The broker is enrolled (role `broker`, its own name) and attests, at its start, to the brokers that its init-data names:
its peers. The key of its vault (attestation.guest_vault) was made here and dealt out to them; any k of them, more than
half, release their shares, as the owner's policy for `MEMBER/vault-broker/NAME` and the charter's floor say, and write
it down. The vault's store, a file that the host cannot read, change or put back to an older one, has the
key-encryption keys by their numbers. To rotate is to save one more.

Until the peers have answered it is *locked*: the broker appraises guests and tells the time, and whatever needs a
resource's key is refused as not available. When no peer can answer either, members start it (attestation.broker.
cold_start): what they give is joined here, and believed only if k peers tell of a store that was made with it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from attestation.binding import NONCE_SIZE
from attestation.broker import cold_start
from attestation.broker.cold_start import Answered, Recovery, Request
from attestation.broker.keks import KEK_SIZE, Wrapped, changed
from attestation.broker_session import Attester
from attestation.canonical import b64, canonical_bytes, read_json_object
from attestation.client import GuestSession
from attestation.errors import BrokerUnavailable
from attestation.fresh_state import StoreFile, VaultKeys, is_authentic, store_root
from attestation.guest_keys import GuestKeys
from attestation.guest_vault import GuestVault, open_vault
from attestation.messages import EvidenceMessage, check_message
from attestation.vaults import KEY_SIZE, agreed_deal, judge_store
from policies.charter import Charter
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import parse_init_data
from policies.vaults import vault_name

KEPT: Final = 8
"""Key-encryption keys that are kept; a copy of the database that is older than so many rotations cannot be read."""
LOCKED: Final = "peers:locked"
"""The name of the key in use as long as there is none."""
RECOVERY: Final = "recovery.json"
_ENTRY: Final = "kek-"
_NONCE: Final = 12


class PeerKek:
    """The key-encryption keys of a broker's vault. A KeyEncryption; any thread may use it."""

    def __init__(self, folder: Path, init_data: bytes, attester: Callable[[], Attester]) -> None:
        """`folder` is for the store and the custodians' shares, and for nothing else; nothing is asked yet."""
        self.wanted = 1
        """The number of the key that is to be in use; a higher one than there is makes a new key."""
        self.problem = "its peers have not been asked yet"
        self._folder = folder
        self._init_data = init_data
        self._init = parse_init_data(init_data)
        self._attester = attester
        self._lock = threading.RLock()
        self._session: GuestSession | None = None
        self._vault: GuestVault | None = None
        self._keys: Mapping[int, bytes] = {}
        self._boot = GuestKeys()
        self._request: Request | None = None
        self._given: dict[str, bytes] = {}

    # --- a KeyEncryption --------------------------------------------------------------------------------------------

    @property
    def key_id(self) -> str:
        """`peers:` and a digest; as long as it is locked, no key's."""
        keys = self._keys
        return _key_id(keys[max(keys)]) if keys else LOCKED

    @property
    def locked(self) -> bool:
        """Whether it has no key yet."""
        return not self._keys

    def opens(self, key_id: str) -> bool:
        """One of its keys; which they are, a locked one does not know."""
        if self.locked:
            return key_id.startswith("peers:")
        return any(_key_id(key) == key_id for key in self._keys.values())

    def wrap(self, key: bytes, bound: bytes) -> Wrapped:
        """AES-256-GCM under the newest. Raises BrokerUnavailable if it is locked."""
        keys = self._unlocked()
        newest, nonce = keys[max(keys)], os.urandom(_NONCE)
        return Wrapped(_key_id(newest), nonce + AESGCM(newest).encrypt(nonce, key, bound))

    def unwrap(self, wrapped: Wrapped, bound: bytes) -> bytes:
        """Undo `wrap`."""
        key = next((key for key in self._unlocked().values() if _key_id(key) == wrapped.key_id), None)
        if key is None:
            what = f"it is under the key {wrapped.key_id}, which this broker's vault has not got"
            raise BrokerUnavailable(what, where="key-encryption key")
        try:
            return AESGCM(key).decrypt(wrapped.value[:_NONCE], wrapped.value[_NONCE:], bound)
        except (InvalidTag, ValueError) as error:
            raise changed("the key-encryption key") from error

    def close(self) -> None:
        """End idle connections; the keys stay until the process ends."""
        session = self._session
        if session is not None:
            session.close()

    def _unlocked(self) -> Mapping[int, bytes]:
        keys = self._keys
        if not keys:
            raise BrokerUnavailable(f"the key-encryption key is locked: {self.problem}", where="key-encryption key")
        return keys

    # --- from peers -------------------------------------------------------------------------------------------------

    def tend(self, charter: Charter | None) -> bool:
        """Open the vault if it is not, make the key that is wanted if there is none, and deal out to the custodians of
        `charter` what they lack; return whether another key is in use now. Raises what `open_vault` raises, and
        Unusable."""
        with self._lock:
            before = self.key_id
            try:
                self._tend(charter)
            except SealwrightError as error:
                self.problem = "; ".join(error.reasons) if isinstance(error, Refused) else error.what
                raise
            return self.key_id != before

    def _tend(self, charter: Charter | None) -> None:
        if self._vault is None:
            session = self._attested()
            vault = open_vault(session, self._mount, vault=self._name(session))
            keys = _read_keys(vault.entries)
            if not keys:
                keys = self._saved(vault, {1: os.urandom(KEK_SIZE)})
            self._vault, self._keys = vault, keys
            self._request, self._given = None, {}
        if self.wanted > max(self._keys):
            self._attested()  # a lease of its own for the calls that follow
            self._keys = self._saved(self._vault, {**self._keys, self.wanted: os.urandom(KEK_SIZE)})
        if charter is not None:
            self._deal_recovery(self._vault, charter)

    def _saved(self, vault: GuestVault, keys: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """Have k peers commit the store with these keys: what they have not, no resource is put under."""
        kept = dict(sorted(keys.items())[-KEPT:])
        vault.save({f"{_ENTRY}{number:06}": key for number, key in kept.items()})
        return kept

    def _attested(self) -> GuestSession:
        if self._session is None:
            self._session = GuestSession(self._attester(), self._init_data)
        self._session.attest()
        return self._session

    def _name(self, session: GuestSession) -> str:
        entry = session.charter.broker(self._init.name)
        if self._init.role != "broker" or entry is None:
            do = "Launch it with the init-data under which the broker is enrolled."
            raise Unusable(f"{self._init.role}/{self._init.name} is no broker", where="init-data", do=do)
        if self._init.name in {broker.name for broker in self._init.brokers} or len(self._init.brokers) < 2:
            do = "Name at least two brokers of other members in its init-data, and not itself."
            raise Unusable("a broker's keys lie with its peers, two at least", where="init-data", do=do)
        return vault_name(entry.member, "broker", entry.name)

    def _mount(self, _: bytes, fresh: bool) -> Path:
        """The folder of the store, which is sealed by itself: there is no volume around it."""
        store = self._folder / "store"
        if fresh:
            shutil.rmtree(store, ignore_errors=True)
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        return store

    # --- from members -----------------------------------------------------------------------------------------------

    def _deal_recovery(self, vault: GuestVault, charter: Charter) -> None:
        """Have shares for custodians in the folder, if the charter has enough of them."""
        if len(cold_start.custodians(charter)) < cold_start.needed(charter):
            return
        there = self._recovery()
        if there is not None and cold_start.is_current(there, self._init.name, vault.name, vault.number, charter):
            return
        made = cold_start.deal_recovery(
            self._init.name, vault.name, vault.number, _packed(vault.keys), charter, os.urandom
        )
        fresh = self._folder / f".{RECOVERY}"
        fresh.write_bytes(canonical_bytes(made.model_dump(mode="json")))
        fresh.replace(self._folder / RECOVERY)

    def _recovery(self) -> Recovery | None:
        try:
            with (self._folder / RECOVERY).open("rb") as file:
                raw = file.read(cold_start.MAX_REQUEST + 1)
        except FileNotFoundError:
            return None
        where = str(self._folder / RECOVERY)
        return check_message(Recovery, read_json_object(raw, where=where, limit=cold_start.MAX_REQUEST))

    def request(self, charter: Charter) -> Request:
        """What custodians are asked, the same until the charter changes. Raises Refused if there is nothing to ask."""
        with self._lock:
            do = "Ask when it is locked, and its folder has what it dealt to custodians."
            if not self.locked:
                raise Refused("the broker has its keys", where="cold start", do=do)
            recovery = self._recovery()
            if recovery is None:
                raise Refused("the broker has dealt nothing to custodians", where="cold start", do=do)
            if self._request is None or self._request.version != charter.version:
                nonce = os.urandom(NONCE_SIZE)
                bound = cold_start.request_report_data(recovery, charter.version, nonce, self._boot.public)
                evidence = self._attester().evidence(bound)
                self._request = Request(
                    recovery=recovery,
                    version=charter.version,
                    evidence=EvidenceMessage(report=b64(evidence.report), certificates=b64(evidence.certificates)),
                    init_data=b64(self._init_data),
                    keys={purpose: b64(key) for purpose, key in self._boot.public.items()},
                    nonce=b64(nonce),
                )
                self._given = {}
            return self._request

    def take(self, answer: Answered, request: Request) -> int:
        """Take a custodian's answer to the request; return how many more are needed, 0 once it is unlocked.

        Raises Refused with every reason, BrokerUnavailable if k peers do not run to say which store is the newest.
        """
        with self._lock:
            if request is not self._request:
                raise BrokerUnavailable("the charter moved on meanwhile: export the request again", where="cold start")
            self._given[answer.member] = cold_start.open_answer(answer, request, self._boot.kem)
            left = request.recovery.k - len(self._given)
            if left > 0:
                return left
            joined = cold_start.join_answers(self._given, request.recovery.k)
            self._keys = self._checked(_unpacked(joined), request.recovery.vault)
            self._request, self._given, self.problem = None, {}, "its peers have not opened its vault yet"
            return 0

    def _checked(self, keys: VaultKeys, name: str) -> Mapping[int, bytes]:
        """The keys of the newest store, if k peers tell of it and it was made with the vault's keys."""
        session = self._attested()
        peers = [broker.name for broker in session.init.brokers]
        looks, _ = session.ask_each(peers, lambda one: one.look(name)[0])
        deal = agreed_deal(looks)
        if deal is None:
            raise BrokerUnavailable("too few peers run to say which store is the newest", where="cold start")
        store = StoreFile(self._mount(b"", False), name, keys).read()
        found = None if store is None else store_root(name, keys, store)
        recovery = session.charter.recovery(name)
        judge_store(name, deal, looks, recovery, found, lambda mark: is_authentic(name, keys, mark))
        read = {} if store is None else _read_keys(store.entries)
        if not read:
            raise Refused("the store has no key-encryption key", where="cold start", do="Bring its folder back.")
        return read


def _read_keys(entries: Mapping[str, bytes]) -> Mapping[int, bytes]:
    found = {int(name.removeprefix(_ENTRY)): key for name, key in entries.items() if name.startswith(_ENTRY)}
    if any(len(key) != KEK_SIZE for key in found.values()):
        raise Unusable("the vault has keys of another size", where="key-encryption key", do="Bring its store back.")
    return found


def _packed(keys: VaultKeys) -> bytes:
    return keys.volume + keys.seal + keys.root


def _unpacked(raw: bytes) -> VaultKeys:
    if len(raw) != 3 * KEY_SIZE:
        raise Refused("what custodians gave joins to no vault's keys", where="cold start", do="Ask others.")
    return VaultKeys(raw[:KEY_SIZE], raw[KEY_SIZE : 2 * KEY_SIZE], raw[2 * KEY_SIZE :])


def _key_id(key: bytes) -> str:
    return "peers:" + sha256(b"sealwright-kek-id\0" + key).hexdigest()[:16]
