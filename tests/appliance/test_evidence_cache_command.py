"""`seal evidence preload` and `fetch`: a cache filled once, and verdicts out of it without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from kds_service import chain, revocation_list, serving, vcek

from appliance.cli import main
from attestation.endorsements.kds_urls import chain_path, crl_path, vcek_path
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report

MILAN = Product.MILAN


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["evidence", *map(str, words)])
    printed = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, printed.out, printed.err


def test_a_cache_is_preloaded_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/vcek.der").write_bytes(vcek())
    (tmp_path / "source/chain.pem").write_bytes(chain())
    status, out, _ = run(capsys, "preload", tmp_path / "source", "--cache", tmp_path / "cache", "--json")
    assert status == 0
    stored = json.loads(out)["stored"]
    assert "vcek/Milan/cert_chain.pem" in stored
    assert all((tmp_path / "cache" / name).is_file() for name in stored)
    status, out, _ = run(capsys, "preload", tmp_path / "source", "--cache", tmp_path / "cache")
    assert status == 0
    assert out.splitlines() == stored


def test_a_source_without_endorsements_is_unusable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no certificate")
    for source in (tmp_path / "notes.txt", tmp_path / "missing"):
        status, out, err = run(capsys, "preload", source, "--cache", tmp_path / "cache")
        assert (status, out) == (2, "")
        assert err.startswith("seal: ")


def test_a_report_is_endorsed_by_the_service_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, virtual_chips: Mapping[Product, Chip]
) -> None:
    chip = virtual_chips[MILAN]
    (tmp_path / "report.bin").write_bytes(sign_report(chip))
    answers = {
        vcek_path(MILAN, chip.chip_id, chip.tcb): (200, {}, vcek(chip.chip_id, chip.tcb)),
        chain_path("vcek", MILAN): (200, {}, chain()),
        crl_path("vcek", MILAN): (200, {}, revocation_list()),
    }
    with serving(answers) as service:
        options = ("--cache", tmp_path / "cache", "--service", service, "--json")
        status, out, _ = run(capsys, "fetch", tmp_path / "report.bin", *options)
    assert status == 0
    assert len(json.loads(out)["stored"]) == 3
    status, out, _ = run(capsys, "fetch", tmp_path / "report.bin", *options)  # the service is gone: not asked again
    assert status == 0
    status, out, _ = run(capsys, "verify", tmp_path / "report.bin", "--cache", tmp_path / "cache", "--json")
    assert status == 1
    failures = {failure["check"] for failure in json.loads(out)["failures"]}
    assert "trusted-root" in failures  # found, and not believed: it is no key of AMD's
    assert "vek-profile" in failures
    assert json.loads(out)["claims"]["hwid"] == chip.chip_id.hex()


def test_a_cache_that_cannot_be_made_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "vcek.der").write_bytes(vcek())
    (tmp_path / "file").touch()
    status, out, err = run(capsys, "preload", tmp_path / "vcek.der", "--cache", tmp_path / "file")
    assert (status, out) == (2, "")
    assert "the cache cannot be used" in err
    assert err.count("\n") == 1


def test_an_old_report_needs_its_product(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, virtual_chips: Mapping[Product, Chip]
) -> None:
    (tmp_path / "report.bin").write_bytes(sign_report(virtual_chips[MILAN], version=2))
    status, _, err = run(capsys, "fetch", tmp_path / "report.bin", "--cache", tmp_path / "cache")
    assert status == 2
    assert "does not name its processor" in err


def test_an_unreachable_service_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, virtual_chips: Mapping[Product, Chip]
) -> None:
    (tmp_path / "report.bin").write_bytes(sign_report(virtual_chips[MILAN]))
    options = ("--cache", tmp_path / "cache", "--service", "http://127.0.0.1:9")
    status, out, err = run(capsys, "fetch", tmp_path / "report.bin", *options)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "does not answer" in err
