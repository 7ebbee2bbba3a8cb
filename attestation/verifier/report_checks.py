"""Checks of the report as such: its layout, the key that signed it, the processor it names."""

from __future__ import annotations

from attestation.endorsements.chain import VekKind
from attestation.evidence.report import (
    SIGNATURE_ALGORITHM_ECDSA_P384_SHA384,
    SIGNING_KEY_VCEK,
    SIGNING_KEY_VLEK,
    nonzero_reserved,
    nonzero_signature_padding,
    product_of,
)
from attestation.evidence.tcb import nonzero_tcb_reserved
from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, check

_SIGNING_KEYS = {SIGNING_KEY_VCEK: "VCEK", SIGNING_KEY_VLEK: "VLEK"}


@check(Claim.HARDWARE, "Y Y Y - Y Y")
def report_version(case: Case) -> Verdict:
    """VERSION is one that the profile lets through, of 2 to 5 that are known.

    Attack: a report of a layout that the verifier reads wrongly; firmware too old to say what newer checks need.
    """
    versions = case.profile.report.versions
    if case.report.version in versions:
        return None
    return str(case.report.version), " or ".join(str(version) for version in versions)


@check(Claim.HARDWARE, "Y - - - - -")
def reserved_bytes(case: Case) -> Verdict:
    """Bytes that the report's version reserves are zero.

    Attack: a field of newer firmware that changes what the report means, signed but not understood.
    """
    offsets = nonzero_reserved(case.report.raw, case.report.version)
    return _offsets(offsets)


@check(Claim.HARDWARE, "Y - - - - -")
def signature_padding(case: Case) -> Verdict:
    """The padding of R and S and the 368 bytes after them are zero.

    Attack: bytes that no signature covers, changed on the way, so that one report has many forms: a replay cache or a
    log keyed on all 1184 bytes takes each for a new one.
    """
    offsets = nonzero_signature_padding(case.report.raw)
    return _offsets(offsets)


def _offsets(offsets: tuple[int, ...]) -> Verdict:
    if not offsets:
        return None
    return f"{len(offsets)} byte(s) not zero, the first at 0x{offsets[0]:03x}", "zero"


@check(Claim.HARDWARE, "Y - - - - -")
def signature_algorithm(case: Case) -> Verdict:
    """SIGNATURE_ALGO is 1, ECDSA on P-384 with SHA-384.

    Attack: algorithm confusion, a signature taken for one of another kind.
    """
    algorithm = case.report.signature_algo
    if algorithm == SIGNATURE_ALGORITHM_ECDSA_P384_SHA384:
        return None
    return str(algorithm), "1 (ECDSA P-384 with SHA-384)"


@check(Claim.HARDWARE, "Y - - - - -")
def key_info_reserved(case: Case) -> Verdict:
    """KEY_INFO's bits 31 to 5 are zero.

    Attack: a property of the signing key that this verifier does not understand.
    """
    return (f"0x{case.report.key_info:x}", "bits 31 to 5 zero") if case.report.key_info >> 5 else None


@check(Claim.HARDWARE, "Y - - - - -")
def tcb_reserved(case: Case) -> Verdict:
    """The bytes that the product's TCB layout reserves are zero in all four TCBs.

    Attack: a TCB read in another product's layout, so that an old microcode's level is compared as another part's.
    """
    if case.product is None:
        return NOT_JUDGED
    report = case.report
    for name, raw in (
        ("CURRENT_TCB", report.current_tcb),
        ("REPORTED_TCB", report.reported_tcb),
        ("COMMITTED_TCB", report.committed_tcb),
        ("LAUNCH_TCB", report.launch_tcb),
    ):
        if nonzero_tcb_reserved(raw, case.product):
            return f"{name} {raw.hex()}", f"reserved bytes of {case.product.value}'s layout zero"
    return None


@check(Claim.INSTANCE_IDENTITY, "Y ! ! - - o")
def signing_key(case: Case) -> Verdict:
    """KEY_INFO names the kind of key that the certificate is for, and the profile lets that kind sign.

    Attack: a VLEK, which a provider may use on any of its machines, passed off as one chip's own key.
    """
    name = _SIGNING_KEYS.get(case.report.signing_key, f"{case.report.signing_key} (none or reserved)")
    allowed = case.profile.report.signing_keys
    if name not in allowed:
        return name, " or ".join(allowed)
    if case.chain.kind is not None and case.chain.kind.value != name:
        return f"{name} in the report, {case.chain.kind.value} in the certificate", "the same in both"
    return None


