"""Checks of what the device is: its fields, versions, board, mode, measurements, and the manifests they are held to."""

from __future__ import annotations

from attestation.endorsements.nvidia import outside_validity
from attestation.evidence.gpu.rim import RimKind
from attestation.verifier.gpu.check import NOT_JUDGED, Claim, GpuCase, Verdict, check
from attestation.verifier.gpu.device_checks import joined, judge_revocation


@check(Claim.CONFIGURATION)
def gpu_opaque_data(case: GpuCase) -> Verdict:
    """The opaque data can be decoded, and holds no field whose meaning is not known here.

    Attack: a state that a newer driver reports in a field which an older verifier passes over.
    """
    problems = list(case.facts.problems)
    if case.profile.devices.opaque_fields == "known":
        problems += [f"field {kind} is not known here" for kind in case.facts.unknown]
    return ("; ".join(problems), "fields that are known and well formed") if problems else None


@check(Claim.CONFIGURATION)
def gpu_measurement_format(case: GpuCase) -> Verdict:
    """Every measurement is a SHA-384 digest.

    Attack: raw bytes of the device's own choice where a digest is compared.
    """
    blocks = case.report.measurements
    wrong = [str(block.index) for block in blocks if block.value_type & 0x80 or len(block.value) != 48]
    if wrong or not blocks:
        return f"blocks {', '.join(wrong)}" if wrong else "no blocks", "digests of 48 bytes"
    return None


@check(Claim.EXECUTABLES)
def gpu_driver_version(case: GpuCase) -> Verdict:
    """The driver is one that profile and caller let in. A switch has none.

    Attack: a signed driver from before a security fix.
    """
    if case.switch:
        return None
    rules, found = case.profile.versions, case.facts.driver_version
    if found is None:
        return "no driver version", "a driver version in the report"
    if case.expected.driver_version not in (None, found):
        return found, str(case.expected.driver_version)
    if rules.drivers and found not in rules.drivers:
        return found, " or ".join(rules.drivers)
    if rules.minimum_driver is not None:
        parts = found.split(".")
        if not all(part.isdecimal() for part in parts) or _numbers(found, 10) < _numbers(rules.minimum_driver, 10):
            return found, f"at least {rules.minimum_driver}"
    return None


@check(Claim.EXECUTABLES)
def gpu_vbios_version(case: GpuCase) -> Verdict:
    """The VBIOS (a switch's BIOS) is one that profile and caller let in.

    Attack: signed firmware from before a security fix.
    """
    rules, found = case.profile.versions, case.facts.vbios_version
    if found is None:
        return "no VBIOS version", "a VBIOS version in the report"
    if case.expected.vbios_version is not None and case.expected.vbios_version.upper() != found:
        return found, case.expected.vbios_version
    if rules.vbioses and found not in rules.vbioses:
        return found, " or ".join(rules.vbioses)
    if rules.minimum_vbios is not None and _numbers(found, 16) < _numbers(rules.minimum_vbios, 16):
        return found, f"at least {rules.minimum_vbios}"
    return None


def _numbers(version: str, base: int) -> tuple[int, ...]:
    return tuple(int(part, base) for part in version.split("."))


@check(Claim.HARDWARE)
def gpu_board(case: GpuCase) -> Verdict:
    """The board (PROJECT/PROJECT_SKU/CHIP_SKU) is one that the profile lists. A switch has none.

    Attack: another product with the same chip, for instance one without the memory or the links that were audited.
    """
    allowed = case.profile.devices.boards
    if not allowed or case.switch or (case.facts.board or "").upper() in allowed:
        return None
    return str(case.facts.board), " or ".join(allowed)


@check(Claim.CONFIGURATION)
def gpu_mode(case: GpuCase) -> Verdict:
    """The confidential mode is one that the profile lets in, and agrees with the state of the protected PCIe.

    Attack: several GPUs joined by links in the clear where encrypted ones are expected.
    """
    if case.switch:
        return None
    mode, protected, allowed = case.facts.mode, case.facts.pcie_protected, case.profile.devices.modes
    if mode not in allowed:
        return str(mode), " or ".join(allowed)
    if mode != "unstated" and protected is not None and protected != (mode == "ppcie"):
        return f"mode {mode} with protected PCIe {'on' if protected else 'off'}", "protected PCIe exactly in mode ppcie"
    return None


@check(Claim.CONFIGURATION)
def gpu_switch_lock(case: GpuCase) -> Verdict:
    """A switch is locked against its host.

    Attack: a host that re-routes the links of GPUs in the clear.
    """
    if not case.switch or case.facts.switch_locked:
        return None
    return "not locked" if case.facts.switch_locked is False else "lock not stated", "LOCK_SWITCH_STATUS 1"


