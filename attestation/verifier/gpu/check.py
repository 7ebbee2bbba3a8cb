"""What a check of GPU evidence is: a small named function of one case, that says why it does not pass.

As in `attestation.verifier.check`: a docstring begins with the rule and ends with the attack it stops. Group checks
look at all devices that were attested together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from attestation.endorsements.nvidia import DeviceChain, VerifiedRim
from attestation.endorsements.nvidia_revocation import Revocation
from attestation.evidence.gpu.document import GpuEvidence
from attestation.evidence.gpu.rim import RimKind
from attestation.evidence.gpu.spdm import GpuReport
from attestation.verifier.check import NOT_JUDGED, Claim, Verdict
from attestation.verifier.gpu.facts import Facts, is_switch
from attestation.verifier.gpu.profile import GpuProfile

__all__ = ["CHECKS", "GROUP_CHECKS", "NOT_JUDGED", "Claim", "GpuCase", "GpuExpected", "RimMatch", "Verdict", "check"]


@dataclass(frozen=True, slots=True)
class GpuExpected:
    """What the relying party knows of these devices; None leaves it unjudged.

    Attributes:
        nonce: The 32 bytes of the SPDM nonce that it chose.
        devices: Unique ids (16 hex digits), one of which each device must have.
        driver_version, vbios_version: Exactly these.
    """

    nonce: bytes | None = None
    devices: frozenset[str] | None = None
    driver_version: str | None = None
    vbios_version: str | None = None


@dataclass(frozen=True, slots=True)
class RimMatch:
    """The manifests of one kind that were brought for a device's version.

    Attributes:
        matching: All with the device's version and chip, authentic or not.
        chosen: The authentic one that fits best, None if there is none.
        mismatches: Indices (from 0) at which the device differs from the chosen one.
        revocation: What is known of the chosen one's signers.
    """

    matching: tuple[VerifiedRim, ...]
    chosen: VerifiedRim | None
    mismatches: tuple[int, ...]
    revocation: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One device's evidence with everything that a check may look at.

    `model` is the authenticated chip if the chain holds, else what its certificate claims.
    """

    evidence: GpuEvidence
    report: GpuReport
    facts: Facts
    chain: DeviceChain
    profile: GpuProfile
    expected: GpuExpected
    at: datetime
    revocation: tuple[Revocation, ...]
    rims: dict[RimKind, RimMatch]

    @property
    def model(self) -> str | None:
        """The chip."""
        return self.chain.model

    @property
    def switch(self) -> bool:
        """Whether it is an NVSwitch."""
        return is_switch(self.chain.model)


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """A registered check; `run` judges one device, `run_group` all that were attested together (one of them is set)."""

    name: str
    claim: Claim
    rule: str
    run: Callable[[GpuCase], Verdict] | None = None
    run_group: Callable[[tuple[GpuCase, ...]], Verdict] | None = None


CHECKS: dict[str, GpuCheck] = {}
"""Checks of one device by name, in the order in which they are made."""

GROUP_CHECKS: dict[str, GpuCheck] = {}
"""Checks of all devices together."""


def check(claim: Claim) -> Callable[[Callable[[GpuCase], Verdict]], Callable[[GpuCase], Verdict]]:
    """Register a function as the check of its name (underscores become hyphens)."""

    def register(function: Callable[[GpuCase], Verdict]) -> Callable[[GpuCase], Verdict]:
        name = function.__name__.replace("_", "-")
        CHECKS[name] = GpuCheck(name, claim, function.__doc__ or "", run=function)
        return function

    return register


GroupFunction = Callable[[tuple[GpuCase, ...]], Verdict]


def group_check(claim: Claim) -> Callable[[GroupFunction], GroupFunction]:
    """Register a function as a group check of its name (underscores become hyphens)."""

    def register(function: GroupFunction) -> GroupFunction:
        name = function.__name__.replace("_", "-")
        GROUP_CHECKS[name] = GpuCheck(name, claim, function.__doc__ or "", run_group=function)
        return function

    return register
