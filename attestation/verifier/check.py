"""What a check is: a small named function of one case, that says why it does not pass.

A check's docstring begins with its rule and ends with the attack it stops; `docs/reference/checks.md` is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final

from attestation.endorsements.chain import Chain
from attestation.evidence.hcl import HclEvidence
from attestation.evidence.report import Product, Report
from attestation.evidence.tcb import Tcb
from attestation.verifier.profile import Profile


class Claim(Enum):
    """AR4SI trustworthiness claims (draft-ietf-rats-ar4si) that SEV-SNP evidence can speak of."""

    INSTANCE_IDENTITY = "instance-identity"
    CONFIGURATION = "configuration"
    EXECUTABLES = "executables"
    HARDWARE = "hardware"
    RUNTIME_OPAQUE = "runtime-opaque"


class NotJudged(Enum):
    """The verdict of a check that was given nothing to judge by."""

    NOT_JUDGED = "not judged"


NOT_JUDGED: Final = NotJudged.NOT_JUDGED


@dataclass(frozen=True, slots=True)
class Expected:
    """What the relying party knows of this one guest; None leaves it unjudged.

    Attributes:
        report_data: The 64 bytes that show freshness and bind the guest's keys.
        measurements: Launch measurements, 48 bytes each, one of which it must have.
        host_data: The 32 bytes of HOST_DATA: the SHA-256 of its init-data.
        chips: CHIP_IDs, 64 bytes each (or Turin's 8), on one of which it must run.
        id_block: The ID block (96 bytes) and its authentication (4096 bytes) that it must have been launched with.
    """

    report_data: bytes | None = None
    measurements: frozenset[bytes] | None = None
    host_data: bytes | None = None
    chips: frozenset[bytes] | None = None
    id_block: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One report with everything that a check may look at.

    `product` is the authenticated one if the chain holds, else the best guess (or None), so that the other checks can
    still say what else is wrong. The TCBs are None if there is no product to give them a layout. `vtpm` is the wrapper
    that the report came in, if it came in one.
    """

    report: Report
    profile: Profile
    expected: Expected
    chain: Chain
    at: datetime
    product: Product | None
    reported: Tcb | None
    current: Tcb | None
    committed: Tcb | None
    launch: Tcb | None
    vtpm: HclEvidence | None = None


Verdict = tuple[str, str] | NotJudged | None
"""None: passed. A pair: failed, what was found and what would have passed."""


@dataclass(frozen=True, slots=True)
class Check:
    """A registered check.

    Attributes:
        name: As in failures and in a profile's `[checks]`.
        run: The check itself.
        claim: The AR4SI claim that it counts for.
        peers: What go-sev-guest, snpguest, Trustee's verifier, Trustee's policy, az-snp-vtpm and dstack do, as six
            marks, Y always, o if asked, c as a claim only, - not, ! present but without effect.
        rule: The docstring.
    """

    name: str
    run: Callable[[Case], Verdict]
    claim: Claim
    peers: str
    rule: str


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they are made."""


def check(claim: Claim, peers: str = "- - - - - -") -> Callable[[Callable[[Case], Verdict]], Callable[[Case], Verdict]]:
    """Register a function as the check of its name (underscores become hyphens)."""

    def register(function: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
        name = function.__name__.replace("_", "-")
        CHECKS[name] = Check(name, function, claim, peers, function.__doc__ or "")
        return function

    return register


def bit_verdict(word: int, bit: int, wanted: str) -> Verdict:
    """Judge one bit by a profile's `set`, `clear` or `any`."""
    if wanted == "any":
        return None
    found = bool(word >> bit & 1)
    if found == (wanted == "set"):
        return None
    return ("set" if found else "clear", wanted)
