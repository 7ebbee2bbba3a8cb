"""Several GPUs and switches together: one bad device makes the whole bad, and so does one that is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nvidia_world as world
import pytest

from attestation.evidence.gpu.document import GpuEvidence
from attestation.verifier.appraisal import Appraisal
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.verify import verify_devices, worst_value

EXPECTED = GpuExpected(nonce=world.NONCE)


def names(appraisal: Appraisal) -> set[str]:
    return {failure.check for failure in appraisal.failures}


def group(evidence: list[GpuEvidence], **changes: Any) -> Appraisal:
    return verify_devices(
        evidence, world.profile(**changes), EXPECTED, rims=world.good_rims(), revocation=None, at=world.AT
    ).whole


def protected(device: world.Device, switches: list[world.Device], **options: Any) -> GpuEvidence:
    fields = world.gpu_fields(
        FEATURE_FLAG=b"\x02\0", PROTECTED_PCIE_STATUS=b"\xaa", SWITCH_PDI=world.linked_to(switches)
    )
    return world.evidence(device, fields, **options)


@pytest.fixture(scope="module")
def machine() -> tuple[list[world.Device], list[world.Device]]:
    """Two GPUs and two switches, all linked."""
    return [world.make_device(number=one) for one in (10, 11)], [world.make_device("LS_10", one) for one in (10, 11)]


def whole(machine: tuple[list[world.Device], list[world.Device]]) -> list[GpuEvidence]:
    gpus, switches = machine
    return [
        *(protected(one, switches) for one in gpus),
        *(world.evidence(one, world.switch_fields(one, gpus)) for one in switches),
    ]


def test_several_devices_with_links_in_the_clear(machine: tuple[list[world.Device], list[world.Device]]) -> None:
    appraisal = group(whole(machine))
    assert appraisal.status == "affirming"
    assert "gpu-topology" not in appraisal.not_judged
    assert sorted(appraisal.claims["devices"]) == ["gpu0", "gpu1", "switch0", "switch1"]


def test_one_bad_device_makes_the_whole_bad(machine: tuple[list[world.Device], list[world.Device]]) -> None:
    devices = whole(machine)
    devices[1] = protected(machine[0][1], machine[1], signing_key="mine")
    appraisal = verify_devices(devices, world.profile(), EXPECTED, rims=world.good_rims(), at=world.AT)
    assert appraisal.whole.status == "contraindicated"
    assert [failure.value for failure in appraisal.whole.failures] == ["gpu1: the signature does not verify"]
    assert appraisal.whole.vector["hardware"] == 99
    assert appraisal.devices["gpu1"].status == "contraindicated"
    assert appraisal.devices["gpu0"].status == "affirming"


def test_one_device_alone_leaves_its_links_unjudged(machine: tuple[list[world.Device], list[world.Device]]) -> None:
    appraisal = group(whole(machine)[:1])
    assert appraisal.status == "affirming"
    assert "gpu-topology" in appraisal.not_judged
    assert appraisal.vector["configuration"] == 0


GROUP_ATTACKS: dict[str, Callable[[tuple[list[world.Device], list[world.Device]]], Appraisal]] = {
    "gpu-distinct-devices": lambda machine: group([*whole(machine), whole(machine)[0]]),
    "gpu-same-session": lambda machine: (
        verify_devices(
            [*whole(machine)[1:], protected(machine[0][0], machine[1], nonce=bytes(32))],
            world.profile(),
            GpuExpected(),
            at=world.AT,
        ).whole
    ),
    "gpu-same-mode": lambda machine: group([world.evidence(world.make_device(number=12)), *whole(machine)]),
    "gpu-topology": lambda machine: group(whole(machine)[:3]),
    "gpu-count": lambda machine: group(whole(machine), devices={"gpus": 8, "switches": 4}),
}


@pytest.mark.parametrize("check", GROUP_ATTACKS)
def test_the_group_attack_is_refused_for_its_reason(
    machine: tuple[list[world.Device], list[world.Device]], check: str
) -> None:
    appraisal = GROUP_ATTACKS[check](machine)
    assert appraisal.status == "contraindicated"
    assert check in names(appraisal)


def test_an_unattested_gpu_on_a_switch_is_found(machine: tuple[list[world.Device], list[world.Device]]) -> None:
    devices = whole(machine)
    appraisal = group([devices[0], *devices[2:]])
    (failure,) = [one for one in appraisal.failures if one.check == "gpu-topology"]
    assert machine[0][1].pdi.hex() in failure.value


def test_a_switch_with_another_identifier_than_its_certificate(
    machine: tuple[list[world.Device], list[world.Device]],
) -> None:
    gpus, switches = machine
    devices = whole(machine)
    devices[2] = world.evidence(switches[0], world.switch_fields(switches[0], gpus, SWITCH_PDI=switches[1].pdi))
    assert "gpu-topology" in names(group(devices))


def test_the_worst_value_of_several() -> None:
    assert worst_value([2, 2]) == 2
    assert worst_value([3, 0]) == 0
    assert worst_value([0, 96, 2]) == 96
    assert worst_value([32, 99]) == 99
