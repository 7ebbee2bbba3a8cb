"""`docs/reference/checks.md`, made from the checks themselves: `python -m attestation.verifier.checks_page > ...`.

A test holds the page to what this prints.
"""

from __future__ import annotations

import sys
from types import ModuleType

from attestation.verifier import (
    certificate_checks,
    guest_checks,
    policy_checks,
    report_checks,
    tcb_checks,
    vtpm_checks,
)
from attestation.verifier.check import CHECKS, Check
from attestation.verifier.profile import BROKER, SHOW, SWITCHABLE, Profile

SUBJECTS: tuple[tuple[str, ModuleType], ...] = (
    ("Signature and certificates", certificate_checks),
    ("The report and its key", report_checks),
    ("Firmware", tcb_checks),
    ("Guest policy and platform", policy_checks),
    ("The guest", guest_checks),
    ("Azure's virtual TPM", vtpm_checks),
)

PEERS = ("go-sev-guest", "snpguest", "Trustee verifier", "Trustee policy", "az-snp-vtpm", "dstack")

COMPARED_WITH: dict[str, str] = {
    "trusted-root": "roots",
    "revocation-list": "revocation.max-age-days",
    "report-version": "report.versions",
    "signing-key": "report.signing-keys",
    "allowed-product": "report.products",
    "chip-id-present": "chips",
    "chip": "chips, or the caller",
    "provider": "providers.csp-ids",
    "reported-tcb-floor": "tcb.*.reported",
    "current-tcb-floor": "tcb.*.current",
    "committed-tcb-floor": "tcb.*.committed",
    "launch-tcb-floor": "tcb.*.launch",
    "current-firmware-floor": "tcb.*.current-firmware",
    "committed-firmware-floor": "tcb.*.committed-firmware",
    "launch-mitigations": "mitigations.launch",
    "current-mitigations": "mitigations.current",
    "policy-abi": "policy.minimum-abi",
    "migration-agent": "policy.migrate-ma",
    "vmpl": "report.vmpls",
    "measurement": "reference.measurements, or the caller",
    "freshness": "reference.report-data, or the caller",
    "init-data": "reference.host-data, or the caller",
    "id-block": "the caller",
    "id-key": "id-block.id-keys",
    "author-key": "id-block.author-keys",
    "family-id": "id-block.family-id",
    "image-id": "id-block.image-id",
    "guest-svn": "id-block.minimum-guest-svn",
    "report-id": "reference.report-id",
    "report-id-ma": "reference.report-id-ma",
    "vtpm-registers": "vtpm.registers",
}
"""What each check compares with, where that is a setting; bits of `[policy]` and `[platform]` bear the check's name."""

_HEAD = """\
# Checks of the SEV-SNP verifier

Made from the code (`python -m attestation.verifier.checks_page`); every check is one function whose docstring is its
row. A verdict lists every check that failed, with what was found and what would have passed, and every check that was
given nothing to judge by.

**Setting.** Every check has a line in a profile's `[checks]` (`refuse`, `warn`, `allow`; the default is `refuse`), but
those marked *always*, without which nothing in the evidence is authentic. What it compares with stands in the setting
named here; see [the profile's format](evidence-policy.md). Where the two ready-made profiles differ, both are given.

**Claim.** The AR4SI claim that a failure counts against.

**Peers.** What other verifiers do, as read in their code: go-sev-guest (af1c107), snpguest (d3a2aed), Trustee's SNP
verifier and its default policy (78962cd4), az-snp-vtpm (the same) and dstack's sev-snp-qvl (312dc605). Y always,
o if the caller asks for it, c as a claim only, ! present but without effect, - not.

**Test.** Each check's attack is played with a validly signed report by
`tests/attestation/verifier/test_attacks.py::test_the_attack_is_refused_for_its_reason_alone[CHECK]`.
"""


def page() -> str:
    """The whole page in Markdown."""
    lines = [_HEAD]
    for title, module in SUBJECTS:
        lines += [
            f"## {title}",
            "",
            f"| check | rule, and the attack it stops | setting | claim | {' | '.join(PEERS)} |",
        ]
        lines.append("|---" * (4 + len(PEERS)) + "|")
        lines += [_row(one) for one in CHECKS.values() if one.run.__module__ == module.__name__]
        lines.append("")
    return "\n".join(lines)


def _row(one: Check) -> str:
    rule, _, rest = " ".join(one.rule.split()).partition(" Attack: ")
    cells = (f"`{one.name}`", f"{rule} *Attack:* {rest}", _setting(one.name), one.claim.value, *one.peers.split())
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _setting(name: str) -> str:
    place = COMPARED_WITH.get(name, "")
    for section in ("policy", "platform"):
        setting = name.removeprefix(f"{section}-").replace("-", "_")
        if name.startswith(section) and setting in type(getattr(SHOW, section)).model_fields:
            place = f"{section}.{setting.replace('_', '-')}"
    words = [] if name in SWITCHABLE else ["*always*"]
    if place:
        words.append(f"`{place}`" if "caller" not in place else place)
    shown, demanded = _value(SHOW, place), _value(BROKER, place)
    if shown is not None:
        words.append(f"= {shown}" if shown == demanded else f"= {shown}; broker: {demanded}")
    if name in BROKER.required:
        words.append("(a broker demands it)")
    return " ".join(words) or "-"


def _value(profile: Profile, place: str) -> str | None:
    """The value of a setting with one, None for tables and for what the caller brings."""
    section, _, setting = place.partition(".")
    if not setting or "*" in place or "caller" in place:
        return None
    value = getattr(getattr(profile, section.replace("-", "_")), setting.replace("-", "_"))
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)


if __name__ == "__main__":
    sys.stdout.write(page())
