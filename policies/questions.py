"""The questions that a charter's rules answer, and the documents in which they are put.

What is checked whatever the charter says (attestation, enrolment, approval, rights) is code, where it is needed. Rules
come on top, by one rule for all packages (docs/adr/0018-rules-add-demands.md): a module in the charter adds demands,
and one that is not there adds none. Only a release is no demand but a grant: it needs a yes of both the floor and the
owner's policy, so that there the absence of either denies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal

from policies.charter import Charter
from policies.decisions import Decision, Rules
from policies.documents import Enrolment, Role, User, format_time
from policies.errors import MalformedDocument
from policies.rights import COMMANDS, command_reasons

Subject = Literal["release", "appraisal", "admission", "peers", "export", "command"]
PATIENCE: Final = 20.0
"""Seconds for one answer. Most who ask are guests, which may be emulated on a busy host; a refusal would end them."""
SUBJECTS: Final[tuple[Subject, ...]] = ("release", "appraisal", "admission", "peers", "export", "command")
"""What can be asked; all but `command`, which is about a user's rights, is answered by Rego rules."""
Place = tuple[Role, str]
"""A guest's role and name, as it is enrolled."""
ExportKind = Literal["update", "metric", "log", "result"]
"""What leaves a guest: a site's whole update, the metrics beside it, a number that its script logs; a job's result."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one set of rules says: the file they stand in, and the decision."""

    file: str
    decision: Decision


def ask(
    charter: Charter, subject: Subject, document: Mapping[str, Any], resource: str | None = None
) -> tuple[Answer, ...]:
    """Return the answer of every set of rules that decides on `subject`; it is allowed only if all allow it.

    For a release, those are the floor and the policy of the owner of `resource`, each evaluated apart; one that is not
    there denies. Other subjects have one set, or none. A command is answered by the user's rights.
    """
    if subject == "command":
        return (_rights(charter, document),)
    if subject != "release":
        file = f"policies/{subject}.rego"
        text = charter.policy(f"{subject}.rego")
        return () if text is None else (_answer(file, text, f"sealwright.{subject}", document),)
    owner = charter.release_policy(resource) if resource and resource.count("/") == 2 else None
    return (
        _answer("policies/floor.rego", charter.policy("floor.rego"), "sealwright.floor", document),
        _answer(f"the release policy of {resource}", owner, "sealwright.release", document),
    )


def completed(
    charter: Charter, subject: Subject, facts: Mapping[str, Any], here: Place | None, at: datetime
) -> dict[str, Any]:
    """Return the `input` that rules would see: `facts`, and what the charter says of whom they name.

    Facts are what no charter knows: `job` (admission, export), `peer` (peers), `kind`, `size`, `to`, `sealed` (export),
    `appraisal` (appraisal), `ear`, `session`, `counters` (release). `here` is the guest that asks; without it, and for
    whatever the facts give themselves, nothing is filled in. Raises MalformedDocument if facts are missing or amiss.
    """
    if here is None:
        return dict(facts)
    role, name = here
    try:
        if subject == "admission":
            filled = admission_document(charter, facts["job"], role, name, at)
        elif subject == "peers":
            filled = peer_document(charter, here, facts["peer"], at)
            return {**filled, **{key: value for key, value in facts.items() if key != "peer"}}
        elif subject == "export":
            to = (str(facts["to"]["role"]), str(facts["to"]["name"]))
            sealed = bool(facts.get("sealed", False))
            filled = export_document(
                charter, facts["job"], facts["kind"], facts["size"], here=here, to=to, at=at, sealed=sealed
            )
            return {**filled, **{key: value for key, value in facts.items() if key != "to"}}
        elif subject == "appraisal":
            filled = appraisal_document(charter, facts["appraisal"], charter.enrolment(role, name), at)
        else:
            place = charter.enrolment(role, name)
            filled = {"at": format_time(at), "enrolment": None if place is None else place.model_dump(mode="json")}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MalformedDocument(
            f"the question lacks what one about {subject} needs ({type(error).__name__}: {error})",
            where="question",
            do="docs/reference/charter.md, What a policy sees.",
        ) from error
    return {**filled, **facts}


def _rights(charter: Charter, document: Mapping[str, Any]) -> Answer:
    """Whether a user may give a command: `user`, `command`, and for a job that somebody submitted, `submitter`."""
    user, command = str(document.get("user")), document.get("command")
    found = next((one for one in COMMANDS if one == command), None)
    submitter = document.get("submitter")
    if found is None:
        reasons: tuple[str, ...] = (f"there is no command {str(command)[:100]!r}; there are {', '.join(COMMANDS)}",)
    else:
        reasons = command_reasons(charter, user, found, submitter=None if submitter is None else str(submitter))
    return Answer(f"the rights of {user[:140]}", Decision(not reasons, reasons))


def _answer(file: str, text: str | None, package: str, document: Mapping[str, Any]) -> Answer:
    if text is None:
        return Answer(file, Decision(False, ("it is not in the charter, so nothing is allowed",)))
    return Answer(file, _rules(file, text).decide(package, document))


@lru_cache(maxsize=64)
def _rules(file: str, text: str) -> Rules:
    return Rules({file: text}, time_limit=PATIENCE)


