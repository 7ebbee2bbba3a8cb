"""Real NVIDIA evidence, where a copy of the public vectors is at hand: every expected outcome, each for its reason."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from attestation.endorsements.nvidia import outside_validity, verify_rim
from attestation.evidence.gpu.document import GpuEvidence, read_gpu_document
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.profile import SHOW_GPU
from attestation.verifier.gpu.verify import verify_devices, verify_gpu

VECTORS = Path(os.environ.get("SEAL_VECTORS", Path(__file__).parents[4] / "shared" / "vectors")) / "gpu"
pytestmark = pytest.mark.skipif(not VECTORS.is_dir(), reason="no public GPU vectors at hand (set SEAL_VECTORS)")

IN_RIM_TIME = datetime(2025, 1, 15, tzinfo=UTC)
AFTER = datetime(2026, 6, 1, tzinfo=UTC)

DEVICES = sorted(path.parent for path in VECTORS.glob("*/report.bin"))
RIMS = sorted((VECTORS / "rim").glob("*.swidtag"))


def meta(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return document


def evidence(folder: Path) -> GpuEvidence:
    return GpuEvidence(report=(folder / "report.bin").read_bytes(), chain=(folder / "cert_chain.pem").read_bytes())


def rims() -> list[bytes]:
    return [path.read_bytes() for path in RIMS]


def test_the_vectors_are_all_there() -> None:
    assert len(DEVICES) == 8
    assert len(RIMS) == 19


@pytest.mark.parametrize("folder", DEVICES, ids=[folder.name for folder in DEVICES])
def test_a_real_device_is_accepted(folder: Path) -> None:
    said = meta(folder)
    assert said["expected"].startswith("ACCEPT")
    expected = GpuExpected(nonce=bytes.fromhex(said["nonce"]))
    appraisal = verify_gpu(evidence(folder), SHOW_GPU, expected, rims=rims(), at=AFTER)
    assert (appraisal.status, appraisal.failures) == ("affirming", ())
    claims = appraisal.claims
    assert claims["platform"] == "hardware"
    assert claims.get("driver_version", "") == said["driver"]
    assert claims["certificate_serial"] == said["leaf_serial"].removeprefix("0x")
    for claim, name in (("project", "project"), ("project_sku", "project_sku"), ("chip_sku", "chip_sku")):
        assert claims.get(claim, "") == said[name]
    assert claims.get("fwid", "") == said["fwid"]
    if "PPCIE" in said["expected"] and claims["kind"] == "gpu":
        assert (claims["mode"], claims["protected_pcie"]) == ("ppcie", True)
    # No golden values and no revocation data are published for them: said, and not affirmed.
    assert {"gpu-vbios-measurements", "gpu-devtools", "gpu-revocation"} <= set(appraisal.not_judged)
    assert appraisal.vector["executables"] == 0


@pytest.mark.parametrize("folder", DEVICES, ids=[folder.name for folder in DEVICES])
def test_a_real_device_with_another_nonce_or_a_flipped_bit_is_refused(folder: Path) -> None:
    good = evidence(folder)
    stale = verify_gpu(good, SHOW_GPU, GpuExpected(nonce=bytes(32)), at=AFTER)
    assert [failure.check for failure in stale.failures] == ["gpu-freshness"]
    report = bytearray(good.report)
    report[120] ^= 1
    broken = verify_gpu(GpuEvidence(report=bytes(report), chain=good.chain), SHOW_GPU, GpuExpected(), at=AFTER)
    assert [failure.check for failure in broken.failures] == ["gpu-report-signature"]
    other = next(one for one in DEVICES if one != folder)
    foreign = GpuEvidence(report=good.report, chain=(other / "cert_chain.pem").read_bytes())
    failures = {one.check for one in verify_gpu(foreign, SHOW_GPU, GpuExpected(), at=AFTER).failures}
    assert "gpu-report-signature" in failures


DOCUMENTS = [folder for folder in DEVICES if (folder / "evidence.json").exists()]


@pytest.mark.parametrize("folder", DOCUMENTS, ids=[folder.name for folder in DOCUMENTS])
def test_a_real_document_holds_the_same(folder: Path) -> None:
    (device,) = read_gpu_document((folder / "evidence.json").read_bytes())
    assert (device.report, device.chain) == (evidence(folder).report, evidence(folder).chain)
    assert verify_gpu(device, SHOW_GPU, GpuExpected(), at=AFTER).status == "affirming"


def test_half_a_real_machine_is_refused_for_its_open_ends() -> None:
    """Five of eight GPUs and two of four switches: every link is named by both its ends, and some ends are missing."""
    devices = [evidence(folder) for folder in DOCUMENTS]
    found = verify_devices(devices, SHOW_GPU, GpuExpected(), at=AFTER)
    assert {failure.check for failure in found.whole.failures} == {"gpu-topology"}
    (failure,) = found.whole.failures
    attested = {part.claims["pdi"] for part in found.devices.values()}
    named = {pdi for part in found.devices.values() for pdi in part.claims["neighbours"]}
    assert attested <= named, "each device that is there is named by one it is linked to"
    assert all(pdi in failure.value for pdi in named - attested)


NEGATIVE = {
    "hopper_cert_chain_case2.pem": {"gpu-chain-length", "gpu-device-identity"},
    "hopper_cert_chain_case3.pem": {"gpu-chain-length", "gpu-chain-signatures"},
    "hopper_cert_chain_case4.pem": {"gpu-chain-length", "gpu-device-identity", "gpu-chain-profile"},
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_broken_chain_is_refused(name: str) -> None:
    report = (VECTORS / "h100-pcie-sample" / "report.bin").read_bytes()
    device = GpuEvidence(report=report, chain=(VECTORS / "negative" / name).read_bytes())
    appraisal = verify_gpu(device, SHOW_GPU, GpuExpected(), at=AFTER)
    assert appraisal.status == "contraindicated"
    assert NEGATIVE[name] <= {failure.check for failure in appraisal.failures}


def test_no_negative_vector_is_left_out() -> None:
    assert {path.name for path in (VECTORS / "negative").iterdir()} == set(NEGATIVE)


@pytest.mark.parametrize("path", RIMS, ids=[path.name for path in RIMS])
def test_a_real_manifest_is_accepted_in_its_time_alone(path: Path) -> None:
    verified = verify_rim(path.read_bytes())
    assert verified.failures == ()
    assert outside_validity(verified.certificates, IN_RIM_TIME) == ()
    assert outside_validity(verified.certificates, AFTER), "its signer ended in 2025"
    golden = verified.rim.golden
    assert golden
    assert all(len(value) == 48 for values in golden.values() for value in values)


@pytest.mark.parametrize("path", RIMS, ids=[path.name for path in RIMS])
def test_a_real_manifest_with_another_value_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    changed = raw.replace(b'index="1" active="True"', b'index="1" active="False"').replace(
        b'index="7" active="True"', b'index="7" active="False"'
    )
    assert changed != raw
    assert [failure.check for failure in verify_rim(changed).failures] == ["rim-signature"]
