"""A guest's vault: its key, its store, and the brokers that remember how far it has come.

How a guest uses it, once it has attested (`mount` is the guest's own: it opens the encrypted volume and mounts it):

    def mount(key: bytes, fresh: bool) -> Path:
        if fresh:
            ...                                # cryptsetup luksFormat with this key, mkfs; whatever was there is lost
        ...                                    # cryptsetup open with this key, mount
        return Path("/run/vault")              # the folder in which the store lies

    vault = open_vault(session, mount)         # refuses a disk that was rolled back, and takes over from an older boot
    count = int(vault.entries.get("rounds", b"0"))
    vault.save({**vault.entries, "rounds": str(count + 1).encode()})
    vault.check()                              # at each renewal of the lease: raises VaultFenced when a newer boot runs

`save` returns once k brokers have committed the store: only then may the guest act on what it has written. Keep in the
store what must never go back, and for anything large its digest; the rest of the volume has what the disk has.
"""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NoReturn

from attestation.broker_session import BrokerSession
from attestation.client import GuestSession
from attestation.errors import BrokerRefused, BrokerUnavailable, StoreRefused, VaultFenced
from attestation.fresh_state import Store, StoreFile, VaultKeys, check_entries, derive_keys, is_authentic, store_root
from attestation.split import join_shares, judge_shares, split_value
from attestation.vaults import (
    KEY_SIZE,
    Deal,
    Mark,
    VaultState,
    agreed_deal,
    fenced,
    highest,
    judge_store,
    next_epoch,
)
from policies.errors import Refused, SealwrightError, Unusable
from policies.vaults import vault_name

Mount = Callable[[bytes, bool], Path]
"""Opens the volume with its key (32 bytes), formatting it first if it is fresh; returns the folder of the store."""
REFUSED_KIND: Final = "vault-refused"
"""The ledger's kind of entry by which a guest tells that its disk was not the one that its brokers have committed."""
_NOTHING: Final = Store(0, MappingProxyType({}))


