"""What the charter's rules would say: the same packages, in the same order, as where they decide.

`seal charter test-policy` asks here; so can anybody who holds a charter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from policies.charter import Charter
from policies.decisions import Decision, Rules

Subject = Literal["release", "appraisal", "admission"]
SUBJECTS: Final[tuple[Subject, ...]] = ("release", "appraisal", "admission")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one set of rules says: the file they stand in, and the decision."""

    file: str
    decision: Decision


def ask(
    charter: Charter, subject: Subject, document: Mapping[str, Any], resource: str | None = None
) -> tuple[Answer, ...]:
    """Return the answer of every set of rules that decides on `subject`; it is allowed only if all allow it.

    For a release, those are the floor and the policy of the owner of `resource`, each evaluated apart. A set of rules
    that is not there denies.
    """
    if subject != "release":
        name = f"{subject}.rego"
        return (_answer(f"policies/{name}", charter.policy(name), f"sealwright.{subject}", document),)
    owner = charter.release_policy(resource) if resource and resource.count("/") == 2 else None
    return (
        _answer("policies/floor.rego", charter.policy("floor.rego"), "sealwright.floor", document),
        _answer(f"the release policy of {resource}", owner, "sealwright.release", document),
    )


def _answer(file: str, text: str | None, package: str, document: Mapping[str, Any]) -> Answer:
    if text is None:
        return Answer(file, Decision(False, ("it is not in the charter, so nothing is allowed",)))
    return Answer(file, Rules({file: text}).decide(package, document))
