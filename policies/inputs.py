"""What each package of rules reads as its `input`: the models, from which the JSON Schemas in `rego/schemas` are made.

`python -m policies.inputs` writes those anew; a test holds that they are current, and that what is asked in earnest
fits them. Rules may rely on every member that a schema requires being there, in this form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.documents import BundleApproval, Enrolment, ImageReference, Platform, Right, Role
from policies.forms import Digest, Jurisdiction, Name, complaints

SCHEMAS: Final = Path(__file__).with_name("rego") / "schemas"


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CharterMember(_Input):
    """A member, by its name in `charter.members`."""

    jurisdiction: Jurisdiction | None


class CharterFacts(_Input):
    """The charter by which the question is asked."""

    id: Digest
    version: int
    platform: Platform
    members: dict[Name, CharterMember]


class Person(_Input):
    """A user of the charter."""

    member: Name
    name: Name
    rights: list[Right]


class Guest(_Input):
    """The guest that asks."""

    role: Role
    name: Name


class Somebody(_Input):
    """A guest (its name) or a user (MEMBER/USER), and where the charter says that it stands."""

    role: str
    name: str
    member: Name | None
    jurisdiction: Jurisdiction | None


class SubmoduleFacts(_Input):
    """What a broker says of one device of a guest; `cpu0` is the guest's processor."""

    model_config = ConfigDict(extra="allow")

    status: Literal["affirming", "warning", "contraindicated", "none"] = Field(alias="ear.status")


class SubmoduleAppraisal(SubmoduleFacts):
    """The same with the whole of it: AR4SI's vector and every field of the report."""

    vector: dict[str, int] = Field(alias="ear.trustworthiness-vector")
    evidence: dict[str, Any] = Field(alias="ear.veraison.annotated-evidence")


class PeerFacts(Somebody):
    """A peer, and what its EARs say. `age_seconds` counts from the oldest of them; `brokers` signed them."""

    age_seconds: int = Field(ge=0)
    submods: dict[str, SubmoduleFacts]
    brokers: list[Name]


class JobFacts(_Input):
    """A job's record, as its submitter signed it. `devices`, in a job of devices alone: how many each aggregate is of
    at least."""

    model_config = ConfigDict(extra="allow")

    job: str
    name: Name
    bundle: Digest
    server: Name
    roster: list[Name]
    recipients: list[str]
    rounds: int
    min_sites: int
    devices: int = 0
    submitter: str


class AdmissionInput(_Input):
    """`sealwright.admission`: may this job run at this guest?"""

    at: str
    bundle: BundleApproval | None
    charter: CharterFacts
    here: Guest
    job: JobFacts
    recipients: list[Person]
    sites: list[Enrolment]
    submitter: Person | None


class AppraisalFacts(_Input):
    """The verifier's appraisal, as `seal evidence verify --json` prints it."""

    model_config = ConfigDict(extra="allow")

    status: Literal["affirming", "warning", "contraindicated", "none"]
    failures: list[dict[str, Any]]
    not_judged: list[str] = Field(alias="not-judged")
    claims: dict[str, Any]
    vector: dict[str, int] = Field(alias="trustworthiness-vector")


class AppraisalInput(_Input):
    """`sealwright.appraisal`: does the consortium accept this guest?"""

    appraisal: AppraisalFacts
    at: str
    charter: CharterFacts
    devices: dict[str, Any]
    enrolment: Enrolment | None
    image: ImageReference | None


class ExportInput(_Input):
    """`sealwright.export`: may this leave?"""

    at: str
    charter: CharterFacts
    sender: Somebody = Field(alias="from")
    job: JobFacts
    kind: Literal["update", "metric", "log", "result"]
    sealed: bool
    size: int = Field(ge=0)
    to: Somebody


class PeersInput(_Input):
    """`sealwright.peers`: does this guest talk to that one?"""

    at: str
    charter: CharterFacts
    here: Somebody
    peer: PeerFacts


class SubjectFacts(_Input):
    """The place that a guest has attested to hold."""

    role: Role
    name: Name
    member: Name
    image: Name


class EarFacts(_Input):
    """A broker's EAR about the guest."""

    model_config = ConfigDict(extra="allow")

    subject: SubjectFacts
    platform: Platform
    iss: Name
    iat: int
    exp: int
    submods: dict[str, SubmoduleAppraisal]


class CounterFacts(_Input):
    """How often the resource was released before, counted from the ledger."""

    releases: int
    releases_this_boot: int
    releases_to_guest: int


class ResourceFacts(_Input):
    """The resource that is asked for."""

    repository: Name
    type: str
    tag: str


class SessionFacts(_Input):
    """The guest's session with the broker."""

    age_seconds: int
    protocol: Literal["v1", "kbs"]


class ReleaseInput(_Input):
    """`sealwright.release` and `sealwright.floor`: does this guest get this resource?"""

    at: str
    counters: CounterFacts
    ear: EarFacts
    enrolment: Enrolment
    job: dict[str, Any] | None
    resource: ResourceFacts
    session: SessionFacts


INPUTS: Final[dict[str, type[BaseModel]]] = {
    "admission": AdmissionInput,
    "appraisal": AppraisalInput,
    "export": ExportInput,
    "floor": ReleaseInput,
    "peers": PeersInput,
    "release": ReleaseInput,
}
"""The model of each package's input."""


def schema(package: str) -> str:
    """Return the JSON Schema (2020-12) of a package's input as text."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **INPUTS[package].model_json_schema(by_alias=True),
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def input_complaints(package: str, document: Mapping[str, Any]) -> list[str]:
    """Return in what `document` is not what a package reads when it is asked in earnest; empty if it is."""
    try:
        INPUTS[package].model_validate_json(json.dumps(document))
    except ValidationError as error:
        return complaints(error)
    return []


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name in INPUTS:
        (SCHEMAS / f"{name}.json").write_text(schema(name), "utf-8")