class GuestVault:
    """An open vault. `key` is the volume's, 32 bytes. Safe to use from many threads; `save`s go one at a time."""

    def __init__(
        self, session: GuestSession, name: str, epoch: int, deal: Deal, keys: VaultKeys, held: Sequence[str]
    ) -> None:
        """Made by `open_vault`. `held`: the brokers at which this boot holds the vault already."""
        self.name = name
        self.key = keys.volume
        self._session = session
        self._epoch = epoch
        self._deal = deal
        self._keys = keys
        self._held = set(held)
        self._lock = threading.Lock()
        self._file: StoreFile | None = None
        self._store = _NOTHING
        self._next = 1
        self._settled = True

    def __repr__(self) -> str:
        return f"GuestVault({self.name!r}, generation {self._store.generation})"

    @property
    def keys(self) -> VaultKeys:
        """All that is derived from the vault's key: who has it needs no broker to read the volume and the store."""
        return self._keys

    @property
    def number(self) -> int:
        """Which deal of its key it was opened with."""
        return self._deal.number

    @property
    def generation(self) -> int:
        """The store's generation: it grows with each change."""
        return self._store.generation

    @property
    def entries(self) -> Mapping[str, bytes]:
        """The store's values by name, as they were saved last."""
        return MappingProxyType(dict(self._store.entries))

    def save(self, entries: Mapping[str, bytes]) -> None:
        """Put these values in the place of all that are there; k brokers have committed them when this returns.

        Raises VaultFenced if a newer boot holds the vault (stop then), BrokerUnavailable if k brokers cannot be had
        (try again; what was written last is committed first), Unusable for values that no store holds.
        """
        check_entries(entries)
        with self._lock:
            self._settle()
            store = Store(self._next, dict(entries))
            self._next += 1  # whatever becomes of it, no other store has this generation
            mark = store_root(self.name, self._keys, store)
            prepared = self._quorum(partial(self._mark, ("prepare",), mark), "prepared the store")
            self._write(store)
            self._settle(prepared)

    def check(self) -> None:
        """Raise VaultFenced if a newer boot of this guest holds the vault, BrokerUnavailable if that cannot be told."""
        ours = (self._epoch, boot_of(self._session))
        answers, failures = self._session.ask_each(self._deal.brokers, lambda one: one.look(self.name)[0])
        for name, state in answers.items():
            if (state.epoch, state.boot) > ours:
                failures[name] = VaultFenced((fenced(self.name),), vault=self.name)
        have = len(set(answers) - set(failures))
        if have < self._deal.k:
            _fail(self.name, "have no newer boot", have, self._deal.k, failures)

    # --- within -----------------------------------------------------------------------------------------------------

    def begin(self, folder: Path, states: Mapping[str, VaultState], *, fresh: bool) -> None:
        """Take the store in `folder` up, if it is one that the brokers accept (`open_vault` does this)."""
        self._file = StoreFile(folder, self.name, self._keys)
        store = None if fresh else self._file.read()
        found = None if store is None else store_root(self.name, self._keys, store)
        recovery = self._session.charter.recovery(self.name)
        authentic = partial(is_authentic, self.name, self._keys)
        judged = judge_store(self.name, self._deal, states, recovery, found, authentic)
        self._next = judged.next_generation
        if store is None:
            self.save({})
            return
        self._store = store
        self._settled = not set(judged.behind) & set(states)
        with self._lock:
            self._settle()

    def _settle(self, prepared: Sequence[str] = ()) -> None:
        """Have k brokers commit the store that is on the disk, if they have not."""
        if self._settled:
            return
        mark = store_root(self.name, self._keys, self._store)

        def commit(one: BrokerSession) -> None:
            self._mark(("commit",) if one.name in prepared else ("prepare", "commit"), mark, one)

        self._quorum(commit, "committed the store")
        self._settled = True

    def _write(self, store: Store) -> None:
        file, self._file = self._file, None  # if this fails, the disk may have either: the next start finds out
        if file is None:
            do = "Mend the volume and start the guest again."
            raise Unusable("the vault's store could not be written before", where=self.name, do=do)
        try:
            file.write(store)
        except OSError as error:
            do = "Mend the volume and start the guest again."
            raise Unusable(f"the store cannot be written: {error.strerror}", where=self.name, do=do) from error
        self._file, self._store, self._settled = file, store, False

    def _mark(self, steps: Sequence[Literal["prepare", "commit"]], mark: Mark, one: BrokerSession) -> None:
        """Take these steps at one broker; one that was away when the vault was opened is made to know of this boot."""
        if one.name not in self._held:
            one.open_vault(self.name, self._epoch)
            self._held.add(one.name)
        for step in steps:
            one.mark(step, self.name, mark)

    def _quorum(self, question: Callable[[BrokerSession], None], what: str) -> tuple[str, ...]:
        """Ask all holders; return who did it, at least k."""
        done, failures = self._session.ask_each(self._deal.brokers, question)
        if len(done) < self._deal.k:
            _fail(self.name, what, len(done), self._deal.k, failures)
        return tuple(done)


def open_vault(
    session: GuestSession,
    mount: Mount,
    *,
    vault: str | None = None,
    randomness: Callable[[int], bytes] = os.urandom,
) -> GuestVault:
    """Open the vault of the guest of `session`, which has attested; make it if there is none yet.

    `vault`: another than the guest's own, which a recovery has given to it; found by itself if there is one alone.
    `mount(key, fresh)` opens the volume. Raises StoreRefused if the volume's store is older than what was committed, or
    another; VaultFenced if a newer boot holds the vault; BrokerRefused with every reason if the owner's policy or the
    charter's floor releases no key; BrokerUnavailable if too few brokers can be had; whatever `mount` raises.
    """
    name = vault or _vault_of(session)
    brokers = [one.name for one in session.init.brokers if session.charter.broker(one.name) is not None]
    looks, failures = session.ask_each(brokers, lambda one: one.look(name))
    states = {broker: state for broker, (state, _) in looks.items()}
    epoch = next_epoch(states)
    deal, made = agreed_deal(states), None
    fresh = highest(states) == 0
    if fresh:  # nobody has committed anything, if all of them say so
        if failures:
            _fail(name, "know of no vault yet; all are needed to make one", len(looks), len(brokers), failures)
        made = randomness(KEY_SIZE)
        number = max((state.deal.number for state in states.values() if state.deal is not None), default=0) + 1
        kems = {broker: kem for broker, (_, kem) in looks.items()}
        deal = _deal_out(session, name, epoch, number, made, kems, randomness)
    if deal is None:
        known = {broker: _known(name, state) for broker, state in states.items()}
        _fail(name, "tell of one deal of its key", 0, 1, {**known, **failures})
    key, opened = _opened(session, name, epoch, deal)
    if made is not None and not hmac.compare_digest(made, key):
        raise BrokerRefused((f"the key of {name} that comes back is not the one that was deposited",), where=name)
    keys = derive_keys(name, key)
    found = GuestVault(session, name, epoch, deal, keys, tuple(opened))
    folder = mount(keys.volume, fresh)
    try:
        found.begin(folder, opened, fresh=fresh)
    except StoreRefused as error:
        with suppress(SealwrightError):  # it is refused, whether or not anybody can be told
            session.record(REFUSED_KIND, {"reasons": list(error.reasons), "vault": name})
        raise
    return found


