"""`seal evidence`: what it prints, its exit status, one sentence for what cannot be used, and a quick start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from virtual_hcl import Paravisor

from appliance.cli import main
from attestation.endorsements.roots import RootPin
from attestation.evidence.id_block import IdBlock, encode_id_block, sign_id_block
from attestation.evidence.report import Product
from attestation.verifier import SHOW, load_profile, with_virtual_roots
from attestation.verifier.profile_toml import profile_to_toml
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor

NONCE = bytes(range(16))


@pytest.fixture(scope="module")
def files(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A report with its certificates and a profile that trusts the virtual vendor."""
    folder = tmp_path_factory.mktemp("evidence")
    chip = virtual_chips[Product.TURIN]
    authority = virtual_vendor.authority(Product.TURIN)
    (folder / "report.bin").write_bytes(sign_report(chip, report_data=NONCE.ljust(64, b"\0")))
    (folder / "vcek.der").write_bytes(chip.vcek)
    (folder / "chain").mkdir()
    (folder / "chain/ask.der").write_bytes(authority.ask)
    (folder / "chain/ark.der").write_bytes(authority.ark)
    (folder / "chain/notes.txt").write_text("not a certificate")
    (folder / "list.crl").write_bytes(authority.crl)
    pins = [RootPin(product, one.ark_spki_sha256, virtual=True) for product, one in virtual_vendor.authorities.items()]
    (folder / "policy.toml").write_text(profile_to_toml(with_virtual_roots(SHOW, pins)))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["evidence", *map(str, words)])
    printed = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, printed.out, printed.err


def verify(capsys: pytest.CaptureFixture[str], files: Path, *more: str | Path) -> tuple[int, Any]:
    options = ("--vek", files / "vcek.der", "--chain", files / "chain", "--policy", files / "policy.toml")
    status, out, err = run(capsys, "verify", files / "report.bin", *options, *more, "--json")
    assert err == ""
    return status, json.loads(out)


