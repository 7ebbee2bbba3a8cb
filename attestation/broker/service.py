"""The broker: what it does for guests and owners, whatever protocol they speak.

Every decision is one transaction: session, counters, decision and ledger entry together, durable before its answer
leaves. Policies and signatures are checked outside of it, on what was read before; if a counter or the charter has
moved meanwhile, the decision is made again.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

from attestation.broker import journal
from attestation.broker.appraisal import Additional, Bound, appraise_guest, brief_ear, build_ear
from attestation.broker.appraisal import Question as AppraisalQuestion
from attestation.broker.charters import CharterFolder, LoadedCharter
from attestation.broker.checks import check_csr, check_deposit, check_ears
from attestation.broker.clock import CheckedClock
from attestation.broker.exports import balance, decide_export, export_reasons
from attestation.broker.following import Following, charter_mark
from attestation.broker.journal import Note
from attestation.broker.keks import KeyEncryption, KeyRing, seal_resource
from attestation.broker.own_keys import OwnKeys
from attestation.broker.releases import Authorise, Released, Releases, Request, Seal
from attestation.broker.sessions import (
    NONCE_SIZE,
    Protocol,
    Session,
    attested,
    attested_session,
    open_session,
    take_nonce,
)
from attestation.broker.storage import Storage, Transaction
from attestation.ear import Ear, sign_ear, verify_ear
from attestation.errors import (
    AppraisalRefused,
    BrokerUnavailable,
    DebitRefused,
    DepositRefused,
    SessionRefused,
)
from attestation.evidence.composite import SnpEvidence
from attestation.identity import enrolment_reasons
from attestation.ledger.entry import BROKER_KINDS, Entry, parse_entry
from attestation.ledger.receipt import Receipt
from attestation.messages import Deposit
from attestation.split import kept_as
from attestation.witness.service import Witness
from policies.budgets import EXPORT_KIND, Export, keeper, parse_export
from policies.charter import Charter
from policies.documents import BrokerEntry
from policies.errors import Refused, SealwrightError

T = TypeVar("T")
TRIES: Final = 8
"""How often a release is decided anew because its counters moved."""

Bind = Callable[[Session, Charter], Bound]
"""What evidence must be bound to in a session."""

Complete = Callable[[SnpEvidence], SnpEvidence]
"""Puts beside a report what its vendor publishes for it (attestation.endorsements.kds)."""

GpuEndorsing = Callable[[], bytes]
"""What stands beside GPUs' evidence here, in bytes (attestation.endorsements.nvidia_endorsements)."""


@dataclass(frozen=True, slots=True)
class Attested:
    """An affirmed guest."""

    session: Session
    receipt: Receipt
    entry: bytes

    @property
    def ear(self) -> str:
        """The EAR that the guest shows to others."""
        return self.session.ear or ""

    @property
    def full_ear(self) -> str:
        """The EAR with all claims of every device."""
        return self.session.full_ear or self.ear


@dataclass(frozen=True, slots=True)
class Issued:
    """Something written down: a credential (the certificate in DER), or a guest's own record."""

    certificate: bytes
    receipt: Receipt
    entry: bytes


@dataclass(frozen=True, slots=True)
class Ruling(Generic[T]):
    """What came of a guest's call: what is written down of it (None: nothing), every reason against it, a result."""

    note: Note | None
    reasons: tuple[str, ...]
    result: T


Judge = Callable[[Transaction, Session, Ear, Charter, datetime], Ruling[T]]
"""Decides over a guest's call where it is written; quick, and without I/O of its own."""


