"""The verdict: status, every failure, what was not judged, all claims, and the AR4SI vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from attestation.endorsements.failure import Failure

Status = Literal["affirming", "warning", "contraindicated", "none"]

VECTOR_NAMES = (
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
)
"""The claims of an AR4SI trustworthiness vector, in the order of the draft."""


@dataclass(frozen=True)
class Appraisal:
    """What the verifier found.

    Attributes:
        status: `affirming` if everything that was judged passed; `warning` or `contraindicated` by the worst failure;
            `none` if there was no key to judge by.
        failures: Every check that did not pass, warnings included.
        not_judged: Names of the checks that were given nothing to judge by.
        vector: AR4SI claims: 0 no assertion, 2 to 31 affirming, 32 to 95 warning, 96 and up contraindicated.
        profile: The profile's name.
    """

    status: Status
    failures: tuple[Failure, ...]
    not_judged: tuple[str, ...]
    vector: Mapping[str, int]
    profile: str
    decode: Callable[[], dict[str, Any]]

    @cached_property
    def claims(self) -> dict[str, Any]:
        """All fields of the evidence, decoded; `product` and `platform` (`virtual` or `hardware`) among them."""
        return self.decode()

    @property
    def affirming(self) -> bool:
        """Whether everything that was judged passed."""
        return self.status == "affirming"

    def to_json(self) -> dict[str, Any]:
        """The object that `seal evidence verify --json` prints."""
        return {
            "status": self.status,
            "failures": [failure.as_dict() for failure in self.failures],
            "not-judged": list(self.not_judged),
            "claims": self.claims,
            "trustworthiness-vector": dict(self.vector),
        }
