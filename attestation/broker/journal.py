"""What the broker writes down: the body of each kind of ledger entry. One place for those who write and for auditors.

Every body names the charter that was followed and, where a guest is concerned, its session and place. Bodies hold no
secret, and no value from which one could be guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from attestation.broker.appraisal import Question as AppraisalQuestion
from attestation.broker.appraisal import Verdict
from attestation.broker.cold_start import COLD_START_KIND, Answered, Request
from attestation.broker.release import Question as ReleaseQuestion
from attestation.broker.sessions import Session
from attestation.broker.storage import Transaction
from attestation.ear import Ear, Subject
from attestation.ledger.entry import Entry
from attestation.messages import Deposit
from attestation.vaults import VAULT_KIND, VaultCall, VaultState
from policies.budgets import EXPORT_KIND, Balance, Export
from policies.charter import Charter


@dataclass(frozen=True, slots=True)
class Note:
    """An entry with its blobs and what counters count it by."""

    entry: Entry
    blobs: Mapping[str, bytes]
    resource: str | None = None
    guest: str | None = None
    boot: str | None = None


def digest(raw: bytes) -> str:
    """Lower-case hex SHA-256."""
    return sha256(raw).hexdigest()


def charter_of(charter: Charter) -> dict[str, Any]:
    """Which charter was followed."""
    return {"id": charter.id, "version": charter.version}


def appraisal(
    question: AppraisalQuestion,
    verdict: Verdict,
    session: Session,
    bound: Mapping[str, Any],
    charter: Charter,
    at: datetime,
) -> Note:
    """An affirmed guest, its EARs in its session. `bound` is what REPORT_DATA was computed from."""
    ears = {name: token.encode() for name, token in (("ear", session.ear), ("full-ear", session.full_ear)) if token}
    blobs = {**_evidence(question), **{digest(token): token for token in ears.values()}}
    body = {
        **_appraised(question, verdict, session, bound, charter),
        **{name: digest(token) for name, token in ears.items()},
        "subject": verdict.subject.model_dump(mode="json") if verdict.subject else None,
    }
    return Note(Entry("appraisal", at, body), blobs, guest=verdict.who, boot=_boot(verdict.claims))


def appraisal_denial(
    question: AppraisalQuestion,
    verdict: Verdict,
    session: Session,
    bound: Mapping[str, Any],
    reasons: Sequence[str],
    charter: Charter,
    at: datetime,
) -> Note:
    """A guest that got no EAR. Evidence that cannot even be read is not kept."""
    kept = verdict.appraisal is not None
    body = {
        **_appraised(question, verdict, session, bound, charter),
        "claimed": verdict.who,
        "evidence-kept": kept,
        "reasons": list(reasons),
        "what": "appraisal",
    }
    return Note(Entry("denial", at, body), _evidence(question) if kept else {}, guest=verdict.who)


def call_denial(call: str, session: Session, reasons: Sequence[str], followed: str | None, at: datetime) -> Note:
    """A call that was refused before anything was decided: a replayed nonce or proof, a guest whose place is gone.

    `followed` is the charter that the ledger named last (Transaction.followed).
    """
    identifier, _, version = (followed or "").partition(" ")
    body = {
        "call": call,
        "charter": {"id": identifier, "version": int(version or 0)},
        "protocol": session.protocol,
        "reasons": list(reasons),
        "session": session.id,
        "what": "call",
    }
    return Note(Entry("denial", at, body), {})


def release(
    question: ReleaseQuestion,
    session: Session,
    charter: Charter,
    *,
    serial: int,
    request: str,
    share: tuple[int, int] | None = None,
    opening: Mapping[str, Any] | None = None,
) -> Note:
    """A released resource; `share` is generation and index of what was released of a split one, `opening` a vault's
    epoch and its state afterwards."""
    body = {**_asked(question, session, charter), "request": request, "serial": serial, **(opening or {})}
    if share is not None:
        body["generation"], body["share"] = share
    return Note(
        Entry("release", question.at, body),
        {},
        resource=question.resource,
        guest=place(question.ear.subject),
        boot=_boot(question.ear.claims),
    )


def release_denial(
    question: ReleaseQuestion, session: Session, charter: Charter, reasons: Sequence[str], epoch: int | None = None
) -> Note:
    """A resource that was not released, with every rule that was against it; `epoch` is that of a vault's opening."""
    body = {**_asked(question, session, charter), "reasons": list(reasons), "what": "release"}
    if epoch is not None:
        body["epoch"] = epoch
    return Note(Entry("denial", question.at, body), {}, resource=question.resource, guest=place(question.ear.subject))


def credential(
    ear: Ear, ears: Sequence[Ear], session: Session, certificate: bytes, charter: Charter, at: datetime
) -> Note:
    """An issued credential. `ear` is this broker's own among `ears`, all of which are in the certificate."""
    vouching = {one.broker: digest(one.token.encode()) for one in ears}
    body = {**_of_guest(ear, session, charter), "certificate": digest(certificate), "ears": vouching}
    return Note(Entry("credential", at, body), {digest(certificate): certificate}, guest=place(ear.subject))


def record(ear: Ear, session: Session, kind: str, document: Mapping[str, Any], charter: Charter, at: datetime) -> Note:
    """What a guest had written down."""
    body = {**_of_guest(ear, session, charter), "document": dict(document)}
    return Note(Entry(kind, at, body), {}, guest=place(ear.subject))


