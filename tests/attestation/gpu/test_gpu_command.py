"""`seal evidence` with GPU evidence: what it prints, its exit status, one sentence for what cannot be used."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import nvidia_world as world
import pytest

from appliance.cli import main
from attestation.evidence.gpu.document import write_gpu_document
from attestation.verifier.gpu.profile import BROKER_GPU, load_gpu_profile
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml

DEVICE = world.make_device()
AT = "2026-06-01T00:00:00Z"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPU evidence with everything beside it, and a profile that trusts the tests' roots."""
    folder = tmp_path_factory.mktemp("gpu")
    device = world.evidence(DEVICE)
    (folder / "report.bin").write_bytes(device.report)
    (folder / "cert_chain.pem").write_bytes(device.chain)
    (folder / "evidence.json").write_bytes(write_gpu_document((device,)))
    (folder / "bundle.json").write_bytes(world.nras_bundle())
    (folder / "jwks.json").write_bytes(world.jwks())
    (folder / "rims").mkdir()
    (folder / "rims/driver.swidtag").write_bytes(world.driver_rim())
    (folder / "rims/vbios.swidtag").write_bytes(world.vbios_rim())
    for number, raw in enumerate(world.device_ocsp(DEVICE) + world.rim_ocsp()):
        (folder / f"{number}.ocsp").write_bytes(raw)
    (folder / "policy.toml").write_text(gpu_profile_to_toml(world.profile()))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["evidence", *map(str, words)])
    printed = capsys.readouterr()
    code = stopped.value.code or 0
    assert isinstance(code, int)
    return code, printed.out, printed.err


def test_a_report_with_everything_is_affirmed(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    lists = [word for number in range(6) for word in ("--crl", files / f"{number}.ocsp")]
    options = ("--chain", files / "cert_chain.pem", "--rim", files / "rims", "--policy", files / "policy.toml", *lists)
    nonce = ("--nonce", world.NONCE.hex(), "--at", AT)
    status, out, err = run(capsys, "verify", files / "report.bin", *options, *nonce, "--json")
    verdict = json.loads(out)
    assert (status, err, verdict["status"], verdict["not-judged"]) == (0, "", "affirming", [])
    assert set(verdict) == {"status", "failures", "not-judged", "claims", "trustworthiness-vector"}
    assert verdict["trustworthiness-vector"]["executables"] == 3
    status, out, _ = run(capsys, "verify", files / "report.bin", *options, *nonce)
    assert status == 0
    assert "GH100" in out


def test_a_document_of_another_session_is_refused(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    options = ("--policy", files / "policy.toml", "--at", AT, "--report-data", "00" * 64)
    status, out, _ = run(capsys, "verify", files / "evidence.json", *options, "--json")
    assert status == 1
    assert [failure["check"] for failure in json.loads(out)["failures"]] == ["gpu-freshness"]
    status, out, _ = run(capsys, "verify", files / "evidence.json", *options)
    assert status == 1
    assert "gpu-freshness" in out


def test_unknown_roots_are_refused_by_default(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, out, _ = run(capsys, "verify", files / "evidence.json", "--at", AT, "--json")
    assert status == 1
    assert [failure["check"] for failure in json.loads(out)["failures"]] == ["gpu-trusted-root"]


def test_service_tokens(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    options = ("--jwks", files / "jwks.json", "--nonce", world.NONCE.hex(), "--at", AT, "--json")
    status, out, _ = run(capsys, "verify", files / "bundle.json", *options)
    assert (status, json.loads(out)["status"]) == (0, "affirming")
    status, out, _ = run(capsys, "verify", files / "bundle.json", *options[2:])
    assert (status, set(json.loads(out))) == (2, {"error"})


@pytest.mark.parametrize(
    "words",
    [
        ("report.bin",),
        ("evidence.json", "--nonce", "00"),
        ("evidence.json", "--nonce", "00" * 32, "--report-data", "00" * 64),
        ("evidence.json", "--policy", "evidence.json"),
        ("evidence.json", "--rim", "report.bin"),
        ("evidence.json", "--crl", "report.bin"),
        ("report.bin", "--chain", "evidence.json"),
    ],
)
def test_what_cannot_be_used_is_told(capsys: pytest.CaptureFixture[str], files: Path, words: tuple[str, ...]) -> None:
    named = [str(files / word) if (files / word).exists() else word for word in words]
    status, out, _ = run(capsys, "verify", *named, "--json")
    assert status == 2
    assert set(json.loads(out)["error"]) == {"what", "where", "do"}


def test_show_prints_every_claim(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, out, _ = run(capsys, "show", files / "evidence.json", "--json")
    shown = json.loads(out)
    assert (status, shown["verified"], shown["claims"]["driver_version"]) == (0, False, world.DRIVER)
    status, out, _ = run(capsys, "show", files / "evidence.json")
    assert status == 0
    assert world.VBIOS in out
    assert "Not verified" in out
    status, out, _ = run(capsys, "show", files / "bundle.json")
    assert "measres" in out


def test_the_ready_made_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "policy", "--profile", "broker-gpu")
    assert load_gpu_profile(out) == BROKER_GPU
    assert tomllib.loads(out)["checks"]["gpu-topology"] == "refuse"
    _, out, _ = run(capsys, "policy", "--profile", "show-gpu", "--json")
    assert json.loads(out)["name"] == "show-gpu"
