"""Making a ledger's decisions again, one after another, from what stands behind them.

A retrial keeps what the broker had to know at each moment: the charter that was followed, the EARs that were given, how
often each resource was released, which deposit was the last. Each entry must follow from that and from its blobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from attestation.binding import bound_report_data, device_nonce, kbs_device_nonce, kbs_report_data, tee_key_digest
from attestation.broker.appraisal import Additional, Verdict, appraise_guest, brief_ear, build_ear
from attestation.broker.appraisal import Question as AppraisalQuestion
from attestation.broker.checks import check_deposit_token
from attestation.broker.cold_start import COLD_START_KIND, MAX_REQUEST, Request, read_answer, request_reasons
from attestation.broker.exports import decide_export, export_reasons
from attestation.broker.journal import place
from attestation.broker.release import Counters, decide_releases
from attestation.broker.release import Question as ReleaseQuestion
from attestation.broker.rules import floor_rules, owner_rules
from attestation.canonical import format_time, read_canonical, unb64
from attestation.ear import Ear, verify_ear
from attestation.errors import PeerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.identity import appraise_peer, enrolment_reasons
from attestation.ledger.entry import Entry
from attestation.ledger.retrial_of_vaults import VaultRetrial
from attestation.messages import check_message
from attestation.split import kept_as
from attestation.vaults import VAULT_KIND
from policies.budgets import EXPORT_KIND, Amount, Balance, keeper, parse_export
from policies.charter import Charter
from policies.documents import BrokerEntry
from policies.errors import Refused, SealwrightError
from policies.vaults import vault_place


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of the story: who got what, by which evidence."""

    number: int
    time: datetime
    kind: str
    who: str
    image: str | None
    measurement: str | None
    tcb: Mapping[str, Any] | None
    what: str
    outcome: str
    platform: str | None

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "entry": self.number,
            "time": format_time(self.time),
            "kind": self.kind,
            "who": self.who,
            "image": self.image,
            "measurement": self.measurement,
            "tcb": None if self.tcb is None else dict(self.tcb),
            "what": self.what,
            "outcome": self.outcome,
            "platform": self.platform,
        }


class Missing(Exception):
    """A blob or a field that an entry needs and that is not there (told where it is missing)."""


