"""Checks of a virtual TPM that an SNP report vouches for (Azure): its key, its quote, its registers.

They are made only of evidence that comes in such a wrapper; other evidence passes them.
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, check


@check(Claim.INSTANCE_IDENTITY, "- - - - Y -")
def vtpm_binding(case: Case) -> Verdict:
    """REPORT_DATA is the digest of the wrapper's variable data, in which the TPM's attestation key stands.

    Attack: a genuine report beside a TPM key of the attacker's.
    """
    if case.vtpm is None or hmac.compare_digest(case.report.report_data, case.vtpm.hcl.digest):
        return None
    return f"REPORT_DATA {case.report.report_data.hex()}", case.vtpm.hcl.digest.hex()


@check(Claim.INSTANCE_IDENTITY, "- - - - Y -")
def vtpm_quote(case: Case) -> Verdict:
    """The quote is signed by that key (RSASSA-PKCS1-v1_5, SHA-256), over a digest that is the registers' beside it.

    Attack: a quote by another TPM, or other registers than those that were quoted. Not judged without a quote.
    """
    if case.vtpm is None:
        return None
    quote = case.vtpm.quote
    if quote is None:
        return NOT_JUDGED
    modulus, exponent = case.vtpm.hcl.attestation_key
    try:
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        key.verify(quote.signature, quote.message, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError):
        return "the signature does not verify", "a signature by the key in the variable data"
    found = hashlib.sha256(b"".join(quote.pcrs[number] for number in quote.selection)).digest()
    if found != quote.pcr_digest:
        return f"registers with digest {found.hex()}", f"{quote.pcr_digest.hex()}, as quoted"
    return None


@check(Claim.EXECUTABLES, "- - - c o -")
def vtpm_registers(case: Case) -> Verdict:
    """Each register that the profile names was quoted, with one of its values. Not judged if it names none.

    Attack: another boot chain or another kernel in a VM whose firmware alone is in the launch measurement.
    """
    wanted = case.profile.vtpm.registers
    if case.vtpm is None:
        return None if not wanted else ("no TPM quote", "quoted registers")
    if not wanted:
        return NOT_JUDGED
    quote = case.vtpm.quote
    if quote is None:
        return "no TPM quote", "quoted registers"
    for register in wanted:
        found = quote.pcrs[register.number].hex() if register.number in quote.selection else "not quoted"
        if found not in register.values:
            return f"register {register.number}: {found}", " or ".join(register.values)
    return None
