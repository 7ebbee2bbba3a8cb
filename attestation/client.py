"""What a guest uses to talk to the brokers of its charter. Synchronous; every wait has a bound.

A guest believes nothing that its host tells it, and no broker alone. The charter's root comes from its init-data (which
HOST_DATA binds), the charter from whoever has it, since it verifies itself; the brokers' keys come from the charter;
the time and the charter's version come from what enough brokers (`Consortium.broker_threshold`, called k) have signed
over nonces of the guest's own, and from nothing else: the host's clock only measures how long something took. k brokers
have to appraise the guest, each by a report of its own, before it has a credential.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

from cryptography import x509

from attestation.agreement import Agreement, Said, agree
from attestation.broker_session import Attester as Attester
from attestation.broker_session import BrokerSession, Guest, Opened
from attestation.broker_session import DeviceAttester as DeviceAttester
from attestation.canonical import format_time
from attestation.connection import TIMEOUT, fetch_from
from attestation.connection import BrokerClient as BrokerClient
from attestation.connection import fetch_charter as fetch_charter
from attestation.connection import ledger_keys as ledger_keys
from attestation.ear import Ear
from attestation.ears import different_guests, lease_end
from attestation.errors import AnswerRefused, BrokerRefused, BrokerUnavailable, LeaseEnded
from attestation.fan_out import ask_all
from attestation.guest_keys import GuestKeys
from attestation.identity import Identity, spiffe_id
from attestation.ledger.cosignature import ledger_of
from attestation.ledger.receipt import Receipt
from attestation.messages import not_deposited
from attestation.pauses import PAUSE_SECONDS as PAUSE_SECONDS
from attestation.split import gather_shares
from policies.budgets import EXPORT_KIND, keeper
from policies.charter import Charter, load_charter
from policies.documents import Split
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import BrokerAddress, InitData, parse_init_data

T = TypeVar("T")
TRIES: Final = 3
"""How often an attestation begins anew because the charter has moved on meanwhile."""
ROUND_CALLS: Final = 3
"""A round of questions to all brokers takes at most so many times the time-out of one connection."""


class GuestSession:
    """A guest's dealings with the brokers of its init-data: evidence, credential, resources, records.

    `attest` and `renew` are for one thread; the rest may be called from any, meanwhile too.
    """

    def __init__(
        self,
        attester: Attester,
        init_data: bytes,
        *,
        devices: DeviceAttester | None = None,
        root: bytes | None = None,
        not_before: datetime | None = None,
        timeout: float = TIMEOUT,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`devices`: the guest's GPUs, if it has some; `root`: the charter's first root, if it is at hand;
        `not_before`: when the image was built."""
        self.init: InitData = parse_init_data(init_data)
        self._keys = GuestKeys()
        self._guest = Guest(attester, threading.Lock(), init_data, self.init, self._keys, randomness, devices)
        self._root = root
        self._not_before = not_before
        self._timeout = timeout
        self._charter: Charter | None = None
        self._store: Mapping[str, bytes] = {}
        self._refetch_at = datetime.fromtimestamp(0, UTC)
        self._clock = (datetime.fromtimestamp(0, UTC), 0.0)
        self._sessions: dict[str, BrokerSession] = {}
        self._ears: tuple[Ear, ...] = ()
        self._certificate: str | None = None
        self.false_shares: dict[str, str] = {}
        """Brokers that gave a share other than the one that was dealt to them, and what was against it."""

    # --- what the guest knows ---------------------------------------------------------------------------------------

    @property
    def charter(self) -> Charter:
        """The newest charter that enough brokers follow, as far as this guest has heard."""
        if self._charter is None:
            raise Unusable("the guest has no charter yet", where="session", do="Call attest() first.")
        return self._charter

    def charter_store(self) -> tuple[Charter, Mapping[str, bytes]]:
        """The charter that `charter` gives, and the files in which it verifies itself, for those who ask."""
        return self.charter, self._store

    @property
    def ears(self) -> tuple[Ear, ...]:
        """The EARs of the last attestation, in the order of the init-data's brokers."""
        if not self._ears:
            raise Unusable("the guest has not attested yet", where="session", do="Call attest() first.")
        return self._ears

    @property
    def ear(self) -> Ear:
        """The first of them; what they say of the guest is the same."""
        return self.ears[0]

    @property
    def brokers(self) -> tuple[str, ...]:
        """The brokers that affirmed the guest at its last attestation."""
        return tuple(ear.broker for ear in self._ears)

    def now(self) -> datetime:
        """The brokers' time: what enough of them signed last, and what has passed since."""
        said, mark = self._clock
        return said + timedelta(seconds=time.monotonic() - mark)

    def close(self) -> None:
        """Close connections."""
        for session in self._sessions.values():
            session.close()

    def refresh_charter(self) -> Charter:
        """Ask all brokers for time and charter; fetch a newer one if enough of them follow it. Raises as `attest`."""
        if self._charter is None:
            self._first_charter()
        for _ in range(TRIES):
            questions = {name: session.told for name, session in self._sessions.items()}
            answers, failures = self._ask(questions)
            words = {name: word for name, (word, identifier) in answers.items() if identifier == self.charter.id}
            failures |= self._astray(name for name in answers if name not in words)
            if self._agreed(words, failures) is not None:
                break
        return self.charter

    # --- what the guest does ----------------------------------------------------------------------------------------

    def attest(self) -> Identity:
        """Attest to every broker of the init-data that the charter has; take a credential over this guest's own keys.

        Raises BrokerRefused if so many brokers refuse that k cannot affirm (every broker, every reason),
        BrokerUnavailable if k could not be reached or do not agree on time and charter, AnswerRefused.
        """
        if self._charter is None:
            self._first_charter()
        for attempt in range(1, TRIES + 1):
            charter = self.charter
            try:
                if (ears := self._appraised(charter)) is not None:
                    self._ears = ears
                    return self._identity(ears)
            except BrokerUnavailable:
                raise
            except Refused:  # the brokers may have gone over to a newer charter between two of their answers
                if attempt == TRIES or self.refresh_charter().version == charter.version:
                    raise
        raise BrokerUnavailable("the charter changes too fast to attest under it", where="charter")

    def renew(self) -> Identity:
        """Attest afresh with the same keys: new EARs; a new certificate when the old one is half over.

        Raises as `attest` does; the older EARs then stand until they end.
        """
        return self.attest()

    def release(self, resource: str, job: Mapping[str, Any] | None = None) -> bytes:
        """A resource's value: from the first broker that has it, its owner's own before others; or joined here from the
        shares of k brokers, if the charter says that it is split.

        Raises BrokerRefused (every reason, if its owner's policy or the charter's floor does not release it, or no
        broker has it), SharesMissing (every broker that gave no good share, and why), BrokerUnavailable, LeaseEnded.
        """
        split = self.charter.split(resource)
        if split is not None:
            return self._joined(split, job)
        failures: dict[str, SealwrightError] = {}
        for name in self._holders(resource):
            try:
                return self.release_from(name, resource, job)
            except BrokerUnavailable as error:
                failures[name] = error
            except BrokerRefused as error:
                failures[name] = error
                if not_deposited(resource) not in error.reasons:
                    raise
        raise _all_failed(failures)

    def release_from(self, broker: str, resource: str, job: Mapping[str, Any] | None = None) -> bytes:
        """What one broker releases under the name `resource`. Raises BrokerRefused, BrokerUnavailable, LeaseEnded."""
        self._demand_lease()
        if broker not in self.brokers:
            raise BrokerUnavailable(f"broker {broker} has not affirmed this guest", where="brokers")
        return self._sessions[broker].release(resource, job)

    def ask_each(
        self, brokers: Sequence[str], question: Callable[[BrokerSession], T]
    ) -> tuple[dict[str, T], dict[str, SealwrightError]]:
        """Ask these brokers the same at once; what each answered, and why others did not. Raises LeaseEnded.

        A broker that has not affirmed this guest counts as unavailable.
        """
        self._demand_lease()
        there = {name: self._sessions[name] for name in brokers if name in self.brokers and name in self._sessions}
        answers, failures = self._ask({name: partial(question, one) for name, one in there.items()}, enough=None)
        absent = {name: _unavailable(name, "has not affirmed this guest") for name in brokers if name not in there}
        return answers, {**failures, **absent}

    def record(self, kind: str, document: Mapping[str, Any]) -> Receipt:
        """Have something written down in the ledger of one broker. Raises BrokerRefused, BrokerUnavailable."""
        return self.recorded(kind, document)[1]

    def recorded(self, kind: str, document: Mapping[str, Any]) -> tuple[str, Receipt]:
        """As `record`; returns the entry as it stands in the ledger too, for those who show it to others.

        An export is debited by the one broker that keeps the balance of this guest's member, and by no other.
        """
        self._demand_lease()
        if kind == EXPORT_KIND:
            return self._kept(keeper(self.charter.consortium, self.ears[0].subject.member), kind, document)
        failures: dict[str, SealwrightError] = {}
        for name in self.brokers:
            try:
                return self._sessions[name].recorded(kind, document)
            except Refused as error:
                failures[name] = error
        raise _all_failed(failures)

    def _kept(self, broker: str, kind: str, document: Mapping[str, Any]) -> tuple[str, Receipt]:
        if broker not in self.brokers:
            raise BrokerUnavailable(
                f"broker {broker}, which keeps the budget, has not affirmed this guest", where="brokers"
            )
        return self._sessions[broker].recorded(kind, document)

    # --- charter and time -------------------------------------------------------------------------------------------

    def _first_charter(self) -> None:
        """Fetch the charter from all brokers at once; take the newest that enough of them follow."""
        questions = {
            broker.name: partial(
                fetch_from,
                broker.name,
                broker.url,
                self.init.charter,
                self._root,
                None,
                self._not_before,
                self._timeout,
            )
            for broker in self.init.brokers
        }
        fetched, failures = self._ask(questions, enough=None)
        for found in fetched.values():
            found.client.close()
        versions: dict[int, list[str]] = {}
        for name, found in fetched.items():
            versions.setdefault(found.charter.version, []).append(name)
        for version in sorted(versions, reverse=True):
            found = fetched[versions[version][0]]
            if len(versions[version]) >= found.charter.consortium.broker_threshold:
                self._root = found.root
                self._clock = (found.at, time.monotonic())
                self._take(found.charter, found.at, found.store)
                return
        if not fetched:
            raise _all_failed(failures)
        needed = max(found.charter.consortium.broker_threshold for found in fetched.values())
        told = {n: _unavailable(n, f"follows version {found.charter.version}") for n, found in fetched.items()}
        raise _too_few(0, needed, {**failures, **told})

    def _agreed(self, words: Mapping[str, Said], failures: Mapping[str, SealwrightError]) -> Agreement | None:
        """What enough brokers agree on; None if it is a newer charter, which is the known one from now on."""
        charter = self.charter
        needed = charter.consortium.broker_threshold
        if len(words) < needed:
            raise _too_few(len(words), needed, {**self._strangers(), **failures})
        agreement = agree(list(words.values()), needed, charter.version, time.monotonic())
        if self._not_before is not None and agreement.time < self._not_before:
            reason = f"the brokers say it is {format_time(agreement.time)}, before this image was built"
            raise BrokerRefused((reason,), where="brokers")
        self._clock = (agreement.time, agreement.mark)
        if agreement.version > charter.version or agreement.time >= self._refetch_at:
            self._fetch_newer(agreement)
        return agreement if self.charter.version == charter.version else None

    def _fetch_newer(self, agreement: Agreement) -> None:
        """Fetch the charter (or a fresh timestamp on it) from a broker that follows the agreed version."""
        charter, root = self.charter, self._root
        failures: dict[str, SealwrightError] = {}
        for name in agreement.brokers:
            try:
                store = self._sessions[name].client.charter_store()
                found = load_charter(store, root or store.get("metadata/1.root.json", b""), self.now(), known=charter)
            except SealwrightError as error:
                failures[name] = error
                continue
            if found.version >= agreement.version:
                self._take(found, self.now(), store)
                return
        if agreement.version > charter.version or self.now() >= charter.expires:
            told = "; ".join(f"{name}: {error.what}" for name, error in failures.items())
            raise BrokerUnavailable(f"no broker gives a charter that holds: {told or 'none is newer'}", where="charter")

    def _take(self, charter: Charter, at: datetime, store: Mapping[str, bytes]) -> None:
        """Follow `charter` from now on, with a session for each of the init-data's brokers that is in it."""
        self._charter, self._store = charter, store
        self._refetch_at = at + (charter.expires - at) / 2
        sessions: dict[str, BrokerSession] = {}
        for address in self._named(charter):
            entry, known = charter.broker(address.name), self._sessions.get(address.name)
            if entry is None:
                continue
            ledger = ledger_of(charter.consortium, entry)
            if known is not None and known.client.entry == entry:
                known.ledger = ledger
                sessions[address.name] = known
            else:
                client = BrokerClient(entry, charter.consortium.trust_domain, url=address.url, timeout=self._timeout)
                sessions[address.name] = BrokerSession(self._guest, client, ledger)
        old, self._sessions = self._sessions, sessions
        for name, session in old.items():
            if sessions.get(name) is not session:
                session.close()

    def _named(self, charter: Charter) -> tuple[BrokerAddress, ...]:
        return tuple(address for address in self.init.brokers if charter.broker(address.name) is not None)

    def _strangers(self) -> dict[str, SealwrightError]:
        """The init-data's brokers that the charter does not have."""
        charter = self.charter
        return {
            address.name: BrokerRefused((f"it is no broker of charter version {charter.version}",), where=address.url)
            for address in self.init.brokers
            if charter.broker(address.name) is None
        }

    @staticmethod
    def _astray(names: Iterable[str]) -> dict[str, SealwrightError]:
        return {name: BrokerRefused(("it follows another charter",), where=f"broker {name}") for name in names}

    # --- appraisal --------------------------------------------------------------------------------------------------

    def _appraised(self, charter: Charter) -> tuple[Ear, ...] | None:
        """The EARs of at least k brokers, from fresh evidence for each; None if the charter has moved on."""
        needed = charter.consortium.broker_threshold
        questions = {name: session.open for name, session in self._sessions.items()}
        answers, failures = self._ask(questions)
        opened: dict[str, Opened] = {name: one for name, one in answers.items() if one.charter_id == charter.id}
        failures |= self._astray(name for name in answers if name not in opened)
        agreement = self._agreed({name: one.said for name, one in opened.items()}, failures)
        if agreement is None:
            return None
        for name, one in opened.items():
            if name not in agreement.brokers:
                said = f"says it is {format_time(one.said.time)} and follows charter version {one.said.version}"
                failures[name] = _unavailable(name, f"{said}, unlike the others")
        affirmed, refused = self._ask(
            {name: partial(self._sessions[name].attest, opened[name], charter) for name in agreement.brokers},
            more=0.0 if self._guest.devices is None else self._guest.devices.seconds * len(agreement.brokers),
        )
        ears = _alike(list(affirmed.values()))
        for ear in affirmed.values():
            if ear not in ears:
                refused[ear.broker] = AnswerRefused(("its EAR says something else of the guest than the others'",))
        if len(ears) < needed:
            raise _too_few(len(ears), needed, {**self._strangers(), **failures, **refused})
        return ears

    def _identity(self, ears: tuple[Ear, ...]) -> Identity:
        charter, subject = self.charter, ears[0].subject
        return Identity(
            spiffe_id=spiffe_id(charter.consortium.trust_domain, subject.role, subject.name),
            role=subject.role,
            name=subject.name,
            tls_key_pem=self._keys.tls_pem(),
            certificate_pem=self._certified(ears),
            sign_key=self._keys.sign,
            kem_key=self._keys.kem,
            ears=tuple(ear.token for ear in ears),
            lease_ends=lease_end(ears, charter),
        )

    def _certified(self, ears: tuple[Ear, ...]) -> str:
        """The certificate over the TLS key; a new one if it is half over or its issuer is no broker any more."""
        if self._certificate is not None and not self._certificate_due(self._certificate):
            return self._certificate
        needed = self.charter.consortium.broker_threshold
        failures: dict[str, SealwrightError] = {}
        for ear in ears:
            try:
                others = [other.token for other in ears if other is not ear]
                self._certificate = self._sessions[ear.broker].credential(others[: needed - 1])
                return self._certificate
            except Refused as error:
                failures[ear.broker] = error
        if self._certificate is not None and all(isinstance(e, BrokerUnavailable) for e in failures.values()):
            return self._certificate  # it is good for some time yet, and so are the EARs
        raise _all_failed(failures)

    def _certificate_due(self, chain: str) -> bool:
        leaf, issuer = x509.load_pem_x509_certificates(chain.encode())[:2]
        half = leaf.not_valid_before_utc + (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / 2
        issuers = (broker.issuer_certificate for broker in self.charter.consortium.brokers)
        return self.now() >= half or issuer not in map(x509.load_pem_x509_certificate, map(str.encode, issuers))

    # --- within -----------------------------------------------------------------------------------------------------

    def _ask(
        self, questions: Mapping[str, Callable[[], Any]], enough: int | None = 0, *, more: float = 0.0
    ) -> tuple[dict[str, Any], Any]:
        """Ask all at once; once k have answered (`enough` None: never), the others are waited for a little only.

        `more`: seconds that the questions may take beyond a round's own, where evidence is collected first.
        """
        if enough == 0:
            enough = self.charter.consortium.broker_threshold
        return ask_all(questions, seconds=ROUND_CALLS * self._timeout + more, enough=enough)

    def _holders(self, resource: str) -> tuple[str, ...]:
        """The brokers to ask for a resource, its owner's own first."""
        owner = resource.partition("/")[0]
        entries = {broker.name: broker.member for broker in self.charter.consortium.brokers}
        return tuple(sorted(self.brokers, key=lambda name: entries.get(name) != owner))

    def _joined(self, split: Split, job: Mapping[str, Any] | None) -> bytes:
        """A split resource's value. A broker that gave a false share is told of in another broker's ledger."""
        self._demand_lease()

        def ask(names: Sequence[str]) -> tuple[dict[str, bytes], dict[str, SealwrightError]]:
            questions = {name: partial(self._sessions[name].release, split.resource, job) for name in names}
            return self._ask(questions, enough=None)

        found = gather_shares(split, self._holders(split.resource), ask)
        self.false_shares |= found.false
        for liar, why in found.false.items():
            said = {"broker": liar, "generation": split.generation, "reason": why, "resource": split.resource}
            for name in self.brokers:
                if name not in found.false:
                    with suppress(SealwrightError):  # what it joined is good, whoever writes the rest down
                        self._sessions[name].recorded("false-share", said)
                        break
        return found.value

    def _demand_lease(self) -> None:
        if self.now() >= lease_end(self.ears, self.charter):
            raise LeaseEnded(f"{self.init.role}/{self.init.name}")


def _alike(ears: Sequence[Ear]) -> tuple[Ear, ...]:
    """The largest part of these EARs that say the same of the guest."""
    groups = [tuple(other for other in ears if not different_guests((ear, other))) for ear in ears]
    return max(groups, key=len, default=())


def _unavailable(name: str, what: str) -> BrokerUnavailable:
    return BrokerUnavailable(f"broker {name} {what}", where="brokers")


def _too_few(have: int, needed: int, failures: Mapping[str, SealwrightError]) -> SealwrightError:
    """Why fewer than `needed` brokers affirmed: a refusal if the others could not make up for those who refused."""
    if len(failures) == 1 and needed == 1:
        return next(iter(failures.values()))
    out_of_reach = sum(isinstance(error, BrokerUnavailable) for error in failures.values())
    reasons = (f"{have} of the {needed} brokers that are needed affirm the guest", *_told(failures))
    if have + out_of_reach >= needed:
        return BrokerUnavailable("; ".join(reasons), where="brokers", reasons=reasons)
    return BrokerRefused(reasons, where="brokers")


def _all_failed(failures: Mapping[str, SealwrightError]) -> SealwrightError:
    """Why no broker did what any one of them could have done."""
    if len(failures) == 1:
        return next(iter(failures.values()))
    reasons = _told(failures)
    if any(isinstance(error, BrokerUnavailable) for error in failures.values()):
        return BrokerUnavailable("; ".join(reasons), where="brokers", reasons=reasons)
    return BrokerRefused(reasons, where="brokers")


def _told(failures: Mapping[str, SealwrightError]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {reason}"
        for name, error in failures.items()
        for reason in (error.reasons if isinstance(error, Refused) else (error.what,))
    )
