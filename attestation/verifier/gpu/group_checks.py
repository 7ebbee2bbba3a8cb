"""Checks of all devices together: each once, one session, one mode, and nobody unattested on links in the clear."""

from __future__ import annotations

from attestation.verifier.gpu.check import NOT_JUDGED, Claim, GpuCase, Verdict, group_check


@group_check(Claim.INSTANCE_IDENTITY)
def gpu_distinct_devices(cases: tuple[GpuCase, ...]) -> Verdict:
    """No device is there twice.

    Attack: one genuine GPU that answers for several.
    """
    ids = [case.chain.ueid or case.chain.serial for case in cases]
    twice = sorted({str(one) for one in ids if ids.count(one) > 1})
    return (f"{', '.join(twice)} more than once", "each device once") if twice else None


@group_check(Claim.INSTANCE_IDENTITY)
def gpu_same_session(cases: tuple[GpuCase, ...]) -> Verdict:
    """All devices were asked with the same nonce.

    Attack: the report of a device from an earlier session among fresh ones.
    """
    nonces = {case.report.request_nonce.hex() for case in cases}
    return (", ".join(sorted(nonces)), "one nonce for all devices") if len(nonces) > 1 else None


@group_check(Claim.CONFIGURATION)
def gpu_same_mode(cases: tuple[GpuCase, ...]) -> Verdict:
    """All GPUs are in one mode.

    Attack: one GPU in single mode among GPUs that trust each other over their links.
    """
    modes = {str(case.facts.mode) for case in cases if not case.switch}
    return (", ".join(sorted(modes)), "one mode for all GPUs") if len(modes) > 1 else None


@group_check(Claim.CONFIGURATION)
def gpu_topology(cases: tuple[GpuCase, ...]) -> Verdict:
    """Where links are in the clear (mode ppcie), all their ends are attested. Not judged of one device alone.

    Attack: a switch or a GPU of the host's own on links that carry weights and data in the clear.
    """
    exposed = [case for case in cases if case.switch or case.facts.mode == "ppcie"]
    if not exposed:
        return None
    if len(cases) == 1:
        return NOT_JUDGED
    switches = {case.chain.pdi for case in cases if case.switch}
    gpus = {case.chain.pdi for case in cases if not case.switch}
    wrong: list[str] = []
    for case in exposed:
        name = case.chain.ueid or "a device"
        if case.switch and case.facts.own_pdi != case.chain.pdi:
            wrong.append(f"switch {name} gives another identifier than its certificate")
        if case.facts.neighbours is None:
            wrong.append(f"{name} does not say whom it is linked to")
            continue
        missing = case.facts.neighbours - (gpus if case.switch else switches)
        wrong += [f"{name} is linked to {one.hex()}, which is not attested" for one in sorted(missing)]
    return ("; ".join(dict.fromkeys(wrong)), "evidence of every device on the links") if wrong else None


@group_check(Claim.CONFIGURATION)
def gpu_count(cases: tuple[GpuCase, ...]) -> Verdict:
    """There are as many GPUs and switches as the profile says.

    Attack: a device left out of the evidence.
    """
    rules = cases[0].profile.devices
    switches = sum(case.switch for case in cases)
    found = (len(cases) - switches, switches)
    for count, wanted, what in ((found[0], rules.gpus, "GPUs"), (found[1], rules.switches, "switches")):
        if wanted is not None and count != wanted:
            return f"{count} {what}", f"{wanted} {what}"
    return None
