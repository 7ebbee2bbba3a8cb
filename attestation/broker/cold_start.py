"""Cold start: how members give a broker its key-encryption keys back when no broker can (functions without I/O).

A broker whose key-encryption keys lie in its vault (attestation.broker.peer_kek) has them from its peers. When all
brokers are down at once, nobody can release anything. So the broker deals the vault's keys out a second time, to the
members' *custodians* (the user of that name of each member): a share for each, sealed to the custodian's results key,
which is offline. As many join as the charter's threshold says, two at least.

1. The broker, locked, makes a `Request`: those sealed shares, and evidence over keys of this very boot.
2. Each custodian judges the evidence under the charter, offline, opens its share, seals it to the boot's attested key,
   and signs that (`answer_request`). A share is worth nothing to any other boot.
3. The broker opens k of them and joins them (`join_answers`): no person ever sees the key.

What is joined counts only if its peers' word on the vault's store was made with it (peer_kek): so neither a host that
makes up shares nor an old disk can give the broker other keys.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from attestation import shamir
from attestation.binding import report_data
from attestation.broker.appraisal import Question, appraise_guest
from attestation.canonical import b64, canonical_bytes, unb64
from attestation.evidence.composite import SnpEvidence
from attestation.hybrid import PUBLIC_SIZE, HybridPrivateKey, seal
from attestation.jws import ed25519_public_key, read_jws, read_jws_header, sign_jws
from attestation.messages import Base64, EvidenceMessage, Message, check_message
from attestation.split import MAGIC, SALT_SIZE, parse_share, share_commitment
from policies.charter import Charter
from policies.documents import Digest, Name, Resource, User
from policies.errors import Refused, Unusable

COLD_START_KIND: Final = "cold-start"
"""The ledger's kind of entry for a custodian's answer."""
CUSTODIAN: Final = "custodian"
"""The user of a member to whom its shares are sealed."""
ANSWER_TYPE: Final = "seal-cold-start+jws"
MAX_REQUEST: Final = 256 * 1024
_SHARE: Final = b"sealwright-cold-start-share-v1\0"
_ANSWER: Final = b"sealwright-cold-start-answer-v1\0"


class Recovery(Message):
    """A vault's keys as they lie with custodians: `k` of the `shares`, by member, join them. For all to read."""

    broker: Name
    charter: Digest
    vault: Resource
    number: Annotated[int, Field(ge=1, lt=2**31)]
    k: Annotated[int, Field(ge=2, le=64)]
    commitments: Annotated[dict[Name, Digest], Field(min_length=2, max_length=64)]
    shares: Annotated[dict[Name, Base64], Field(min_length=2, max_length=64)]
    custodians: Annotated[dict[Name, Digest], Field(min_length=2, max_length=64)]
    """SHA-256 of the key to which each share is sealed."""


class Request(Message):
    """What a locked broker asks custodians: its evidence is bound to `keys` and `nonce` for this purpose alone."""

    recovery: Recovery
    version: Annotated[int, Field(ge=1)]
    evidence: EvidenceMessage
    init_data: Base64
    keys: Annotated[dict[Name, Base64], Field(max_length=8)]
    nonce: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]

    def to_bytes(self) -> bytes:
        """Its one form in bytes."""
        return canonical_bytes(self.model_dump(mode="json"))

    def digest(self) -> str:
        """What an answer names it by: the SHA-256 of its bytes."""
        return sha256(self.to_bytes()).hexdigest()


class Answered(Message):
    """What a custodian signs: whose share it is, to which request, and the share sealed to the boot that asks."""

    member: Name
    request: Digest
    sealed: Base64


def custodians(charter: Charter) -> dict[str, User]:
    """The custodian of each member that has one."""
    return {user.member: user for user in charter.users() if user.name == CUSTODIAN}


def needed(charter: Charter) -> int:
    """How many custodians join: the charter's threshold, and two at least, so that no one of them has the key."""
    return max(2, charter.consortium.threshold)


def deal_recovery(
    broker: str, vault: str, number: int, key: bytes, charter: Charter, randomness: Callable[[int], bytes]
) -> Recovery:
    """Deal a vault's keys out to the custodians of `charter`. Raises Unusable if it has too few."""
    them, k = custodians(charter), needed(charter)
    if len(them) < k:
        what = f"the charter has {len(them)} members with a user {CUSTODIAN}, and {k} are needed for a cold start"
        raise Unusable(what, where="cold start", do=f"Have members put their {CUSTODIAN}s into the charter.")
    names = sorted(them)
    dealt = shamir.deal(key, k, range(1, len(names) + 1), randomness)
    shares, commitments = {}, {}
    for index, name in enumerate(names, 1):
        share = MAGIC + number.to_bytes(8, "big") + bytes([index]) + randomness(SALT_SIZE) + dealt[index]
        commitments[name] = share_commitment(vault, name, share)
        info = _share_info(broker, vault, number, name, commitments[name], charter.id)
        shares[name] = b64(seal(share, unb64(them[name].results_key, where=CUSTODIAN), info=info))
    return Recovery(
        broker=broker,
        charter=charter.id,
        vault=vault,
        number=number,
        k=k,
        commitments=commitments,
        shares=shares,
        custodians={name: _key_digest(them[name]) for name in names},
    )


def is_current(recovery: Recovery, broker: str, vault: str, number: int, charter: Charter) -> bool:
    """Whether these shares are those of this vault's keys, and of the custodians that the charter has now."""
    them = {name: _key_digest(user) for name, user in custodians(charter).items()}
    about = (recovery.broker, recovery.charter, recovery.vault, recovery.number, recovery.k, recovery.custodians)
    return about == (broker, charter.id, vault, number, needed(charter), them)


