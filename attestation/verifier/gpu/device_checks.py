"""Checks of who signed: the device's chain, its identity, its report's signature, revocation, freshness."""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from attestation.endorsements.failure import Failure
from attestation.endorsements.nvidia import outside_validity
from attestation.endorsements.nvidia_revocation import Revocation, Standing
from attestation.verifier.gpu.check import NOT_JUDGED, Claim, GpuCase, Verdict, check
from attestation.verifier.gpu.facts import ARCHITECTURES
from attestation.verifier.gpu.profile import GpuProfile


def joined(name: str, failures: tuple[Failure, ...]) -> Verdict:
    """The verdict of the failures that bear this check's name."""
    mine = [failure for failure in failures if failure.check == name]
    if not mine:
        return None
    return "; ".join(failure.value for failure in mine), "; ".join(dict.fromkeys(one.expected for one in mine))


@check(Claim.HARDWARE)
def gpu_chain_length(case: GpuCase) -> Verdict:
    """The device's chain has five certificates, leaf to root.

    Attack: the boot ROM's own CA certificate, or an intermediate, taken for the key that signs reports.
    """
    return joined("gpu-chain-length", case.chain.failures)


@check(Claim.HARDWARE)
def gpu_chain_signatures(case: GpuCase) -> Verdict:
    """Each certificate is signed by the next with ECDSA P-384 and SHA-384, the root by itself.

    Attack: a self-made device key beside NVIDIA's genuine certificates; a chain with a link left out.
    """
    return joined("gpu-chain-signatures", case.chain.failures)


@check(Claim.HARDWARE)
def gpu_chain_profile(case: GpuCase) -> Verdict:
    """Authorities are CAs with P-384 keys, critical constraints and usage; the leaf is none and signs data alone.

    Attack: a leaf that issues certificates below itself, each of which could sign reports.
    """
    return joined("gpu-chain-profile", case.chain.failures)


@check(Claim.HARDWARE)
def gpu_trusted_root(case: GpuCase) -> Verdict:
    """The chain ends in a root key that the profile pins.

    Attack: a whole forged chain with NVIDIA's names.
    """
    return joined("gpu-trusted-root", case.chain.failures)


@check(Claim.HARDWARE)
def gpu_device_identity(case: GpuCase) -> Verdict:
    """Leaf name and device information name one chip; the DICE extension names the boot ROM that signed the leaf.

    Attack: a leaf certified for another device or for firmware that no boot ROM measured.
    """
    return joined("gpu-device-identity", case.chain.failures)


@check(Claim.HARDWARE)
def gpu_report_signature(case: GpuCase) -> Verdict:
    """The leaf's key signed request and response: ECDSA P-384, SHA-384, r and s big-endian.

    Attack: any byte of the report changed on the way, the nonce and the measurements first of all.
    """
    expected = "an ECDSA P-384 signature of the leaf's key over the report"
    if case.chain.key is None:
        return "no P-384 key at hand", expected
    signature = case.report.signature
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        case.chain.key.verify(encode_dss_signature(r, s), case.report.signed, ECDSA(SHA384()))
    except InvalidSignature:
        return "the signature does not verify", expected
    return None


@check(Claim.HARDWARE)
def gpu_certificate_validity(case: GpuCase) -> Verdict:
    """All certificates of the chain are valid at the time of verification.

    Attack: a device or an authority that its owner gave up.
    """
    outside = outside_validity(case.chain.certificates, case.at)
    return ("; ".join(outside), f"valid at {case.at:%Y-%m-%dT%H:%M:%SZ}") if outside else None


@check(Claim.INSTANCE_IDENTITY)
def gpu_revocation(case: GpuCase) -> Verdict:
    """OCSP responses or lists say that no certificate between leaf and root is revoked. Not judged if some are silent.

    Attack: a device whose keys were extracted, or an authority that leaked, after NVIDIA revoked it; an old response
    from before that, or one signed by somebody else.
    """
    return judge_revocation(case.revocation, case.profile)


def judge_revocation(found: tuple[Revocation, ...], profile: GpuProfile) -> Verdict:
    """The verdict over what is known of a chain's certificates."""
    bad = {Standing.REVOKED} if profile.revocation.hold == "allow" else {Standing.REVOKED, Standing.ON_HOLD}
    wrong = [f"{one.name}: {one.remark}" for one in found if one.standing in bad or one.faulty]
    if wrong:
        return "; ".join(wrong), "every certificate known to be good, from data that is in force"
    if not found or any(one.standing is Standing.UNKNOWN for one in found):
        return NOT_JUDGED
    return None


@check(Claim.HARDWARE)
def gpu_model(case: GpuCase) -> Verdict:
    """The chip is one that the profile lets in.

    Attack: a chip with a known weakness, or one whose report means something else than what is read here.
    """
    allowed = case.profile.devices.models
    return None if case.model in allowed else (str(case.model), " or ".join(allowed))


@check(Claim.INSTANCE_IDENTITY)
def gpu_device(case: GpuCase) -> Verdict:
    """The device is one of those expected, and none that the profile denies.

    Attack: a device whose key was extracted; a genuine one that stands elsewhere, relayed.
    """
    rules, ueid = case.profile.devices, case.chain.ueid
    if ueid in rules.deny:
        return f"{ueid}, which is denied", "another device"
    for wanted in (rules.allow or None, case.expected.devices):
        if wanted is not None and ueid not in wanted:
            return str(ueid), " or ".join(sorted(wanted)) or "no device at all"
    return None


@check(Claim.INSTANCE_IDENTITY)
def gpu_freshness(case: GpuCase) -> Verdict:
    """The request's nonce is the one that the relying party chose. Not judged without one.

    Attack: a report from an earlier session, or one made for somebody else, replayed.
    """
    if case.expected.nonce is None:
        return NOT_JUDGED
    if hmac.compare_digest(case.report.request_nonce, case.expected.nonce):
        return None
    return f"nonce {case.report.request_nonce.hex()}", case.expected.nonce.hex()


@check(Claim.EXECUTABLES)
def gpu_fwid(case: GpuCase) -> Verdict:
    """The firmware digest in the report is the one that the boot ROM certified in the leaf. Not judged of a switch.

    Attack: firmware that speaks with the key of other, older firmware.
    """
    if case.facts.fwid is None and case.switch:
        return NOT_JUDGED  # a switch's report has no such field
    if case.facts.fwid is not None and case.facts.fwid == case.chain.fwid:
        return None
    said = "none" if case.facts.fwid is None else case.facts.fwid.hex()
    return f"FWID {said} in the report", "none certified" if case.chain.fwid is None else case.chain.fwid.hex()


@check(Claim.CONFIGURATION)
def gpu_document(case: GpuCase) -> Verdict:
    """What the evidence document says beside the report agrees with the report.

    Attack: a reader that believes the document's version, nonce or architecture instead of the signed ones.
    """
    evidence, facts = case.evidence, case.facts
    pairs = (
        ("nonce", evidence.nonce, case.report.request_nonce),
        ("driver", evidence.driver_version, facts.driver_version),
        ("VBIOS", evidence.vbios_version and evidence.vbios_version.upper(), facts.vbios_version),
        ("architecture", evidence.arch, ARCHITECTURES.get((case.model or "")[:2])),
    )
    wrong = [f"{name} {_shown(said)}" for name, said, is_ in pairs if said is not None and said != is_]
    right = [f"{name} {_shown(is_)}" for name, said, is_ in pairs if said is not None and said != is_]
    return ("; ".join(wrong), "; ".join(right)) if wrong else None


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
