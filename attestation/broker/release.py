"""Whether a resource is released: the owner's policy and the charter's floor, over everything that is known.

Nothing is released by default: no policy of the owner's, no floor, an error or a time-out in either denies. The two
are evaluated apart, so that neither module can define rules in the other's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from attestation.broker.sessions import Protocol as SessionProtocol
from attestation.canonical import format_time
from attestation.ear import Ear
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


class Decides(Protocol):
    """Rego modules as policies.decisions.Rules evaluates them."""

    def decide(self, package: str, document: Mapping[str, Any]) -> Decided:
        """Evaluate a package's `allow` and `reasons` over `document`; never raises for what a policy does."""


class Decided(Protocol):
    """An outcome."""

    @property
    def allow(self) -> bool:
        """Whether the package allows it."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not."""


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


def decide_release(question: Question, floor: Decides | None, owner: Decides | None) -> tuple[str, ...]:
    """Every reason against the release; none if both policies allow it."""
    document = question.document()
    reasons: list[str] = []
    if floor is None:
        reasons.append("the charter has no floor (policies/floor.rego), so nothing is released")
    else:
        reasons += _against(floor, FLOOR_PACKAGE, document, "charter's floor")
    if owner is None:
        reasons.append(f"the owner has no release policy for {question.resource}, so it is not released")
    else:
        reasons += _against(owner, RELEASE_PACKAGE, document, "owner's policy")
        if question.protocol == "kbs":
            reasons += _against(owner, KBS_PACKAGE, document, "owner's policy")
    return tuple(reasons)


def _against(rules: Decides, package: str, document: Mapping[str, Any], who: str) -> list[str]:
    decision = rules.decide(package, document)
    if decision.allow and not decision.reasons:
        return []
    return [f"{who}: {reason}" for reason in decision.reasons or (f"{package} does not allow it",)]
