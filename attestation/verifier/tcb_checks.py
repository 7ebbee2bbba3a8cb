"""Checks of the firmware's patch levels, versions and mitigations."""

from __future__ import annotations

from attestation.evidence.tcb import Tcb
from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, check
from attestation.verifier.profile import ProductFloors, TcbFloor


@check(Claim.HARDWARE, "- - - - - -")
def tcb_order(case: Case) -> Verdict:
    """REPORTED_TCB and COMMITTED_TCB are at most CURRENT_TCB, part by part.

    Attack: a report whose TCBs contradict each other, as no healthy firmware makes it.
    """
    if case.current is None or case.reported is None or case.committed is None:
        return NOT_JUDGED
    for name, tcb in (("REPORTED_TCB", case.reported), ("COMMITTED_TCB", case.committed)):
        if not case.current.at_least(tcb):
            return f"{name} {tcb}", f"at most CURRENT_TCB {case.current}"
    return None


@check(Claim.HARDWARE, "Y - - - - -")
def provisional_firmware(case: Case) -> Verdict:
    """COMMITTED_TCB and the committed firmware version are the current ones.

    Attack: a host that runs new firmware for the attestation, uncommitted, and rolls it back afterwards to a version
    with a known hole.
    """
    report = case.report
    current = (report.current_major, report.current_minor, report.current_build)
    committed = (report.committed_major, report.committed_minor, report.committed_build)
    if case.current != case.committed:
        return f"COMMITTED_TCB {case.committed}", f"CURRENT_TCB {case.current}"
    if current != committed:
        return f"committed firmware {_version(committed)}", f"current firmware {_version(current)}"
    return None


_NO_FLOORS = ProductFloors()


def _floors(case: Case) -> ProductFloors:
    return _NO_FLOORS if case.product is None else case.profile.tcb.of(case.product)


def _floor(name: str, tcb: Tcb | None, floor: TcbFloor | None) -> Verdict:
    if floor is None:
        return NOT_JUDGED
    if tcb is not None and tcb.at_least(floor.tcb):
        return None
    return f"{name} {tcb}", f"at least {floor.tcb}"


@check(Claim.HARDWARE, "o - - o o o")
def reported_tcb_floor(case: Case) -> Verdict:
    """Every part of REPORTED_TCB is at least the product's floor.

    Attack: firmware or microcode with a published hole, e.g. forged microcode ("EntrySign", CVE-2024-56161), CacheWarp
    (CVE-2023-20592), RMPocalypse (CVE-2025-0033).
    """
    return _floor("REPORTED_TCB", case.reported, _floors(case).reported)


@check(Claim.HARDWARE, "- - - - - -")
def current_tcb_floor(case: Case) -> Verdict:
    """Every part of CURRENT_TCB is at least the product's floor.

    Attack: as for REPORTED_TCB, for what runs now.
    """
    return _floor("CURRENT_TCB", case.current, _floors(case).current)


@check(Claim.HARDWARE, "- - - - - -")
def committed_tcb_floor(case: Case) -> Verdict:
    """Every part of COMMITTED_TCB is at least the product's floor.

    Attack: roll-back after the attestation: the platform can return to any level down to the committed one.
    """
    return _floor("COMMITTED_TCB", case.committed, _floors(case).committed)


@check(Claim.HARDWARE, "o - - - - -")
def launch_tcb_floor(case: Case) -> Verdict:
    """Every part of LAUNCH_TCB is at least the product's floor.

    Attack: a guest launched on vulnerable firmware, tampered with there, and attested after a live update.
    """
    return _floor("LAUNCH_TCB", case.launch, _floors(case).launch)


def _version(version: tuple[int, int, int]) -> str:
    return ".".join(str(part) for part in version)


def _firmware(version: tuple[int, int, int], floor: str | None) -> Verdict:
    if floor is None:
        return NOT_JUDGED
    lowest = tuple(int(part) for part in floor.split("."))
    return None if version >= lowest else (_version(version), f"at least {floor}")


@check(Claim.HARDWARE, "o - - - - -")
def current_firmware_floor(case: Case) -> Verdict:
    """The SEV firmware that runs is at least the product's floor (major.minor.build).

    Attack: firmware that lacks a check, e.g. ALIAS_CHECK against BadRAM (CVE-2024-21944).
    """
    report = case.report
    version = (report.current_major, report.current_minor, report.current_build)
    return _firmware(version, _floors(case).current_firmware)


@check(Claim.HARDWARE, "o - - - - -")
def committed_firmware_floor(case: Case) -> Verdict:
    """The committed SEV firmware is at least the product's floor (major.minor.build).

    Attack: roll-back to firmware below the floor after the attestation.
    """
    report = case.report
    version = (report.committed_major, report.committed_minor, report.committed_build)
    return _firmware(version, _floors(case).committed_firmware)


def _mitigations(found: int | None, wanted: int) -> Verdict:
    if not wanted:
        return NOT_JUDGED
    if found is not None and found & wanted == wanted:
        return None
    return "none (report version below 5)" if found is None else f"0x{found:x}", f"all bits of 0x{wanted:x}"


@check(Claim.HARDWARE, "o - - - - -")
def launch_mitigations(case: Case) -> Verdict:
    """LAUNCH_MIT_VECTOR has every bit that the profile asks for.

    Attack: a guest launched before the mitigation of a hole was switched on, and tampered with then.
    """
    return _mitigations(case.report.launch_mit_vector, case.profile.mitigations.launch)


@check(Claim.HARDWARE, "o - - - - -")
def current_mitigations(case: Case) -> Verdict:
    """CURRENT_MIT_VECTOR has every bit that the profile asks for.

    Attack: a host that leaves the mitigation of a published hole switched off.
    """
    return _mitigations(case.report.current_mit_vector, case.profile.mitigations.current)