def export(ear: Ear, session: Session, content: Export, spent: Balance, charter: Charter, at: datetime) -> Note:
    """What a site lets out, debited: `spent` is its owner's balance after it."""
    body = {
        **_of_guest(ear, session, charter),
        "document": content.model_dump(mode="json"),
        "spent": spent.to_json(),
    }
    return Note(
        Entry(EXPORT_KIND, at, body),
        {},
        resource=balance_of(ear.subject.member),
        guest=place(ear.subject),
        boot=content.bundle,
    )


def balance_of(owner: str) -> str:
    """What the entries of an owner's exports are counted under; a bundle's among them by its digest."""
    return f"{owner}/{EXPORT_KIND}"


def export_denial(
    ear: Ear, session: Session, content: Export, reasons: Sequence[str], charter: Charter, at: datetime
) -> Note:
    """An export for which there is no budget left."""
    body = {
        **_of_guest(ear, session, charter),
        "document": content.model_dump(mode="json"),
        "reasons": list(reasons),
        "what": EXPORT_KIND,
    }
    return Note(Entry("denial", at, body), {}, guest=place(ear.subject))


def deposit(content: Deposit, token: str, charter: Charter, at: datetime) -> Note:
    """A resource that its owner deposited; the blob is what the owner signed."""
    body = {
        "charter": charter_of(charter),
        "deposit": digest(token.encode()),
        "resource": content.resource,
        "serial": content.serial,
        **({"generation": content.generation} if content.generation else {}),
    }
    return Note(Entry("deposit", at, body), {digest(token.encode()): token.encode()}, resource=content.resource)


def deposit_denial(resource: str, reasons: Sequence[str], charter: Charter, at: datetime) -> Note:
    """A deposit that was refused."""
    body = {"charter": charter_of(charter), "reasons": list(reasons), "resource": resource, "what": "deposit"}
    return Note(Entry("denial", at, body), {}, resource=resource)


def vault(asked: VaultCall, state: VaultState, ear: Ear, session: Session, charter: Charter, at: datetime) -> Note:
    """What a guest did to its vault, and the vault's state after it."""
    body = {**_of_guest(ear, session, charter), **asked.to_json(), "state": state.to_json()}
    who, boot = place(ear.subject), _boot(ear.claims)
    return Note(Entry(VAULT_KIND, at, body), {}, resource=asked.vault, guest=who, boot=boot)


def vault_denial(
    asked: VaultCall, reasons: Sequence[str], ear: Ear, session: Session, charter: Charter, at: datetime
) -> Note:
    """What a guest could not do to a vault."""
    body = {
        **_of_guest(ear, session, charter),
        **asked.to_json(),
        "boot": _boot(ear.claims),
        "reasons": list(reasons),
        "what": VAULT_KIND,
    }
    return Note(Entry("denial", at, body), {}, resource=asked.vault, guest=place(ear.subject))


def cold_start(answer: Answered, token: str, request: Request, charter: Charter, at: datetime) -> Note:
    """A custodian's answer to this broker's request for its keys; request and answer are kept whole."""
    blobs = {digest(raw): raw for raw in (token.encode(), request.to_bytes())}
    body = {
        "answer": digest(token.encode()),
        "charter": charter_of(charter),
        "member": answer.member,
        "request": answer.request,
        "vault": request.recovery.vault,
    }
    return Note(Entry(COLD_START_KIND, at, body), blobs)


def place(subject: Subject) -> str:
    """`role/name`."""
    return f"{subject.role}/{subject.name}"


def append(step: Transaction, note: Note) -> int:
    """Append a note to the ledger; return the entry's number."""
    return step.append(note.entry, blobs=note.blobs, resource=note.resource, guest=note.guest, boot=note.boot)


def _within(session: Session, charter: Charter) -> dict[str, Any]:
    return {"charter": charter_of(charter), "protocol": session.protocol, "session": session.id}


def _of_guest(ear: Ear, session: Session, charter: Charter) -> dict[str, Any]:
    return {
        **_within(session, charter),
        "ear": digest(ear.token.encode()),
        "subject": ear.subject.model_dump(mode="json"),
    }


def _asked(question: ReleaseQuestion, session: Session, charter: Charter) -> dict[str, Any]:
    return {
        **_of_guest(question.ear, session, charter),
        "age_seconds": question.age_seconds,
        "counters": question.counters.as_dict(),
        "job": None if question.job is None else dict(question.job),
        "resource": question.resource,
    }


def _appraised(
    question: AppraisalQuestion, verdict: Verdict, session: Session, bound: Mapping[str, Any], charter: Charter
) -> dict[str, Any]:
    evidence = question.evidence
    claims = verdict.claims
    named: dict[str, str | None] = {
        "certificates": digest(evidence.certificates),
        "init-data": None if question.init_data is None else digest(question.init_data),
        "report": digest(evidence.report),
    }
    if question.additional is not None:
        named["devices"] = digest(_text(question.additional.text))
        named["gpu-endorsements"] = digest(question.additional.endorsements)
    return {
        **_within(session, charter),
        "bound": dict(bound),
        "evidence": named,
        "guest-nonce": session.guest_nonce,
        "measurement": claims.get("measurement"),
        "platform": claims.get("platform"),
    }


def _evidence(question: AppraisalQuestion) -> dict[str, bytes]:
    parts = [question.evidence.report, question.evidence.certificates]
    parts += [question.init_data] if question.init_data is not None else []
    if question.additional is not None:
        parts += [_text(question.additional.text), question.additional.endorsements]
    return {digest(part): part for part in parts}


def _text(text: str) -> bytes:
    """A text's bytes; a lone surrogate, which JSON can bring, is kept as it is."""
    return text.encode("utf-8", "surrogatepass")


def _boot(claims: Mapping[str, Any]) -> str | None:
    value = claims.get("report_id")
    return value if isinstance(value, str) else None
