"""Whether a resource is released: the owner's policy and the charter's floor, over everything that is known.

Nothing is released by default: no policy of the owner's, no floor, an error or a time-out in either denies. The two
are evaluated apart, so that neither module can define rules in the other's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from attestation.broker.sessions import Protocol as SessionProtocol
from attestation.canonical import format_time
from attestation.ear import Ear
from policies.decisions import Asked, Given, Rules
from policies.documents import Enrolment

FLOOR_PACKAGE: Final = "sealwright.floor"
RELEASE_PACKAGE: Final = "sealwright.release"
KBS_PACKAGE: Final = "sealwright.kbs"
KBS_MODULE: Final = """package sealwright.kbs

import rego.v1

default allow := false

allow if data.sealwright.release.kbs == true

reasons contains "it does not open this resource to the KBS protocol (no rule `kbs` that is true)" if not allow
"""
"""Stock KBS guests get a resource only if its owner's module says `kbs := true`: their protocol binds less than /v1."""


@dataclass(frozen=True, slots=True)
class Counters:
    """How often a resource was released before, counted from the ledger."""

    releases: int
    releases_to_guest: int
    releases_this_boot: int

    def as_dict(self) -> dict[str, int]:
        """By name, as policies read them."""
        return {
            "releases": self.releases,
            "releases_this_boot": self.releases_this_boot,
            "releases_to_guest": self.releases_to_guest,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """All that a release is decided over."""

    resource: str
    ear: Ear
    enrolment: Enrolment
    age_seconds: int
    protocol: SessionProtocol
    job: Mapping[str, Any] | None
    counters: Counters
    at: datetime

    def document(self) -> dict[str, Any]:
        """The policies' `input` (docs/reference/broker-http.md, "What a release policy sees")."""
        repository, kind, tag = self.resource.split("/")
        return {
            "at": format_time(self.at),
            "counters": self.counters.as_dict(),
            "ear": self.ear.to_claims(),
            "enrolment": self.enrolment.model_dump(mode="json"),
            "job": None if self.job is None else dict(self.job),
            "resource": {"repository": repository, "tag": tag, "type": kind},
            "session": {"age_seconds": self.age_seconds, "protocol": self.protocol},
        }


def decide_releases(questions: Sequence[Question], floor: Rules | None, owner: Rules | None) -> list[tuple[str, ...]]:
    """For each question about one resource every reason against the release; none if both policies allow it."""
    reasons: list[list[str]] = [[] for _ in questions]
    asked: list[tuple[int, str, Asked]] = []
    for number, question in enumerate(questions):
        given = Given(question.document())
        if floor is None:
            reasons[number].append("the charter has no floor (policies/floor.rego), so nothing is released")
        else:
            asked.append((number, "charter's floor", Asked(floor, FLOOR_PACKAGE, given)))
        if owner is None:
            reasons[number].append(f"the owner has no release policy for {question.resource}, so it is not released")
        else:
            packages = (RELEASE_PACKAGE, KBS_PACKAGE) if question.protocol == "kbs" else (RELEASE_PACKAGE,)
            asked += [(number, "owner's policy", Asked(owner, package, given)) for package in packages]
    decisions = Rules.decide_all([one for _, _, one in asked])
    for (number, who, one), decision in zip(asked, decisions, strict=True):
        if not decision.allow or decision.reasons:
            told = decision.reasons or (f"{one.package} does not allow it",)
            reasons[number] += [f"{who}: {reason}" for reason in told]
    return [tuple(found) for found in reasons]