class Retrial:
    """The state of a retrial; feed it good entries in their order."""

    def __init__(self, broker: BrokerEntry | None, charters: Mapping[int, Charter], blobs: Mapping[str, bytes]) -> None:
        self.decisions: list[Decision] = []
        self._broker = broker
        self._charters = charters
        self._blobs = blobs
        self._charter: Charter | None = None
        self._ears: dict[str, tuple[str, datetime]] = {}
        self._spent: set[str] = set()
        self._serials: dict[str, int] = {}
        self._releases: Counter[tuple[str, str]] = Counter()
        self._vaults = VaultRetrial()
        self._exports: dict[tuple[str, str], Amount] = {}

    def judge(self, number: int, entry: Entry) -> list[str]:
        """Every reason why this entry does not follow from what stands behind it."""
        if entry.kind == "charter":
            self._charter = self._charters.get(number)
            return []
        if self._charter is None or self._broker is None:
            return []  # the charter before it is named as a problem already
        broker = self._charter.broker(self._broker.name)  # with the keys that it had then
        if broker is None:
            return ["the charter of its time does not name this broker"]
        try:
            return self._judge(number, entry, self._charter, broker)
        except Missing:
            return []  # the blob is named as a problem already
        except SealwrightError as error:
            return [error.what]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return [f"it lacks what an entry of its kind has ({type(error).__name__}: {error})"]

    def _judge(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry) -> list[str]:
        reasons = []
        if entry.body["charter"] != {"id": charter.id, "version": charter.version}:
            reasons.append("it follows another charter than the ledger named last")
        if entry.kind == "appraisal":
            return reasons + self._appraisal(number, entry, charter, broker)
        if entry.kind == "denial":
            return reasons + self._denial(number, entry, charter, broker)
        if entry.kind == "deposit":
            return reasons + self._deposit(number, entry, charter, broker)
        if entry.kind == COLD_START_KIND:
            return reasons + self._cold_start(number, entry, charter, broker)
        ear, age, against = self._ear(entry, charter)
        reasons += against
        if entry.kind == "release":
            return reasons + self._release(number, entry, charter, broker, ear, age)
        if entry.kind == EXPORT_KIND:
            return reasons + self._export(number, entry, charter, broker, ear)
        if entry.kind == VAULT_KIND:
            what = f"{entry.body['step']} {entry.body['vault']}"
            self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, what, "done")
            return reasons + self._vaults.call(entry.body, ear, broker.name, charter)
        if entry.kind == "credential":
            reasons += self._credential(entry, charter, broker, ear)
        self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, entry.kind, "recorded")
        return reasons

    # --- kinds ------------------------------------------------------------------------------------------------------

    def _appraisal(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry) -> list[str]:
        body = entry.body
        verdict, reasons = self._appraise(entry, charter, broker), []
        named = [body[name] for name in ("ear", "full-ear") if name in body]
        if body["session"] in self._spent:
            reasons.append("its session's nonce was used before")
        self._spent.add(body["session"])
        self._ears |= dict.fromkeys(named, (body["session"], entry.time))
        self._row(number, entry, verdict.who, _image(verdict), verdict.claims, "attest", "affirming")
        if verdict.reasons:
            return [*reasons, *(f"the evidence does not earn its EAR: {reason}" for reason in verdict.reasons)]
        given = [verify_ear(self._blob(digest).decode("ascii"), charter, entry.time) for digest in named]
        ear = given[0]
        runtime = body["bound"] if body["protocol"] == "kbs" else None
        expected = build_ear(
            verdict,
            charter,
            broker=broker.name,
            nonce=body["guest-nonce"],
            keys=body["bound"]["keys"] if runtime is None else {"tee": tee_key_digest(runtime["tee-pubkey"])},
            at=entry.time,
            runtime=runtime,
        )
        expected = expected.model_copy(update={"iat": ear.document.iat, "exp": ear.document.exp})
        shown = brief_ear(expected) if runtime is None else expected
        if [one.document for one in given] != ([shown] if shown == expected else [shown, expected]):
            reasons.append("its EAR says something else than the evidence")
        if abs(ear.issued_at - entry.time).total_seconds() > 1:
            reasons.append("its EAR was signed at another time")
        if body["subject"] != ear.subject.model_dump(mode="json"):
            reasons.append("it names another place than its EAR")
        return reasons

    def _denial(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry) -> list[str]:
        body = entry.body
        what, said = body["what"], body["reasons"]
        outcome = "refused: " + "; ".join(said)
        if not said:
            return ["it refuses without a reason"]
        if what == "appraisal":
            claims: Mapping[str, Any] = {}
            self._spent.add(body["session"])
            image, lacking = None, []
            if body["evidence-kept"]:
                verdict = self._appraise(entry, charter, broker)
                claims, image = verdict.claims, _image(verdict)
                lacking = [reason for reason in verdict.reasons if reason not in said]
            self._row(number, entry, body["claimed"], image, claims, "attest", outcome)
            return [f"it does not name a reason that the evidence gives: {reason}" for reason in lacking]
        if what == "release":
            ear, age, against = self._ear(entry, charter)
            found = (*self._decide(entry, charter, ear, age), *self._vaults.opening_denial(body, ear, charter))
            self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, body["resource"], outcome)
            return against + [f"it does not name a rule that is against it: {r}" for r in found if r not in said]
        if what == EXPORT_KIND:
            ear, _, against = self._ear(entry, charter)
            _, found = self._debited(entry, charter, broker, ear)
            self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, EXPORT_KIND, outcome)
            return against + [f"it does not name what is against it: {r}" for r in found if r not in said]
        if what == VAULT_KIND:
            ear, _, against = self._ear(entry, charter)
            found = self._vaults.call_denial(body, ear, broker.name, charter)
            asked = f"{body['step']} {body['vault']}"
            self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, asked, outcome)
            return against + [f"it does not name what is against it: {r}" for r in found if r not in said]
        who, asked = (
            (body["resource"].partition("/")[0], body["resource"]) if what == "deposit" else ("session", "call")
        )
        self._row(number, entry, who, None, {}, body.get("call", asked), outcome)
        return []

    def _release(
        self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry, ear: Ear, age: int
    ) -> list[str]:
        body = entry.body
        resource = body["resource"]
        reasons = [f"it should not have been released: {reason}" for reason in self._decide(entry, charter, ear, age)]
        split, generation = charter.split(resource), body.get("generation", 0)
        is_vault = vault_place(resource) is not None
        if is_vault:
            reasons += self._vaults.opening(body, ear, charter)
        elif generation != (0 if split is None else split.generation):
            reasons.append(f"it is of generation {generation} of {resource}, which is not the charter's")
        elif split is not None and (broker.name not in split.brokers or body["share"] != split.index(broker.name)):
            reasons.append("it is another broker's share")
        if not is_vault and self._serials.get(kept_as(resource, generation)) != body["serial"]:
            reasons.append(f"deposit {body['serial']} of {resource} is not the last one before it")
        for key in self._count_keys(resource, ear):
            self._releases[key] += 1
        self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, resource, "released")
        return reasons

    def _decide(self, entry: Entry, charter: Charter, ear: Ear, age: int) -> tuple[str, ...]:
        """The policies' verdict, on counters counted anew."""
        body = entry.body
        enrolment = charter.enrolment(ear.subject.role, ear.subject.name)
        if enrolment is None:
            return ("the guest's place is not enrolled",)
        counted = Counters(*(self._releases[key] for key in self._count_keys(body["resource"], ear)))
        against: tuple[str, ...] = ()
        if body["counters"] != counted.as_dict():
            against += ("its counters are not those of the ledger",)
        if abs(body["age_seconds"] - age) > 1:
            against += ("it is wrong about the session's age",)
        question = ReleaseQuestion(
            body["resource"], ear, enrolment, body["age_seconds"], body["protocol"], body["job"], counted, entry.time
        )
        floor, owner = charter.policy("floor.rego"), charter.release_policy(body["resource"])
        (reasons,) = decide_releases(
            [question],
            None if floor is None else floor_rules(floor),
            None if owner is None else owner_rules(owner),
        )
        return against + reasons

    def _export(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry, ear: Ear) -> list[str]:
        after, reasons = self._debited(entry, charter, broker, ear)
        owner, bundle = ear.subject.member, parse_export(entry.body["document"]).bundle
        if not reasons and entry.body["spent"] != after.to_json():
            reasons = ("its balance is not that of the ledger",)
        self._exports[owner, ""], self._exports[owner, bundle] = after.owner, after.bundle
        self._row(number, entry, place(ear.subject), ear.subject.image, ear.claims, EXPORT_KIND, "debited")
        return [f"it should not have been debited: {reason}" for reason in reasons]

    def _debited(
        self, entry: Entry, charter: Charter, broker: BrokerEntry, ear: Ear
    ) -> tuple[Balance, tuple[str, ...]]:
        """The balance after an export, counted anew, and what is against it."""
        content, owner = parse_export(entry.body["document"]), ear.subject.member
        spent = Balance(self._exports.get((owner, ""), Amount()), self._exports.get((owner, content.bundle), Amount()))
        after, against = decide_export(charter, owner, content, spent)
        return after, (*export_reasons(ear, keeper(charter.consortium, owner), broker.name), *against)

    def _deposit(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry) -> list[str]:
        body = entry.body
        token = self._blob(body["deposit"]).decode("ascii")
        content, found = check_deposit_token(token, body["resource"], broker.name, charter, entry.time)
        reasons = [*found]
        generation = body.get("generation", 0)
        if content is None or (content.serial, content.generation) != (body["serial"], generation):
            reasons.append("its serial is not the signed one")
        kept = kept_as(body["resource"], generation)
        if body["serial"] <= self._serials.get(kept, 0):
            reasons.append("an older deposit was put in place of a newer one")
        self._serials[kept] = body["serial"]
        self._row(number, entry, body["resource"].partition("/")[0], None, {}, body["resource"], "deposited")
        return reasons

    def _cold_start(self, number: int, entry: Entry, charter: Charter, broker: BrokerEntry) -> list[str]:
        raw, body = self._blob(entry.body["request"]), entry.body
        request = check_message(Request, read_canonical(raw, where="request", limit=MAX_REQUEST))
        answer = read_answer(self._blob(body["answer"]).decode("ascii"), request, charter)
        reasons = [
            f"custodians should not have answered: {why}" for why in request_reasons(request, charter, entry.time)
        ]
        said = (answer.member, request.recovery.broker, request.recovery.vault)
        if said != (body["member"], broker.name, body["vault"]):
            reasons.append("it is about another broker, vault or member")
        self._row(number, entry, f"broker/{broker.name}", None, {}, body["vault"], f"answered by {answer.member}")
        return reasons

    def _credential(self, entry: Entry, charter: Charter, broker: BrokerEntry, ear: Ear) -> list[str]:
        certificate = self._blob(entry.body["certificate"])
        try:
            peer = appraise_peer(certificate, charter, entry.time)
            issuer = x509.load_pem_x509_certificate(broker.issuer_certificate.encode())
            x509.load_der_x509_certificate(certificate).verify_directly_issued_by(issuer)
        except PeerRefused as error:
            return [f"its certificate does not hold: {reason}" for reason in error.reasons]
        except (ValueError, TypeError, InvalidSignature):
            return ["its certificate was issued by another broker"]
        carried = {one.broker: sha256(one.token.encode()).hexdigest() for one in peer.ears}
        if carried != entry.body["ears"] or carried.get(broker.name) != entry.body["ear"]:
            return ["its certificate carries other EARs"]
        return []

    # --- within -----------------------------------------------------------------------------------------------------

    def _appraise(self, entry: Entry, charter: Charter, broker: BrokerEntry) -> Verdict:
        body = entry.body
        evidence, bound, protocol = body["evidence"], body["bound"], body["protocol"]
        init_data = None if evidence["init-data"] is None else self._blob(evidence["init-data"])
        text = self._blob(evidence["devices"]).decode("utf-8", "surrogatepass") if "devices" in evidence else ""
        additional = None
        if text:
            nonce = expected_device_nonce(bound, protocol, broker.name, charter)
            additional = Additional(text, nonce, self._blob(evidence["gpu-endorsements"]))
        question = AppraisalQuestion(
            SnpEvidence(self._blob(evidence["report"]), self._blob(evidence["certificates"])),
            init_data,
            expected_report_data(bound, protocol, broker.name, charter, text),
            protocol,
            additional,
        )
        return appraise_guest(question, charter, entry.time)

    def _ear(self, entry: Entry, charter: Charter) -> tuple[Ear, int, list[str]]:
        """The EAR that an entry names, which must have been given before, to this session, and still hold."""
        body = entry.body
        digest = body["ear"]
        reasons = []
        session, given = self._ears.get(digest, ("", entry.time))
        if digest not in self._ears or session != body["session"]:
            reasons.append("its EAR was not given before in its session")
        try:
            ear = verify_ear(self._blob(digest).decode("ascii"), charter, entry.time)
        except Refused as error:
            raise Refused(
                f"its EAR does not hold: {'; '.join(error.reasons)}", where="entry", do="Do not rely on it."
            ) from error
        reasons += enrolment_reasons(ear, charter)
        if body["subject"] != ear.subject.model_dump(mode="json"):
            reasons.append("it names another place than its EAR")
        return ear, max(0, int((entry.time - given).total_seconds())), reasons

    def _count_keys(self, resource: str, ear: Ear) -> tuple[tuple[str, str], ...]:
        return (
            (resource, ""),
            (resource, f"guest {place(ear.subject)}"),
            (resource, f"boot {ear.claims.get('report_id')}"),
        )

    def _blob(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise Missing(digest)
        return self._blobs[digest]

    def _row(
        self, number: int, entry: Entry, who: str, image: str | None, claims: Mapping[str, Any], what: str, outcome: str
    ) -> None:
        tcb = claims.get("reported_tcb")
        self.decisions.append(
            Decision(
                number,
                entry.time,
                entry.kind,
                who,
                image,
                claims.get("measurement"),
                tcb if isinstance(tcb, dict) else None,
                what,
                outcome,
                claims.get("platform"),
            )
        )


def expected_report_data(
    bound: Mapping[str, Any], protocol: str, broker: str, charter: Charter, devices: str = ""
) -> bytes:
    """What REPORT_DATA had to be, from what the ledger says was bound and the text of further devices' evidence."""
    if protocol == "kbs":
        return kbs_report_data(bound["nonce"], bound["tee-pubkey"], devices)
    nonce = unb64(bound["nonce"], where="nonce")
    return bound_report_data(broker, charter.id, charter.version, nonce, bound["keys"], devices)


def expected_device_nonce(bound: Mapping[str, Any], protocol: str, broker: str, charter: Charter) -> bytes:
    """With what further devices had to be asked, from what the ledger says was bound."""
    if protocol == "kbs":
        return kbs_device_nonce(bound["nonce"], bound["tee-pubkey"])
    return device_nonce(broker, charter.id, charter.version, unb64(bound["nonce"], where="nonce"), bound["keys"])


def _image(verdict: Verdict) -> str | None:
    return verdict.subject.image if verdict.subject else None
