"""GPU evidence out of files: what is recognised, and where its chain, manifests and revocation data come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nvidia_world as world
import pytest

from attestation.errors import MalformedEndorsement, MalformedEvidence, MalformedProfile
from attestation.evidence.gpu.document import write_gpu_document
from attestation.evidence.gpu.kinds import is_gpu_evidence, looks_like_nras_bundle
from attestation.verifier.appraisal import Appraisal
from attestation.verifier.gpu.files import GpuFiles, appraise_gpu_file, read_revocation, spdm_nonce
from attestation.verifier.gpu.profile import BROKER_GPU, SHOW_GPU, load_gpu_profile
from policies.errors import Unusable

DEVICE = world.make_device()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A report with everything beside it."""
    device = world.evidence(DEVICE)
    (tmp_path / "report.bin").write_bytes(device.report)
    (tmp_path / "cert_chain.pem").write_bytes(device.chain)
    (tmp_path / "evidence.json").write_bytes(write_gpu_document((device,)))
    (tmp_path / "bundle.json").write_bytes(world.nras_bundle())
    (tmp_path / "jwks.json").write_bytes(world.jwks())
    (tmp_path / "driver.swidtag").write_bytes(world.driver_rim())
    (tmp_path / "vbios.xml").write_bytes(world.vbios_rim())
    for number, raw in enumerate(world.device_ocsp(DEVICE) + world.rim_ocsp()):
        (tmp_path / f"{number}.ocsp").write_bytes(raw)
    (tmp_path / "list.pem").write_bytes(world.revocation_list(DEVICE.chain[2], "ica"))
    return tmp_path


def appraise(path: Path, **options: Any) -> Appraisal:
    nonce = options.pop("nonce", world.NONCE)
    profile = options.pop("profile", None) or world.profile()
    return appraise_gpu_file(path, GpuFiles(**options), profile, nonce=nonce, at=world.AT)


def test_a_report_with_everything_beside_it(folder: Path) -> None:
    revocation = tuple(sorted(folder.glob("*.ocsp")))
    appraisal = appraise(folder / "report.bin", chain=folder, revocation=revocation)
    assert (appraisal.status, appraisal.failures, appraisal.not_judged) == ("affirming", (), ())


def test_a_report_with_its_chain_alone(folder: Path) -> None:
    appraisal = appraise(folder / "report.bin", chain=folder / "cert_chain.pem", nonce=None)
    assert appraisal.status == "affirming"
    assert "gpu-driver-measurements" in appraisal.not_judged


def test_a_document_and_named_manifests(folder: Path) -> None:
    appraisal = appraise(folder / "evidence.json", rims=(folder / "driver.swidtag", folder / "vbios.xml"))
    assert appraisal.status == "affirming"
    assert "gpu-driver-measurements" not in appraisal.not_judged
    assert appraise(folder / "evidence.json", rims=(folder,)).to_json() == appraisal.to_json()


def test_a_bundle_with_its_keys(folder: Path) -> None:
    assert appraise(folder / "bundle.json", jwks=folder / "jwks.json").status == "affirming"
    with pytest.raises(Unusable, match="keys"):
        appraise(folder / "bundle.json")


def test_report_data_begins_with_the_nonce(folder: Path) -> None:
    assert appraise(folder / "evidence.json", nonce=world.NONCE + bytes(32)).status == "affirming"
    assert appraise(folder / "evidence.json", nonce=bytes(64)).status == "contraindicated"
    with pytest.raises(Unusable, match="no SPDM nonce"):
        spdm_nonce(bytes(31))


def test_what_is_missing_or_broken_is_told(folder: Path) -> None:
    with pytest.raises(Unusable, match="needs its certificate chain"):
        appraise(folder / "report.bin")
    with pytest.raises(MalformedEvidence):
        appraise(folder / "cert_chain.pem")
    with pytest.raises(MalformedEndorsement):
        appraise(folder / "report.bin", chain=folder / "report.bin")
    with pytest.raises(Unusable, match="no such"):
        appraise(folder / "none.bin")
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(Unusable, match="no manifest"):
        appraise(folder / "evidence.json", rims=(empty,))
    (folder / "big").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(Unusable, match="larger"):
        appraise(folder / "big")


def test_revocation_data_is_told_apart(folder: Path) -> None:
    data = read_revocation((folder / "list.pem", folder / "0.ocsp"))
    assert (len(data.crls), len(data.ocsp)) == (1, 1)
    with pytest.raises(Unusable):
        read_revocation((folder / "list.pem",) * 100)


def test_what_is_taken_for_gpu_evidence(folder: Path) -> None:
    for name in ("report.bin", "evidence.json", "bundle.json"):
        assert is_gpu_evidence((folder / name).read_bytes()), name
    listed = b"\n[ " + (folder / "evidence.json").read_bytes() + b"]"
    assert is_gpu_evidence(listed)
    assert not looks_like_nras_bundle(listed)
    assert looks_like_nras_bundle(b' [ ["JWT", "x"], {}]')
    snp_report = (3).to_bytes(4, "little") + bytes(1180)
    for other in (snp_report, b"", b'{"attestation_report": {}, "cert_chain": null}', b"\x11\xe1"):
        assert not is_gpu_evidence(other)


def test_profiles_are_read_strictly() -> None:
    profile = load_gpu_profile('name = "mine"\n[checks]\ngpu-board = "warn"\n[devices]\nboards = ["G520/0200/885"]\n')
    assert profile.severity("gpu-board") == "warn"
    assert profile.severity("gpu-report-signature") == "refuse"
    assert profile.device_roots == SHOW_GPU.device_roots
    for text in (
        "x",
        "unknown = 1",
        "[checks]\ngpu-report-signature = 'allow'",
        "device-roots = []",
        "required = ['x']",
    ):
        with pytest.raises(MalformedProfile):
            load_gpu_profile(text)
    with pytest.raises(MalformedProfile, match="characters"):
        load_gpu_profile("#" * (1 << 21))
    assert set(BROKER_GPU.required) <= set(BROKER_GPU.model_dump(by_alias=True)["checks"])
    json.dumps(BROKER_GPU.model_dump(by_alias=True, mode="json"))
