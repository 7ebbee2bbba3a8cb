"""Every field of a report, decoded, as JSON-able claims: nothing is kept from a policy (nor from a reader)."""

from __future__ import annotations

from typing import Any

from attestation.endorsements.chain import Chain
from attestation.evidence.hcl import HclEvidence
from attestation.evidence.report import Product, Report
from attestation.evidence.tcb import Tcb, decode_tcb
from attestation.verifier.policy_checks import PLATFORM_BITS, POLICY_BITS

_SIGNING_KEYS = {0: "VCEK", 1: "VLEK", 7: "none"}


def report_claims(report: Report, product: Product | None) -> dict[str, Any]:
    """The report's fields; byte strings in hex, TCBs by part (in hex if the product is not known)."""

    def tcb(raw: bytes) -> Any:
        return raw.hex() if product is None else decode_tcb(raw, product, strict=False).as_dict()

    policy, platform = report.policy, report.platform_info
    claims: dict[str, Any] = {
        "version": report.version,
        "guest_svn": report.guest_svn,
        "policy": {
            "value": f"0x{policy:x}",
            "abi_major": policy >> 8 & 0xFF,
            "abi_minor": policy & 0xFF,
            **{name.replace("-", "_"): bool(policy >> bit & 1) for name, bit in POLICY_BITS.items()},
        },
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "vmpl": report.vmpl,
        "signature_algo": report.signature_algo,
        "current_tcb": tcb(report.current_tcb),
        "platform_info": {
            "value": f"0x{platform:x}",
            **{name.replace("-", "_"): bool(platform >> bit & 1) for name, bit in PLATFORM_BITS.items()},
        },
        "key_info": {
            "value": f"0x{report.key_info:x}",
            "author_key_en": report.author_key_enabled,
            "mask_chip_key": report.mask_chip_key,
            "signing_key": _SIGNING_KEYS.get(report.signing_key, "reserved"),
        },
        "report_data": report.report_data.hex(),
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "reported_tcb": tcb(report.reported_tcb),
        "chip_id": report.chip_id.hex(),
        "committed_tcb": tcb(report.committed_tcb),
        "current_firmware": f"{report.current_major}.{report.current_minor}.{report.current_build}",
        "committed_firmware": f"{report.committed_major}.{report.committed_minor}.{report.committed_build}",
        "launch_tcb": tcb(report.launch_tcb),
    }
    if report.cpuid_fam_id is not None:
        claims["cpuid"] = {
            "family": report.cpuid_fam_id,
            "model": report.cpuid_mod_id,
            "stepping": report.cpuid_step,
        }
    if report.launch_mit_vector is not None and report.current_mit_vector is not None:
        claims["launch_mit_vector"] = f"0x{report.launch_mit_vector:x}"
        claims["current_mit_vector"] = f"0x{report.current_mit_vector:x}"
    return claims


def chain_claims(chain: Chain) -> dict[str, Any]:
    """What the certificates say: kind, provider, certified TCB. Authentic only if the chain has no failures."""
    claims: dict[str, Any] = {}
    if chain.kind is not None:
        claims["vek"] = chain.kind.value
    if chain.extensions is not None:
        certified: Tcb = chain.extensions.tcb
        claims["product_name"] = chain.extensions.product_name
        claims["certified_tcb"] = certified.as_dict()
        if chain.extensions.hwid is not None:
            claims["hwid"] = chain.extensions.hwid.hex()
        if chain.extensions.csp_id is not None:
            claims["csp_id"] = chain.extensions.csp_id
    return claims


def vtpm_claims(evidence: HclEvidence) -> dict[str, Any]:
    """What the paravisor and its TPM say."""
    claims: dict[str, Any] = {"configuration": dict(evidence.hcl.configuration), "user_data": evidence.hcl.user_data}
    if evidence.quote is not None:
        quote = evidence.quote
        claims["extra_data"] = quote.extra_data.hex()
        claims["registers"] = {str(number): quote.pcrs[number].hex() for number in quote.selection}
        claims["reset_count"] = quote.reset_count
    return claims