def test_an_honest_report_is_affirmed(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, verdict = verify(capsys, files)
    assert status == 0
    assert verdict["status"] == "affirming"
    assert verdict["failures"] == []
    assert verdict["claims"]["platform"] == "virtual"
    assert {"freshness", "measurement", "revocation"} <= set(verdict["not-judged"])


def test_nonce_report_data_and_list_are_judged(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, verdict = verify(capsys, files, "--nonce", NONCE.hex(), "--crl", files / "list.crl")
    assert status == 0
    assert not {"freshness", "revocation"} & set(verdict["not-judged"])
    assert verdict["trustworthiness-vector"]["instance-identity"] == 2
    status, _ = verify(capsys, files, "--report-data", NONCE.hex() + "00" * 48)
    assert status == 0
    status, verdict = verify(capsys, files, "--nonce", "ff")
    assert status == 1
    assert [failure["check"] for failure in verdict["failures"]] == ["freshness"]
    assert set(verdict["failures"][0]) == {"check", "value", "expected"}


def test_the_time_of_verification_counts(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    later = (datetime.now(UTC) + timedelta(days=366 * 8)).strftime("%Y-%m-%dT%H:%M:%SZ")
    status, verdict = verify(capsys, files, "--at", later)
    assert status == 1
    assert [failure["check"] for failure in verdict["failures"]] == ["certificate-validity"]


def test_virtual_evidence_is_no_hardware(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    options = ("--vek", files / "vcek.der", "--chain", files / "chain")
    status, out, _ = run(capsys, "verify", files / "report.bin", *options, "--json")
    assert status == 1
    assert [failure["check"] for failure in json.loads(out)["failures"]] == ["trusted-root"]


def test_without_a_key_there_is_no_verdict(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, out, _ = run(capsys, "verify", files / "report.bin", "--json")
    assert status == 1
    assert json.loads(out)["status"] == "none"


def test_a_person_reads_the_reasons(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    options = ("--vek", files / "vcek.der", "--chain", files / "chain", "--policy", files / "policy.toml")
    status, out, _ = run(capsys, "verify", files / "report.bin", *options)
    assert status == 0
    assert "affirming" in out
    assert "(virtual platform)" in out
    assert "no --nonce" in out
    status, out, _ = run(capsys, "verify", files / "report.bin", *options, "--nonce", "ff")
    assert status == 1
    assert "contraindicated" in out
    assert "freshness" in out
    assert "Nobody vouches" not in out
    status, out, _ = run(capsys, "verify", files / "report.bin", *options[:4])
    assert status == 1
    assert "Nobody vouches for what follows" in out


def test_show_decodes_every_field(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    status, out, _ = run(capsys, "show", files / "report.bin", "--vek", files / "vcek.der")
    assert status == 0
    for words in ("Turin", "virtual", "fmc 1, bootloader 1", "0x30000", "alias-check", "all ones", "Not verified"):
        assert words in out
    status, out, _ = run(capsys, "show", files / "report.bin", "--json")
    assert status == 0
    shown = json.loads(out)
    assert shown["verified"] is False
    assert shown["claims"]["product"] == "Turin"


def test_an_id_block_is_judged(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    block = encode_id_block(IdBlock(bytes(48), bytes(16), bytes(16), 0, 0x30000))
    (tmp_path / "id-block").write_bytes(block)
    (tmp_path / "id-auth").write_bytes(sign_id_block(block, key, None))
    status, verdict = verify(capsys, files, "--id-block", tmp_path / "id-block", tmp_path / "id-auth")
    assert status == 1
    assert [failure["check"] for failure in verdict["failures"]] == ["id-block"]


def test_azures_wrapper_is_shown_and_verified(
    capsys: pytest.CaptureFixture[str], files: Path, virtual_chips: Mapping[Product, Chip], tmp_path: Path
) -> None:
    paravisor = Paravisor(virtual_chips[Product.TURIN], rsa.generate_private_key(65537, 2048))
    (tmp_path / "hcl.bin").write_bytes(paravisor.blob())
    options = ("--vek", files / "vcek.der", "--chain", files / "chain", "--policy", files / "policy.toml")
    status, out, _ = run(capsys, "verify", tmp_path / "hcl.bin", *options, "--json")
    assert status == 0
    assert "vtpm-quote" in json.loads(out)["not-judged"]
    status, out, _ = run(capsys, "verify", tmp_path / "hcl.bin", *options, "--nonce", NONCE.hex(), "--json")
    assert status == 1
    assert [failure["check"] for failure in json.loads(out)["failures"]] == ["freshness"]
    status, out, _ = run(capsys, "show", tmp_path / "hcl.bin")
    assert "secure-boot" in out
    assert "none: not fresh" in out


@pytest.mark.parametrize("name", ["show", "broker"])
def test_policy_prints_a_profile_to_start_from(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, "policy", "--profile", name)
    assert status == 0
    assert load_profile(out).name == name
    status, out, _ = run(capsys, "policy", "--profile", name, "--json")
    assert status == 0
    assert json.loads(out)["checks"]["policy-debug"] == "refuse"


def unusable(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Both forms of an error: one sentence on standard error, or one object on standard output."""
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("seal: ")
    assert err.count("\n") == 1
    status, out, err = run(capsys, *words, "--json")
    assert (status, err) == (2, "")
    body = json.loads(out)["error"]
    assert set(body) == {"what", "where", "do"}
    return str(body["what"])


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_what_is_no_evidence_is_unusable(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    (tmp_path / "text").write_text("Dear verifier,\n")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(bytes(1183))
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "fields.json").write_text('{"attestation_report": {}}')
    assert "has 15" in unusable(capsys, verb, tmp_path / "text")
    assert "empty" in unusable(capsys, verb, tmp_path / "empty")
    assert "1183" in unusable(capsys, verb, tmp_path / "short")
    assert "directory" in unusable(capsys, verb, tmp_path)
    assert "no such" in unusable(capsys, verb, tmp_path / "missing")
    assert "no evidence of a known kind" in unusable(capsys, verb, tmp_path / "object.json")
    assert "no JSON" in unusable(capsys, verb, tmp_path / "broken.json")
    assert "version" in unusable(capsys, verb, tmp_path / "fields.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nonce", "xyz"), "hex"),
        (("--nonce", "abc"), "hex"),
        (("--nonce", ""), "hex"),
        (("--nonce", "00" * 65), "hex"),
        (("--report-data", "00"), "64 bytes"),
        (("--nonce", "00", "--report-data", "00" * 64), "exclude"),
        (("--at", "yesterday"), "RFC 3339"),
        (("--at", "2026-01-01T00:00:00"), "RFC 3339"),
        (("--at", "9999-12-31T23:59:59-14:00"), "RFC 3339"),
        (("--cache", "vcek.bin"), "cache cannot be used"),
        (("--chain", "vcek.bin/chain"), "certificate file"),
        (("--vek", "report.bin"), "certificate"),
        (("--vek", "missing"), "no such"),
        (("--chain", "."), "0 certificate files"),
        (("--crl", "vcek.bin"), "revocation list"),
        (("--policy", "report.bin"), "UTF-8"),
        (("--policy", "vcek.bin"), "UTF-8"),
        (("--no-such-option",), "option"),
    ],
)
def test_unusable_options_are_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "report.bin").write_bytes((files / "report.bin").read_bytes())
    (tmp_path / "vcek.bin").write_bytes((files / "vcek.der").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert words in unusable(capsys, "verify", "report.bin", *options)


def test_nothing_heavy_is_imported(files: Path) -> None:
    """A verdict in a blink: neither torch nor gRPC, no HTTP, no database."""
    code = (
        "import sys; from appliance.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'grpc', 'numpy', 'aiohttp', 'sqlalchemy', 'tuf', 'urllib3', 'lxml', 'regopy'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    words = ["evidence", "verify", str(files / "report.bin"), "--vek", str(files / "vcek.der")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_is_affirmed(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples/evidence"
    options = ("--vek", example / "vcek.pem", "--chain", example / "authorities", "--crl", example / "revoked.crl")
    status, out, _ = run(
        capsys, "verify", example / "report.bin", *options, "--policy", example / "profile.toml", "--json"
    )
    assert status == 0
    assert json.loads(out)["claims"]["platform"] == "virtual"