@check(Claim.CONFIGURATION)
def gpu_devtools(case: GpuCase) -> Verdict:
    """Developer tools, with which the host may profile and debug, are off.

    A report has no field for it: the mode changes what is measured, so that only measurements which all match signed
    manifests exclude it. What a driver said of it counts when it says *on*. Not judged without manifests.

    Attack: a genuine GPU in developer mode, whose memory the host can reach through profiling and debugging.
    """
    if case.evidence.devtools_mode:
        return "on, the driver said", "off"
    matches = [case.rims[kind] for kind in _kinds(case)]
    if any(match.mismatches for match in matches):
        return "not excluded: measurements differ from the manifests'", "all measurements as in the signed manifests"
    if any(match.chosen is None for match in matches):
        return NOT_JUDGED
    return None


def _kinds(case: GpuCase) -> tuple[RimKind, ...]:
    return (RimKind.VBIOS,) if case.switch else (RimKind.DRIVER, RimKind.VBIOS)


@check(Claim.EXECUTABLES)
def gpu_driver_measurements(case: GpuCase) -> Verdict:
    """All measurements that the driver's manifest names have one of its values. Not judged without a matching one.

    Attack: a modified driver or GPU firmware under the version number of a genuine one.
    """
    return None if case.switch else _measurements(case, RimKind.DRIVER)


@check(Claim.EXECUTABLES)
def gpu_vbios_measurements(case: GpuCase) -> Verdict:
    """All measurements that the VBIOS's manifest names have one of its values. Not judged without a matching one.

    Attack: modified firmware or fuses under the version number of a genuine VBIOS.
    """
    return _measurements(case, RimKind.VBIOS)


def _measurements(case: GpuCase, kind: RimKind) -> Verdict:
    match = case.rims[kind]
    if match.chosen is None:
        return NOT_JUDGED
    if not match.mismatches:
        return None
    indices = ", ".join(str(index) for index in match.mismatches)
    return f"measurements {indices} differ", f"the values of the {kind.value} manifest {match.chosen.rim.version}"


@check(Claim.EXECUTABLES)
def rim_overlap(case: GpuCase) -> Verdict:
    """No measurement is claimed by the driver's and the VBIOS's manifest at once.

    Attack: a manifest of one kind that answers for what the other kind must vouch for.
    """
    chosen = [case.rims[kind].chosen for kind in RimKind]
    golden = [set(one.rim.golden) for one in chosen if one is not None]
    both = set.intersection(*golden) if len(golden) == len(RimKind) else set()
    if both:
        return f"measurements {', '.join(map(str, sorted(both)))} in both manifests", "each in one manifest alone"
    return None


def _rim_failures(name: str, case: GpuCase) -> Verdict:
    return joined(
        name, tuple(failure for kind in RimKind for rim in case.rims[kind].matching for failure in rim.failures)
    )


@check(Claim.EXECUTABLES)
def rim_signature(case: GpuCase) -> Verdict:
    """The XML signature of a manifest for this device verifies and covers all of it.

    Attack: golden values changed to those of a modified driver; a signed part wrapped into an unsigned whole.
    """
    return _rim_failures("rim-signature", case)


@check(Claim.EXECUTABLES)
def rim_chain_signatures(case: GpuCase) -> Verdict:
    """Each certificate of a manifest's signer is signed by the next, the root by itself.

    Attack: a self-made signer beside NVIDIA's genuine authorities.
    """
    return _rim_failures("rim-chain-signatures", case)


@check(Claim.EXECUTABLES)
def rim_chain_profile(case: GpuCase) -> Verdict:
    """A manifest's signer is no CA, and its authorities are, with P-384 keys and path lengths kept.

    Attack: an authority below an authority that may have none, issuing signers.
    """
    return _rim_failures("rim-chain-profile", case)


@check(Claim.EXECUTABLES)
def rim_trusted_root(case: GpuCase) -> Verdict:
    """A manifest's signer ends in a root key that the profile pins.

    Attack: a manifest signed under another root, for instance the device root's, or one of the attacker's.
    """
    return _rim_failures("rim-trusted-root", case)


@check(Claim.EXECUTABLES)
def rim_validity(case: GpuCase) -> Verdict:
    """The certificates of a manifest's signer are valid at the time of verification.

    Attack: a manifest that its signer no longer stands by, bringing back a driver with known holes.
    """
    chosen = [case.rims[kind].chosen for kind in RimKind]
    outside = [text for one in chosen if one is not None for text in outside_validity(one.certificates, case.at)]
    if outside:
        return "; ".join(dict.fromkeys(outside)), f"valid at {case.at:%Y-%m-%dT%H:%M:%SZ}"
    return None


@check(Claim.INSTANCE_IDENTITY)
def rim_revocation(case: GpuCase) -> Verdict:
    """No certificate of a manifest's signer is revoked. Not judged where nothing at hand speaks of one.

    Attack: a manifest whose signer was revoked, as NVIDIA does for drivers that must no longer be used.
    """
    matches = [case.rims[kind] for kind in _kinds(case)]
    found = tuple(one for match in matches if match.chosen is not None for one in match.revocation)
    verdict = judge_revocation(found, case.profile)
    if verdict is None and any(match.chosen is None for match in matches):
        return NOT_JUDGED
    return verdict