class Broker:
    """One broker of one charter."""

    def __init__(
        self,
        name: str,
        *,
        storage: Storage,
        charters: CharterFolder,
        keys: OwnKeys,
        find_keys: Callable[[BrokerEntry], OwnKeys],
        kek: KeyEncryption,
        complete: Complete | None = None,
        gpu_endorsements: GpuEndorsing | None = None,
        session_seconds: int = 300,
        max_sessions: int = 100_000,
        clock: Callable[[], datetime] | None = None,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.name = name
        self.storage = storage
        self.following = Following(name, storage=storage, charters=charters, keys=keys, find_keys=find_keys)
        self.clock = clock or CheckedClock(_last_time(storage))
        """The time, whole seconds. Raises BrokerUnavailable if the clock cannot be relied on."""
        self.witness: Witness | None = None
        """The witness of other members' ledgers that runs in this broker, if one does."""
        self.keks = kek if isinstance(kek, KeyRing) else KeyRing(kek)
        """Under which resources are put."""
        self._complete = complete
        self._gpu_endorsements = gpu_endorsements
        self._session_seconds = session_seconds
        self._max_sessions = max_sessions
        self._randomness = randomness
        self._sessions = max_sessions  # unknown until the first pruning: forces one
        self._releases = Releases(storage, self.keks, self.following.holds)

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def open(self, protocol: Protocol, guest_nonce: str) -> tuple[Session, LoadedCharter]:
        """Open a session with a fresh nonce. A protocol in which the guest brings no nonce has the session's own id."""
        at = self.clock()
        identifier = uuid.UUID(bytes=self._randomness(16), version=4).hex
        loaded = await self.following.charter(at)
        session = open_session(
            protocol,
            identifier=identifier,
            nonce=self._randomness(NONCE_SIZE),
            guest_nonce=guest_nonce or identifier,
            at=at,
            seconds=self._session_seconds,
            charter_version=loaded.charter.version,
        )
        full = self._sessions >= self._max_sessions

        def work(step: Transaction) -> int | None:
            left = step.prune_sessions(at) if full else None
            if left is not None and left >= self._max_sessions:
                return left
            step.new_session(session)
            return left

        left, _ = await self.storage.transact(work)
        self._sessions = self._sessions + 1 if left is None else left + 1
        if left is not None and left >= self._max_sessions:
            raise BrokerUnavailable(f"{left} sessions are open", where="sessions")
        return session, loaded

    async def forget_sessions(self) -> None:
        """Forget the sessions that have ended."""
        at = self.clock()
        self._sessions, _ = await self.storage.transact(lambda step: step.prune_sessions(at))

    # --- appraisal --------------------------------------------------------------------------------------------------

    async def attest(
        self,
        identifier: str,
        protocol: Protocol,
        evidence: SnpEvidence,
        init_data: bytes | None,
        *,
        additional: str = "",
        bind: Bind,
        check: Callable[[Session], tuple[str, ...]],
        keys: dict[str, str],
        key_digests: Mapping[str, str],
        tee_pubkey: dict[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
    ) -> Attested:
        """Appraise a guest and give it an EAR.

        `additional` is the evidence of further devices as it was sent; `check` returns what the protocol itself has
        against the call. The nonce is consumed whatever the outcome.
        Raises AppraisalRefused with every reason, or SessionRefused.
        """
        at = self.clock()
        charter = (await self.following.charter(at)).charter
        session = await self.storage.session(identifier)
        if session is None or session.protocol != protocol:
            raise SessionRefused(("there is no such session",))
        bound = bind(session, charter)
        evidence, lacking = await self._completed(evidence, charter)
        more, missing = await self._devices(additional, bound)
        lacking += missing
        question = AppraisalQuestion(evidence, init_data, bound.report_data, protocol, more)
        against = check(session)
        if session.charter_version != charter.version:
            against += (f"the charter went from version {session.charter_version} to {charter.version} meanwhile",)
        verdict = await asyncio.to_thread(appraise_guest, question, charter, at)
        reasons = (*against, *verdict.reasons, *(lacking if verdict.reasons else ()))
        token, full, document = "", None, None
        if not reasons:
            document = build_ear(
                verdict,
                charter,
                broker=self.name,
                nonce=session.guest_nonce,
                keys=key_digests,
                at=at,
                runtime=runtime,
            )
            shown = brief_ear(document) if protocol == "v1" else document
            token = sign_ear(shown, self.following.keys.signing)
            full = None if shown == document else sign_ear(document, self.following.keys.signing)

        def work(step: Transaction) -> tuple[Session | None, tuple[str, ...], bytes]:
            found = step.session(identifier)
            try:
                spent = take_nonce(found, protocol, at)
            except SessionRefused as error:
                journal.append(step, journal.call_denial("attest", session, error.reasons, step.followed(), at))
                return None, error.reasons, b""
            moved = () if self.following.holds(step, charter) else ("the charter moved on meanwhile",)
            if reasons or moved or document is None:
                step.update_session(spent)
                denied = journal.appraisal_denial(
                    question, verdict, spent, bound.document, (*reasons, *moved), charter, at
                )
                journal.append(step, denied)
                return None, (*reasons, *moved), b""
            expires = datetime.fromtimestamp(document.exp, UTC)
            done = attested(spent, ear=token, full_ear=full, expires=expires, keys=keys, tee_pubkey=tee_pubkey, at=at)
            step.update_session(done)
            note = journal.appraisal(question, verdict, done, bound.document, charter, at)
            journal.append(step, note)
            return done, (), note.entry.to_bytes()

        (done, refused, entry), receipts = await self.storage.transact(work)
        if done is None:
            raise AppraisalRefused(refused, who=verdict.who)
        return Attested(done, receipts[0], entry)

    async def _devices(self, text: str, bound: Bound) -> tuple[Additional | None, tuple[str, ...]]:
        """The evidence of further devices with what stands beside it here, so that an auditor finds it."""
        if not text:
            return None, ()
        plain = Additional(text, bound.device_nonce)
        if self._gpu_endorsements is None:
            return plain, ()
        try:
            return replace(plain, endorsements=await asyncio.to_thread(self._gpu_endorsements)), ()
        except SealwrightError as error:
            return plain, (f"this broker's GPU endorsements cannot be used: {error.what} ({error.where})",)

    async def _completed(self, evidence: SnpEvidence, charter: Charter) -> tuple[SnpEvidence, tuple[str, ...]]:
        """The evidence with its vendor's certificates and revocation list, so that an auditor finds them beside it."""
        if self._complete is None or charter.consortium.platform != "hardware":
            return evidence, ()  # the virtual platform hands all of it out with its reports
        try:
            return await asyncio.to_thread(self._complete, evidence), ()
        except SealwrightError as error:
            return evidence, (f"endorsements could not be had: {error.what}",)

    # --- release ----------------------------------------------------------------------------------------------------

    async def release(
        self,
        identifier: str,
        protocol: Protocol,
        resource: str,
        *,
        job: Mapping[str, Any] | None,
        authorise: Authorise,
        seal: Seal,
        request: str,
        epoch: int | None = None,
    ) -> Released:
        """Decide over a release, write it down, and return the value as `seal(session, value, serial)` made it.

        `epoch`: that in which a boot opens a vault (attestation.vaults), whose key is released in no other way.
        Raises ReleaseRefused with every reason, or SessionRefused.
        """
        for _ in range(TRIES):
            at = self.clock()
            charter = (await self.following.charter(at)).charter
            session = await self._authorised(identifier, protocol, "release", authorise, charter, at)
            ear = await self._standing(session, "release", charter, at)
            released = await self._releases.decide(
                Request(session, ear, resource, job, request, charter, at, authorise, seal, epoch)
            )
            if released is not None:
                return released
        raise BrokerUnavailable(f"{resource} or the charter changes too fast to decide", where=resource)

    # --- what guests have written down and issued ----------------------------------------------------------------

    async def credential(self, identifier: str, csr: bytes, others: Sequence[str], authorise: Authorise) -> Issued:
        """Issue a credential over the TLS key of the attested guest, whose possession `csr` (DER) proves.

        `others` are the EARs that other brokers gave it; with this broker's own they have to be enough for the charter.
        """
        at = self.clock()
        charter = (await self.following.charter(at)).charter
        session = await self._authorised(identifier, "v1", "credential", authorise, charter, at)
        ear = await self._standing(session, "credential", charter, at)
        try:
            public_key = check_csr(csr, ear)
            ears = check_ears(ear, others, charter, at)
        except Refused as error:
            denied = journal.call_denial("credential", session, error.reasons, charter_mark(charter), at)
            await self.storage.transact(lambda step: journal.append(step, denied))
            raise
        certificate = self.following.keys.issuer.guest_certificate(
            public_key,
            trust_domain=charter.consortium.trust_domain,
            role=ear.subject.role,
            name=ear.subject.name,
            ears=[one.token for one in ears],
            at=at,
            seconds=charter.consortium.credential_seconds,
        )
        note = journal.credential(ear, ears, session, certificate, charter, at)
        return Issued(certificate, await self._note(identifier, authorise, note, charter), note.entry.to_bytes())

    async def record(self, identifier: str, kind: str, document: Mapping[str, Any], authorise: Authorise) -> Issued:
        """Write down what an attested guest says."""
        at = self.clock()
        charter = (await self.following.charter(at)).charter
        session = await self._authorised(identifier, "v1", "record", authorise, charter, at)
        if kind in BROKER_KINDS:
            raise Refused(f"entries of kind {kind} are the broker's own", where="record", do="Use a kind of your own.")
        ear = await self._standing(session, "record", charter, at)
        if kind == EXPORT_KIND:
            return await self._export(identifier, parse_export(dict(document)), authorise, ear, session, charter, at)
        note = journal.record(ear, session, kind, document, charter, at)
        return Issued(b"", await self._note(identifier, authorise, note, charter), note.entry.to_bytes())

    async def _export(
        self,
        identifier: str,
        content: Export,
        authorise: Authorise,
        ear: Ear,
        session: Session,
        charter: Charter,
        at: datetime,
    ) -> Issued:
        """Debit what a site is about to let out. Raises DebitRefused if there is no budget for it, or not here."""
        owner = ear.subject.member
        kept_by = keeper(charter.consortium, owner)

        def work(step: Transaction) -> tuple[tuple[str, ...], Entry]:
            self.following.demand(step, charter)
            step.update_session(authorise(step.session(identifier)))
            reasons = export_reasons(ear, kept_by, self.name)
            after, against = decide_export(charter, owner, content, balance(step, owner, content.bundle))
            reasons = (*reasons, *against)
            if reasons:
                note = journal.export_denial(ear, session, content, reasons, charter, at)
            else:
                note = journal.export(ear, session, content, after, charter, at)
            journal.append(step, note)
            return reasons, note.entry

        (reasons, entry), receipts = await self.storage.transact(work)
        if reasons:
            raise DebitRefused(reasons)
        return Issued(b"", receipts[0], entry.to_bytes())

    async def rule(
        self, identifier: str, what: str, authorise: Authorise, judge: Judge[T]
    ) -> tuple[Ruling[T], Receipt | None]:
        """Let `judge` decide over an attested guest's call in the transaction that writes its outcome down.

        Raises SessionRefused, AppraisalRefused or EarRefused if the guest may not call.
        """
        at = self.clock()
        charter = (await self.following.charter(at)).charter
        session = await self._authorised(identifier, "v1", what, authorise, charter, at)
        ear = await self._standing(session, what, charter, at)

        def work(step: Transaction) -> Ruling[T]:
            self.following.demand(step, charter)
            step.update_session(authorise(step.session(identifier)))
            ruling = judge(step, session, ear, charter, at)
            if ruling.note is not None:
                journal.append(step, ruling.note)
            return ruling

        ruling, receipts = await self.storage.transact(work)
        return ruling, next(iter(receipts), None)

    # --- deposits ---------------------------------------------------------------------------------------------------

    async def deposit(self, resource: str, token: str, salt: bytes, value: bytes) -> tuple[Deposit, Receipt]:
        """Keep a resource that its owner, the member whose repository it is in, has signed. Raises DepositRefused."""
        at = self.clock()
        charter = (await self.following.charter(at)).charter
        content, reasons = check_deposit(token, resource, salt, value, self.name, charter, at)
        name = resource if content is None else kept_as(resource, content.generation)
        stored = None
        if content is not None and not reasons:
            stored = await asyncio.to_thread(seal_resource, name, content.serial, value, self.keks)

        def work(step: Transaction) -> tuple[str, ...]:
            self.following.demand(step, charter)
            old = step.resource(name)
            against = reasons
            if content is not None and old is not None and content.serial <= old.serial:
                against = (*against, f"the deposit's serial {content.serial} is not above the last ({old.serial})")
            if against or content is None or stored is None:
                journal.append(step, journal.deposit_denial(resource, against, charter, at))
                return against
            step.put_resource(stored)
            _forget_shares(step, resource, charter, content.generation)
            journal.append(step, journal.deposit(content, token, charter, at))
            return ()

        against, receipts = await self.storage.transact(work)
        if against or content is None:
            raise DepositRefused(against, resource=resource)
        return content, receipts[0]

    # --- within -----------------------------------------------------------------------------------------------------

    def session(self, identifier: str, protocol: Protocol) -> Session:
        """A live, attested session. Raises SessionRefused."""
        return attested_session(self.storage.read(lambda step: step.session(identifier)), protocol, self.clock())

    async def _authorised(
        self, identifier: str, protocol: Protocol, what: str, authorise: Authorise, charter: Charter, at: datetime
    ) -> Session:
        """The session of a call that it allows; a call that it does not is written down."""
        session = await self.storage.session(identifier)
        try:
            return authorise(session)
        except SealwrightError as error:
            if session is not None and session.protocol == protocol:
                reasons, denied = error.reasons if isinstance(error, Refused) else (error.what,), session
                await self.storage.transact(
                    lambda step: journal.append(step, journal.call_denial(what, denied, reasons, step.followed(), at))
                )
            raise

    async def _note(self, identifier: str, authorise: Authorise, note: Note, charter: Charter) -> Receipt:
        def work(step: Transaction) -> None:
            self.following.demand(step, charter)
            step.update_session(authorise(step.session(identifier)))
            journal.append(step, note)

        _, receipts = await self.storage.transact(work)
        return receipts[0]

    async def _standing(self, session: Session, what: str, charter: Charter, at: datetime) -> Ear:
        """The session's EAR, if it and the guest's place still stand; that they do not is written down."""
        try:
            token = session.full_ear if what == "release" else None  # policies see all claims, peers the short form
            ear = verify_ear(token or session.ear or "", charter, at)
            gone = enrolment_reasons(ear, charter)
            if gone:
                raise AppraisalRefused(gone, who=journal.place(ear.subject))
        except Refused as error:
            reasons = error.reasons
            await self.storage.transact(
                lambda step: journal.append(step, journal.call_denial(what, session, reasons, step.followed(), at))
            )
            raise
        return ear


def _forget_shares(step: Transaction, resource: str, charter: Charter, deposited: int) -> None:
    """Forget the shares that a deposit of this generation (0: the whole value) takes the place of."""
    split = charter.split(resource)
    kept = {deposited, 0 if split is None else split.generation}
    for generation in step.generations(resource):
        if generation not in kept:
            step.drop_resource(kept_as(resource, generation))


def _last_time(storage: Storage) -> datetime | None:
    size = storage.read(lambda step: step.size())
    raw = storage.read(lambda step: step.entry(size - 1)) if size else None
    return None if raw is None else parse_entry(raw).time