def boot_of(session: GuestSession) -> str:
    """The guest's REPORT_ID in hex."""
    boot = session.ear.claims.get("report_id")
    if not isinstance(boot, str) or not boot:
        raise Unusable("the guest's report has no REPORT_ID", where="vault", do="Run it on a platform that gives one.")
    return boot


def _vault_of(session: GuestSession) -> str:
    """The vault of this guest: the one that a recovery gives to its place, else its own."""
    subject = session.ear.subject
    place = (subject.role, subject.name)
    given = [one.vault for one in session.charter.recoveries() if (one.to_role, one.to_name) == place]
    if len(given) > 1:
        do = "Say which one to open."
        raise Unusable(f"several vaults are this guest's: {', '.join(given)}", where="vault", do=do)
    return given[0] if given else vault_name(subject.member, subject.role, subject.name)


def _deal_out(
    session: GuestSession,
    vault: str,
    epoch: int,
    number: int,
    key: bytes,
    kems: Mapping[str, bytes],
    randomness: Callable[[int], bytes],
) -> Deal:
    """Deposit a new key, or shares of it, at all of these brokers, each sealed to it."""
    names = sorted(kems)
    if len(names) == 1:
        deal, shares = Deal(number=number, k=1, brokers=names, commitments={}), {names[0]: key}
    else:
        split, shares = split_value(vault, key, names, len(names) // 2 + 1, number, randomness)
        deal = Deal(number=number, k=split.k, brokers=names, commitments=dict(split.commitments))
    taken, failures = session.ask_each(
        names, lambda one: one.deposit_share(vault, epoch, deal, shares[one.name], kems[one.name])
    )
    if failures:
        _fail(vault, "took their share of its key; all are needed", len(taken), len(names), failures)
    return deal


def _opened(session: GuestSession, vault: str, epoch: int, deal: Deal) -> tuple[bytes, dict[str, VaultState]]:
    """The vault's key, and the states that the holders which gave their shares tell."""
    given, failures = session.ask_each(deal.brokers, lambda one: one.open_vault(vault, epoch))
    values = {broker: value for broker, (value, _) in given.items()}
    states = {broker: state for broker, (_, state) in given.items()}
    split = deal.split(vault)
    if split is None:
        if not values:
            _fail(vault, "gave its key", 0, 1, failures)
        return next(iter(values.values())), states
    judged = judge_shares(split, values)
    if len(judged.good) < deal.k:
        false = {broker: BrokerRefused((why,), where=broker) for broker, why in judged.against.items()}
        _fail(vault, "gave a good share of its key", len(judged.good), deal.k, {**failures, **false})
    return join_shares(split, values), {broker: states[broker] for broker in judged.good}


def _known(vault: str, state: VaultState) -> SealwrightError:
    told = "no deal" if state.deal is None else f"deal {state.deal.number} over {', '.join(state.deal.brokers)}"
    return BrokerRefused((f"it tells of {told} of the key of {vault}",), where=vault)


def _fail(vault: str, what: str, have: int, needed: int, failures: Mapping[str, SealwrightError]) -> NoReturn:
    """Raise why fewer brokers than are needed did something: unavailable while silent ones could make up for it."""
    whys = {name: error.reasons if isinstance(error, Refused) else (error.what,) for name, error in failures.items()}
    told = tuple(f"{name}: {why}" for name, some in sorted(whys.items()) for why in some)
    reasons = (f"{vault}: {have} brokers {what}, {needed} are needed", *told)
    silent = sum(isinstance(error, BrokerUnavailable) for error in failures.values())
    if have + silent >= needed:
        raise BrokerUnavailable("; ".join(reasons), where="brokers", reasons=reasons)
    if any(fenced(vault) in some for some in whys.values()):
        raise VaultFenced((fenced(vault), *reasons), vault=vault)
    raise BrokerRefused(reasons, where=vault)
