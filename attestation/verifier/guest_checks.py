"""Checks of what the guest is: measurement, freshness, init-data, ID block, migration agent."""

from __future__ import annotations

import hmac

from attestation.errors import MalformedEvidence
from attestation.evidence.id_block import parse_id_block, verify_id_block
from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, check

_NO_AGENT = b"\xff" * 32


@check(Claim.RUNTIME_OPAQUE, "o - Y - Y Y")
def vmpl(case: Case) -> Verdict:
    """The report was asked for at a VM privilege level that the profile lets through.

    Attack: less privileged code in the guest (an operating system under an SVSM) that speaks for the whole guest; a
    request by the host (0xffffffff).
    """
    levels = case.profile.report.vmpls
    return None if case.report.vmpl in levels else (str(case.report.vmpl), " or ".join(str(level) for level in levels))


@check(Claim.RUNTIME_OPAQUE, "o - - - - -")
def migration_agent(case: Case) -> Verdict:
    """REPORT_ID_MA is all ones (no migration agent) unless the profile lets POLICY's MIGRATE_MA be set.

    Attack: an agent of the host's that exports the guest, memory and all, to a machine of its choice.
    """
    if case.profile.policy.migrate_ma != "clear" or case.report.report_id_ma == _NO_AGENT:
        return None
    return f"REPORT_ID_MA {case.report.report_id_ma.hex()}", "all ones"


@check(Claim.EXECUTABLES, "o - o o o o")
def measurement(case: Case) -> Verdict:
    """MEASUREMENT is one of the reference values of profile and caller. Not judged without any.

    Attack: another image than the one that was approved.
    """
    listed, expected = case.profile.reference.measurements, case.expected.measurements
    if not listed and expected is None:
        return NOT_JUDGED
    found = case.report.measurement
    if (not listed or found.hex() in listed) and (expected is None or found in expected):
        return None
    return found.hex(), "one of the reference values"


@check(Claim.INSTANCE_IDENTITY, "o o Y c Y Y")
def freshness(case: Case) -> Verdict:
    """REPORT_DATA is what the relying party asked for. Not judged without a value.

    Under a paravisor REPORT_DATA is fixed at boot: there the TPM quote's extra data (zeros after it) stands for it.

    Attack: a report from an earlier session, or made for somebody else's key or nonce, replayed.
    """
    listed, expected = case.profile.reference.report_data, case.expected.report_data
    if listed is None and expected is None:
        return NOT_JUDGED
    name, found = "REPORT_DATA", case.report.report_data
    if case.vtpm is not None:
        if case.vtpm.quote is None:
            return "no TPM quote, and REPORT_DATA is as old as the boot", "a quote over the nonce"
        name, found = "extra data", case.vtpm.quote.extra_data.ljust(64, b"\0")
    for wanted in (expected, None if listed is None else bytes.fromhex(listed)):
        if wanted is not None and not hmac.compare_digest(found, wanted):
            return f"{name} {found.hex()}", wanted.hex()
    return None


@check(Claim.CONFIGURATION, "o o Y c - o")
def init_data(case: Case) -> Verdict:
    """HOST_DATA is the digest of the init-data that the guest was enrolled with. Not judged without a value.

    Attack: the approved image booted with init-data of the host's own: another charter, another role or name.
    """
    listed, expected = case.profile.reference.host_data, case.expected.host_data
    if not listed and expected is None:
        return NOT_JUDGED
    found = case.report.host_data
    if expected is not None and found != expected:
        return f"HOST_DATA {found.hex()}", expected.hex()
    if listed and found.hex() not in listed:
        return f"HOST_DATA {found.hex()}", " or ".join(listed)
    return None


@check(Claim.EXECUTABLES, "o - - - - -")
def id_block(case: Case) -> Verdict:
    """The ID block at hand is signed by the keys that the report names, and says what the report says.

    Attack: a block with another measurement, policy or version number, or one that its key never signed. Not judged
    without a block.
    """
    if case.expected.id_block is None:
        return NOT_JUDGED
    block, authentication = case.expected.id_block
    try:
        keys = verify_id_block(block, authentication)
        said = parse_id_block(block)
    except MalformedEvidence as error:
        return error.what, "a block signed by its ID key"
    report = case.report
    author = report.author_key_digest if report.author_key_enabled else None
    for name, found, wanted in (
        ("ID_KEY_DIGEST", report.id_key_digest, keys.id_key_digest),
        ("AUTHOR_KEY_DIGEST", author, keys.author_key_digest),
        ("MEASUREMENT", report.measurement, said.measurement),
        ("FAMILY_ID", report.family_id, said.family_id),
        ("IMAGE_ID", report.image_id, said.image_id),
        ("GUEST_SVN", report.guest_svn, said.guest_svn),
        ("POLICY", report.policy, said.policy),
    ):
        if found != wanted:
            return f"{name} {_text(found)}", f"{_text(wanted)}, as the block says"
    return None