def appraisal_reasons(
    charter: Charter,
    appraisal: Mapping[str, Any],
    enrolment: Enrolment,
    at: datetime,
    *,
    devices: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[str, ...]:
    """Return what the consortium's further demands (`policies/appraisal.rego`) say against a guest.

    `appraisal` is what `Appraisal.to_json()` gives for the CPU, `devices` the same for each further device by name
    (`gpu0`, …). The rules see the enrolment and its image beside them.
    """
    return _against(ask(charter, "appraisal", appraisal_document(charter, appraisal, enrolment, at, devices)))


def appraisal_document(
    charter: Charter,
    appraisal: Mapping[str, Any],
    enrolment: Enrolment | None,
    at: datetime,
    devices: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the `input` of the appraisal rules."""
    image = None if enrolment is None else charter.image(enrolment.image)
    return {
        "appraisal": appraisal,
        "at": format_time(at),
        "charter": _charter(charter),
        "devices": {} if devices is None else dict(devices),
        "enrolment": None if enrolment is None else enrolment.model_dump(mode="json"),
        "image": None if image is None else image.model_dump(mode="json"),
    }


def admission_reasons(charter: Charter, job: Mapping[str, Any], role: Role, name: str, at: datetime) -> tuple[str, ...]:
    """Return what the consortium's further demands (`policies/admission.rego`) say against a job at one guest.

    `job` is the record as a mapping (job, name, bundle, roster, server, recipients, rounds, min_sites, submitter;
    in a job of devices also how many each aggregate is of: devices); `role` and `name` are the guest that asks: the
    server or one of the roster.
    """
    return _against(ask(charter, "admission", admission_document(charter, job, role, name, at)))


def admission_document(charter: Charter, job: Mapping[str, Any], role: Role, name: str, at: datetime) -> dict[str, Any]:
    """Return the `input` of the admission rules."""
    approval = charter.bundle(str(job.get("bundle")))
    recipients = [_user(charter, recipient) for recipient in job.get("recipients", ())]
    places = (charter.enrolment("site", str(site)) for site in job.get("roster", ()))
    return {
        "at": format_time(at),
        "bundle": None if approval is None else approval.model_dump(mode="json"),
        "charter": _charter(charter),
        "here": {"role": role, "name": name},
        "job": dict(job),
        "recipients": [person for person in recipients if person is not None],
        "sites": [place.model_dump(mode="json") for place in places if place is not None],
        "submitter": _user(charter, job.get("submitter")),
    }


def peer_reasons(charter: Charter, here: Place, peer: Mapping[str, Any], at: datetime) -> tuple[str, ...]:
    """Return what the consortium's further demands (`policies/peers.rego`) say against a peer of the guest `here`.

    `peer` is what its appraisal has shown: `role`, `name`, `age_seconds` (since its oldest EAR was signed), `submods`
    (as an EAR has them) and `brokers` (who signed its EARs). The peer may have called, or have been called.
    """
    return _against(ask(charter, "peers", peer_document(charter, here, peer, at)))


def peer_document(charter: Charter, here: Place, peer: Mapping[str, Any], at: datetime) -> dict[str, Any]:
    """Return the `input` of the peers rules."""
    return {
        "at": format_time(at),
        "charter": _charter(charter),
        "here": _place(charter, *here),
        "peer": {**peer, **_place(charter, str(peer["role"]), str(peer["name"]))},
    }


def export_reasons(
    charter: Charter,
    job: Mapping[str, Any],
    kind: ExportKind,
    size: int,
    *,
    here: Place,
    to: tuple[str, str],
    at: datetime,
    sealed: bool = False,
) -> tuple[str, ...]:
    """Return what the consortium's further demands (`policies/export.rego`) say against something that is to leave.

    `size` is in bytes; `to` is a guest's role and name, or "user" and MEMBER/USER, for whom `sealed` results are.
    `job` is the record as a mapping, as for admission.
    """
    document = export_document(charter, job, kind, size, here=here, to=to, at=at, sealed=sealed)
    return _against(ask(charter, "export", document))


def export_document(
    charter: Charter,
    job: Mapping[str, Any],
    kind: ExportKind,
    size: int,
    *,
    here: Place,
    to: tuple[str, str],
    at: datetime,
    sealed: bool = False,
) -> dict[str, Any]:
    """Return the `input` of the export rules."""
    return {
        "at": format_time(at),
        "charter": _charter(charter),
        "from": _place(charter, *here),
        "job": dict(job),
        "kind": kind,
        "sealed": sealed,
        "size": size,
        "to": _place(charter, *to),
    }


def _place(charter: Charter, role: str, name: str) -> dict[str, Any]:
    """A guest with the jurisdiction of its host, a user with that of its member; null where the charter says nothing.

    A host whose jurisdiction nobody enrolled stands nowhere, wherever its member is at home.
    """
    if role == "user":
        user = _user(charter, name)
        member = None if user is None else str(user["member"])
        known = None if member is None else charter.consortium.member(member)
        return {"role": role, "name": name, "member": member, "jurisdiction": known and known.jurisdiction}
    place = charter.enrolment(role, name)
    if place is None:
        return {"role": role, "name": name, "member": None, "jurisdiction": None}
    return {"role": role, "name": name, "member": place.member, "jurisdiction": place.jurisdiction}


def _charter(charter: Charter) -> dict[str, Any]:
    return {
        "id": charter.id,
        "members": {member.name: {"jurisdiction": member.jurisdiction} for member in charter.consortium.members},
        "platform": charter.consortium.platform,
        "version": charter.version,
    }


def _user(charter: Charter, name: object) -> dict[str, Any] | None:
    member, _, own = str(name).partition("/")
    user: User | None = charter.user(member, own)
    return None if user is None else {"member": user.member, "name": user.name, "rights": list(user.rights)}


def _against(answers: tuple[Answer, ...]) -> tuple[str, ...]:
    return tuple(f"{answer.file}: {reason}" for answer in answers for reason in answer.decision.reasons)
