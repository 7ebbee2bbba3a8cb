"""Verdicts a second beside the signature verifications that the same library makes on the same core.

A verdict with a chain that was proved before costs one P-384 verification and little else; the share says how little.
Processor time is counted, batches of both alternate, and the best of each counts: other work on the machine disturbs
both alike, and little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from attestation.endorsements.chain import Endorsements, resolve_chain
from attestation.evidence.report import parse_report
from attestation.verifier import Expected, load_profile, verify_snp

EVIDENCE = Path(__file__).resolve().parents[1] / "examples/evidence"
ROUNDS, BATCH = 15, 100


def measure() -> dict[str, float]:
    """Signature verifications and whole verdicts a second, and the share of one that the other reaches."""
    raw = (EVIDENCE / "report.bin").read_bytes()
    authorities = tuple((EVIDENCE / f"authorities/{name}.pem").read_bytes() for name in ("ask", "ark"))
    endorsements = ((EVIDENCE / "vcek.pem").read_bytes(), authorities, ((EVIDENCE / "revoked.crl").read_bytes(),))
    profile = load_profile((EVIDENCE / "profile.toml").read_text())
    report = parse_report(raw)
    expected = Expected(report.report_data, frozenset({report.measurement}), report.host_data)
    at = datetime.now(UTC)
    key = resolve_chain(Endorsements(*endorsements), profile.pins).key
    if key is None or not verify_snp(raw, Endorsements(*endorsements), profile, expected, at).affirming:
        raise RuntimeError("the example does not verify")
    signature, scheme = encode_dss_signature(report.signature_r, report.signature_s), ec.ECDSA(hashes.SHA384())
    alone, whole = float("inf"), float("inf")
    for _ in range(ROUNDS):
        alone = min(alone, _seconds(lambda: key.verify(signature, report.signed, scheme)))
        # New objects each time, as a service has them: only what is kept by digest is spared.
        whole = min(whole, _seconds(lambda: verify_snp(raw, Endorsements(*endorsements), profile, expected, at)))
    return {"signatures_per_second": 1 / alone, "verdicts_per_second": 1 / whole, "share": alone / whole}


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(BATCH):
        work()
    return (time.thread_time() - start) / BATCH


if __name__ == "__main__":
    found = measure()
    print(
        f"P-384 verifications {found['signatures_per_second']:.0f}/s, "
        f"whole verdicts {found['verdicts_per_second']:.0f}/s: {found['share']:.0%}"
    )