def request_report_data(recovery: Recovery, version: int, nonce: bytes, keys: Mapping[str, bytes]) -> bytes:
    """The REPORT_DATA of a request: no broker has this name, so that no session's evidence is one."""
    return report_data(f"cold start of {recovery.broker}", recovery.charter, version, nonce, keys)


def request_reasons(request: Request, charter: Charter, at: datetime) -> tuple[str, ...]:
    """Every reason why nobody should answer a request: who asks is not the broker that the charter has enrolled."""
    recovery = request.recovery
    keys = {purpose: unb64(key, where=f"keys.{purpose}") for purpose, key in request.keys.items()}
    nonce, init_data = unb64(request.nonce, where="nonce"), unb64(request.init_data, where="init_data")
    if recovery.charter != charter.id or request.version != charter.version:
        return (f"the request is under version {request.version} of charter {recovery.charter[:16]}…, not this one",)
    evidence = SnpEvidence(
        unb64(request.evidence.report, where="report"), unb64(request.evidence.certificates, where="certificates")
    )
    expected = request_report_data(recovery, request.version, nonce, keys)
    verdict = appraise_guest(Question(evidence, init_data, expected, "v1"), charter, at)
    reasons, subject, entry = list(verdict.reasons), verdict.subject, charter.broker(recovery.broker)
    if len(keys["kem"]) != PUBLIC_SIZE:
        reasons.append("its key is no key to which a share could be sealed")
    if entry is None:
        reasons.append(f"the charter has no broker {recovery.broker}")
    elif subject is not None:
        wanted = ("broker", entry.name, entry.member)
        if (subject.role, subject.name, subject.member) != wanted:
            reasons.append(f"it is {subject.role}/{subject.name} of {subject.member}, not broker {entry.name}")
        if recovery.vault != f"{entry.member}/vault-broker/{entry.name}":
            reasons.append(f"{recovery.vault} is not the vault of broker {entry.name}")
    return tuple(reasons)


def answer_request(
    request: Request,
    charter: Charter,
    at: datetime,
    member: str,
    results_key: HybridPrivateKey,
    signing_key: Ed25519PrivateKey,
) -> str:
    """A custodian's answer: its share, sealed to the boot that asks. Raises Refused with every reason."""
    reasons = request_reasons(request, charter, at)
    if reasons:
        do = "Give nothing to it; find out who asks."
        raise Refused(f"this is not the broker: {reasons[0]}", where="request", do=do, reasons=reasons)
    recovery = request.recovery
    if member not in recovery.shares or member not in recovery.commitments:
        raise Refused(f"there is no share of {member}", where="request", do="Ask another member's custodian.")
    info = _share_info(
        recovery.broker, recovery.vault, recovery.number, member, recovery.commitments[member], recovery.charter
    )
    share = results_key.open(unb64(recovery.shares[member], where="share"), info=info)
    if not hmac.compare_digest(share_commitment(recovery.vault, member, share), recovery.commitments[member]):
        raise Refused("the share is not the one that was dealt", where="request", do="Ask another member's custodian.")
    digest = request.digest()
    sealed = seal(share, unb64(request.keys["kem"], where="keys"), info=_answer_info(digest, member))
    content = {"member": member, "request": digest, "sealed": b64(sealed)}
    return sign_jws(content, signing_key, kid=member, typ=ANSWER_TYPE)


def read_answer(token: str, request: Request, charter: Charter) -> Answered:
    """What a custodian of `charter` signed. Raises Refused for an answer that is not to this request; Unusable."""
    member = read_jws_header(token, typ=ANSWER_TYPE)
    user = custodians(charter).get(member)
    if user is None:
        raise Refused(f"the charter has no custodian of {member}", where="answer", do="Ask a member that has one.")
    content = check_message(Answered, read_jws(token, ed25519_public_key(user.signing_key), typ=ANSWER_TYPE))
    if (content.member, content.request) != (member, request.digest()):
        do = "Export the request again, and have it answered anew: each start of the broker asks for itself."
        raise Refused("the answer is to another request", where="answer", do=do)
    return content


def open_answer(answer: Answered, request: Request, kem: HybridPrivateKey) -> bytes:
    """The share in an answer to this request. Raises Refused for one that was sealed or dealt otherwise."""
    member = answer.member
    share = kem.open(unb64(answer.sealed, where="answer"), info=_answer_info(answer.request, member))
    dealt = request.recovery.commitments.get(member, "")
    if not hmac.compare_digest(share_commitment(request.recovery.vault, member, share), dealt):
        raise Refused("the share is not the one that was dealt", where="answer", do="Ask another member's custodian.")
    return share


def join_answers(shares: Mapping[str, bytes], k: int) -> bytes:
    """The vault's keys, from k shares that `open_answer` gave."""
    chosen = sorted((parse_share(share) for share in shares.values()), key=lambda share: share.index)[:k]
    return shamir.join({share.index: share.part for share in chosen})


def _share_info(broker: str, vault: str, number: int, member: str, commitment: str, charter: str) -> bytes:
    about: dict[str, Any] = {"broker": broker, "charter": charter, "commitment": commitment, "member": member}
    return _SHARE + canonical_bytes({**about, "number": number, "vault": vault})


def _answer_info(request: str, member: str) -> bytes:
    return _ANSWER + canonical_bytes({"member": member, "request": request})


def _key_digest(user: User) -> str:
    return sha256(user.results_key.encode("ascii")).hexdigest()