@check(Claim.INSTANCE_IDENTITY, "- - - - - Y")
def masked_chip_key(case: Case) -> Verdict:
    """KEY_INFO's MASK_CHIP_KEY is clear.

    Attack: a host that has its firmware leave reports unsigned, and supplies the rest itself.
    """
    return ("set", "clear") if case.report.mask_chip_key else None


@check(Claim.HARDWARE, "Y Y Y - Y -")
def product(case: Case) -> Verdict:
    """From version 3 on, CPUID's family and model belong to the product line of the key's issuer.

    Attack: evidence judged by the floors and layouts of another product than the one it comes from.
    """
    report = case.report
    if report.cpuid_fam_id is None or report.cpuid_mod_id is None:
        return None
    cpuid = f"family 0x{report.cpuid_fam_id:02x}, model 0x{report.cpuid_mod_id:02x}"
    found = product_of(report.cpuid_fam_id, report.cpuid_mod_id)
    if found is None:
        return f"{cpuid}: unknown", "a processor of Milan's, Genoa's or Turin's line"
    if case.chain.product is not None and found is not case.chain.product:
        return f"{cpuid}: {found.value}", f"{case.chain.product.value}, as the certificate says"
    return None


@check(Claim.HARDWARE, "- - - - - -")
def allowed_product(case: Case) -> Verdict:
    """The product line is one that the profile names.

    Attack: a line whose chip secrets can be read out ("One Glitch to Rule Them All", CCS 2021: Zen 1 to 3, so Milan),
    where keys of any firmware level can be derived.
    """
    if case.product is None:
        return NOT_JUDGED
    allowed = case.profile.report.products
    return None if case.product.value in allowed else (case.product.value, " or ".join(allowed))


@check(Claim.INSTANCE_IDENTITY, "Y ! ! - ! -")
def hardware_id(case: Case) -> Verdict:
    """CHIP_ID is the hardware id in the VCEK (on Turin its first 8 bytes, the rest zero).

    Attack: a report shown with the certificate of another chip, to pass that chip's allow list.
    """
    extensions = case.chain.extensions
    if extensions is None or extensions.hwid is None:
        return None
    chip_id, hwid = case.report.chip_id, extensions.hwid
    if chip_id == hwid + bytes(64 - len(hwid)):
        return None
    return f"CHIP_ID {chip_id.hex()}", hwid.hex()


@check(Claim.INSTANCE_IDENTITY, "- - - - - -")
def chip_id_present(case: Case) -> Verdict:
    """CHIP_ID is not masked in a report under a VCEK, nor whenever chips are listed.

    Attack: a host that hides on which chip it runs, to escape a deny list.
    """
    chips = case.profile.chips
    listed = bool(chips.allow or chips.deny or case.expected.chips)
    if any(case.report.chip_id) or (case.chain.kind is VekKind.VLEK and not listed):
        return None
    return "all zero", "the chip's id"


@check(Claim.INSTANCE_IDENTITY, "o - - c - -")
def chip(case: Case) -> Verdict:
    """CHIP_ID is on the allow lists of profile and caller, and not on the deny list.

    Attack: a chip whose key was extracted (voltage glitching, interposers on the memory bus such as "Battering RAM") or
    which stands in somebody else's hall.
    """
    chips, expected = case.profile.chips, case.expected.chips
    if not chips.allow and not chips.deny and expected is None:
        return NOT_JUDGED
    found = case.report.chip_id.hex()
    if any(_same_chip(found, denied) for denied in chips.deny):
        return found, "a chip that is not denied"
    if chips.allow and not any(_same_chip(found, allowed) for allowed in chips.allow):
        return found, "a chip that the profile allows"
    if expected is not None and not any(_same_chip(found, allowed.hex()) for allowed in expected):
        return found, "a chip that is enrolled"
    return None


def _same_chip(found: str, listed: str) -> bool:
    return found == listed.ljust(128, "0")


@check(Claim.INSTANCE_IDENTITY, "- - - - - -")
def provider(case: Case) -> Verdict:
    """A VLEK's CSP_ID is one that the profile names.

    Attack: another cloud provider, whose key AMD certified just the same.
    """
    extensions = case.chain.extensions
    if extensions is None or case.chain.kind is not VekKind.VLEK or not case.profile.providers.csp_ids:
        return NOT_JUDGED
    if extensions.csp_id in case.profile.providers.csp_ids:
        return None
    return str(extensions.csp_id), " or ".join(case.profile.providers.csp_ids)
