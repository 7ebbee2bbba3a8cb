"""Checks of the report's signature and key: chain, revocation, and what the certificate says of the firmware.

What does not depend on time (`vek-profile`, `vek-extensions`, `chain-signatures`, `chain-profile`, `trusted-root`) is
proved by `attestation.endorsements.chain`; the rules are registered here so that they are listed with the others.
"""

from __future__ import annotations

from datetime import timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, check

_ECDSA = ec.ECDSA(hashes.SHA384())


@check(Claim.HARDWARE, "Y Y Y - Y Y")
def report_signature(case: Case) -> Verdict:
    """The VEK's signature over bytes 0x000 to 0x29F, as they were received, verifies (ECDSA P-384, SHA-384).

    Attack: a report that nobody signed, or one byte changed on the way.
    """
    report = case.report
    if case.chain.key is None:
        return "no key to verify it with", "a signature by the VEK"
    try:
        case.chain.key.verify(encode_dss_signature(report.signature_r, report.signature_s), report.signed, _ECDSA)
    except InvalidSignature:
        return "does not verify", "a signature by the VEK over bytes 0x000 to 0x29f"
    return None


def _proved_in_chain(name: str, case: Case) -> Verdict:
    failures = [failure for failure in case.chain.failures if failure.check == name]
    if not failures:
        return None
    return "; ".join(failure.value for failure in failures), "; ".join(failure.expected for failure in failures)


@check(Claim.HARDWARE, "Y - - - - o")
def vek_profile(case: Case) -> Verdict:
    """The VEK is an X.509 v3 certificate for a P-384 key, with the exact names of a VCEK or VLEK and its issuer.

    Attack: another certificate of the same issuer, or one with a look-alike name, taken for a chip's.
    """
    return _proved_in_chain("vek-profile", case)


@check(Claim.HARDWARE, "Y - - - - -")
def vek_extensions(case: Case) -> Verdict:
    """AMD's extensions are all there, once each, in range, and of the issuer's product.

    Attack: a value that two readers read differently, e.g. a patch level of which only the last byte is taken.
    """
    return _proved_in_chain("vek-extensions", case)


@check(Claim.HARDWARE, "Y ! Y - Y Y")
def chain_signatures(case: Case) -> Verdict:
    """ARK signs itself and the ASK or ASVK, which signs the VEK: RSASSA-PSS, SHA-384, MGF1 with SHA-384, salt 48.

    Attack: a self-made VEK beside AMD's genuine authorities.
    """
    return _proved_in_chain("chain-signatures", case)


@check(Claim.HARDWARE, "Y - - - - -")
def chain_profile(case: Case) -> Verdict:
    """The authorities have RSA-4096 keys, exact names, critical CA constraints (path length 0 below the root), usage.

    Attack: a certificate that is no authority, or an authority below an authority, issuing VEKs.
    """
    return _proved_in_chain("chain-profile", case)


@check(Claim.HARDWARE, "o - Y - Y Y")
def trusted_root(case: Case) -> Verdict:
    """The chain ends in a root key that the profile pins; product and world (hardware, virtual) are the pin's.

    Attack: a whole forged chain with AMD's names (accepted by a verifier that takes the root from the evidence); the
    virtual platform passed off as hardware.
    """
    return _proved_in_chain("trusted-root", case)


@check(Claim.HARDWARE, "Y - - - - -")
def certificate_validity(case: Case) -> Verdict:
    """VEK, ASK or ASVK, and ARK are valid at the time of verification.

    Attack: a key that its owner gave up long ago, e.g. the VLEK of a provider that AMD no longer certifies.
    """
    for validity in case.chain.validities:
        if case.at < validity.since or (validity.until is not None and case.at > validity.until):
            until = "" if validity.until is None else f" to {validity.until:%Y-%m-%d}"
            return (
                f"{validity.name} valid from {validity.since:%Y-%m-%d}{until}",
                f"valid at {case.at:%Y-%m-%dT%H:%M:%SZ}",
            )
    return None


@check(Claim.INSTANCE_IDENTITY, "o ! - - - -")
def revocation(case: Case) -> Verdict:
    """No list signed by the root revokes a certificate of the chain. Not judged without a list.

    Attack: an intermediate key that leaked and was revoked, with which anybody can make VEKs.
    """
    if case.chain.revoked:
        return f"{' and '.join(case.chain.revoked)} revoked", "no certificate of the chain on a revocation list"
    return None if case.chain.lists else NOT_JUDGED


@check(Claim.INSTANCE_IDENTITY, "- - - - - -")
def revocation_list(case: Case) -> Verdict:
    """A revocation list is complete, signed by the root, within its own dates and no older than the profile allows.

    Attack: an old list from before the revocation, or a list without a signature, handed over by the host.
    """
    failed = _proved_in_chain("revocation-list", case)
    if failed is not None or not case.chain.lists:
        return failed
    days = case.profile.revocation.max_age_days
    newest = max(case.chain.lists, key=lambda one: one.since)
    if newest.since > case.at:
        return f"made {newest.since:%Y-%m-%d}", f"made before {case.at:%Y-%m-%dT%H:%M:%SZ}"
    if newest.until is None or newest.until < case.at:
        until = "without an end" if newest.until is None else f"ended {newest.until:%Y-%m-%d}"
        return until, f"a list that is in force at {case.at:%Y-%m-%dT%H:%M:%SZ}"
    if days and case.at - newest.since > timedelta(days=days):
        return f"made {newest.since:%Y-%m-%d}", f"at most {days} days old"
    return None


@check(Claim.HARDWARE, "Y Y Y - Y -")
def certificate_tcb(case: Case) -> Verdict:
    """The TCB in the VEK is REPORTED_TCB, in every part.

    Attack: a key derived for old, vulnerable firmware ("Insecure Until Proven Updated", CCS 2019) that signs reports of
    new firmware: whoever holds the old key could report any level.
    """
    if case.chain.extensions is None or case.reported is None:
        return None
    certified = case.chain.extensions.tcb
    return None if certified == case.reported else (str(case.reported), f"{certified}, as certified")