def _text(value: bytes | int | None) -> str:
    return value.hex() if isinstance(value, bytes) else "none" if value is None else f"0x{value:x}"


@check(Claim.EXECUTABLES, "o - - - - -")
def id_key(case: Case) -> Verdict:
    """ID_KEY_DIGEST is one that the profile pins: its owner signed what may be launched. Not judged without pins.

    Attack: a launch without the maker's ID block (the digest is then zero), or with a block signed by somebody else.
    """
    pinned = case.profile.id_block.id_keys
    if not pinned:
        return NOT_JUDGED
    found = case.report.id_key_digest.hex()
    return None if found in pinned and any(case.report.id_key_digest) else (found, " or ".join(pinned))


@check(Claim.EXECUTABLES, "o - - - - -")
def author_key(case: Case) -> Verdict:
    """AUTHOR_KEY_EN is set and AUTHOR_KEY_DIGEST one that the profile pins. Not judged without pins.

    Attack: a digest that means nothing because the author key is not enabled.
    """
    pinned = case.profile.id_block.author_keys
    if not pinned:
        return NOT_JUDGED
    if not case.report.author_key_enabled:
        return "AUTHOR_KEY_EN is clear", "an author key"
    found = case.report.author_key_digest.hex()
    return None if found in pinned else (found, " or ".join(pinned))


def _under_id_key(case: Case) -> Verdict:
    """Whoever launches a guest writes what it likes into an ID block of its own: believed only under a pinned key."""
    if case.profile.id_block.id_keys and case.profile.severities["id-key"] == "refuse":
        return None
    return "no ID key is pinned", "id-block.id-keys in the profile: without one the host chooses this value"


@check(Claim.EXECUTABLES, "o - - - - -")
def family_id(case: Case) -> Verdict:
    """FAMILY_ID is the profile's, under a pinned ID key. Not judged if the profile names none.

    Attack: another product of the same maker in this one's place.
    """
    wanted = case.profile.id_block.family_id
    if wanted is None:
        return NOT_JUDGED
    found = case.report.family_id.hex()
    return _under_id_key(case) if found == wanted else (found, wanted)


@check(Claim.EXECUTABLES, "o - - - - -")
def image_id(case: Case) -> Verdict:
    """IMAGE_ID is the profile's, under a pinned ID key. Not judged if the profile names none.

    Attack: another image of the same maker in this one's place.
    """
    wanted = case.profile.id_block.image_id
    if wanted is None:
        return NOT_JUDGED
    found = case.report.image_id.hex()
    return _under_id_key(case) if found == wanted else (found, wanted)


@check(Claim.EXECUTABLES, "o - - - - -")
def guest_svn(case: Case) -> Verdict:
    """GUEST_SVN is at least the profile's, under a pinned ID key. Not judged if the profile names none.

    Attack: an older image of the same maker, with a hole that was closed since.
    """
    lowest = case.profile.id_block.minimum_guest_svn
    if lowest is None:
        return NOT_JUDGED
    return (
        _under_id_key(case) if case.report.guest_svn >= lowest else (str(case.report.guest_svn), f"at least {lowest}")
    )


@check(Claim.INSTANCE_IDENTITY, "o - - - - -")
def report_id(case: Case) -> Verdict:
    """REPORT_ID is the profile's: this very guest, since it was launched. Not judged if the profile names none.

    Attack: another run of the same image in this guest's place.
    """
    wanted = case.profile.reference.report_id
    if wanted is None:
        return NOT_JUDGED
    found = case.report.report_id.hex()
    return None if found == wanted else (found, wanted)


@check(Claim.INSTANCE_IDENTITY, "o - - - - -")
def report_id_ma(case: Case) -> Verdict:
    """REPORT_ID_MA is the profile's: the migration agent that is trusted. Not judged if the profile names none.

    Attack: a migration agent of the host's in the trusted one's place.
    """
    wanted = case.profile.reference.report_id_ma
    if wanted is None:
        return NOT_JUDGED
    found = case.report.report_id_ma.hex()
    return None if found == wanted else (found, wanted)
