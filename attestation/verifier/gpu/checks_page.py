"""`docs/reference/gpu-checks.md`, made from the checks themselves: `python -m attestation.verifier.gpu.checks_page`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from attestation.verifier.gpu import device_checks, group_checks, state_checks
from attestation.verifier.gpu.nras import NRAS_CHECKS
from attestation.verifier.gpu.verify import ALWAYS, ORDERED

_HEAD = """\
# Checks of the GPU verifier

Made from the code (`python -m attestation.verifier.gpu.checks_page`); every check is one function whose docstring is
its row. [GPU evidence](gpu-evidence.md) says what they look at.

**Setting.** Every check has a line in a GPU profile's `[checks]` (`refuse`, `warn`, `allow`; the default is `refuse`),
but those marked *always*, without which nothing in the evidence is authentic. What it compares with stands in the
setting named here.

**Claim.** The AR4SI claim that a failure counts against.

**Test.** Each check's attack is played with validly signed evidence of a vendor of the tests' own: for one device in
`tests/attestation/gpu/test_gpu_attacks.py`, for several in `test_gpu_group.py`, for tokens in `test_nras_tokens.py`; a
test there fails if a check has no attack.
"""

COMPARED_WITH = {
    "gpu-trusted-root": "device-roots",
    "gpu-revocation": "revocation.max-age-days, revocation.hold",
    "gpu-model": "devices.models",
    "gpu-device": "devices.allow, devices.deny, the caller's devices",
    "gpu-freshness": "the caller's nonce",
    "gpu-opaque-data": "devices.opaque-fields",
    "gpu-driver-version": "versions.drivers, versions.minimum-driver",
    "gpu-vbios-version": "versions.vbioses, versions.minimum-vbios",
    "gpu-board": "devices.boards",
    "gpu-mode": "devices.modes",
    "gpu-driver-measurements": "the manifests given",
    "gpu-vbios-measurements": "the manifests given",
    "rim-trusted-root": "rim-roots",
    "rim-revocation": "revocation.max-age-days, revocation.hold",
    "gpu-count": "devices.gpus, devices.switches",
    "nras-issuer": "nras.issuers",
    "nras-time": "nras.max-age-seconds",
    "nras-nonce": "the caller's nonce",
    "nras-device": "devices.deny",
}
"""Where a check finds what it compares with."""

_HEADINGS = {
    device_checks.__name__: "Who signed, and when",
    state_checks.__name__: "What the device is, and its manifests",
    group_checks.__name__: "Several devices together",
}


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for module, heading in _HEADINGS.items():
        rows = (
            (one.name, one.rule, one.name in ALWAYS, one.claim.value)
            for one in ORDERED
            if (one.run or one.run_group).__module__ == module
        )
        parts.append(_table(heading, rows))
    tokens = ((one.name, one.rule, True, one.claim.value) for one in NRAS_CHECKS.values())
    parts.append(_table("Tokens of NVIDIA's attestation service", tokens))
    return "\n".join(parts)


def _table(heading: str, rows: Iterable[tuple[str, str, bool, str]]) -> str:
    lines = [f"## {heading}", "", "| check | rule, and the attack it stops | setting | claim |", "|---|---|---|---|"]
    for name, rule, always, claim in rows:
        said, _, attack = " ".join(rule.split()).partition(" Attack: ")
        setting = " ".join(part for part in ("*always*" if always else "", COMPARED_WITH.get(name, "")) if part) or "-"
        lines.append(f"| `{name}` | {said} *Attack:* {attack} | {setting} | {claim} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
