"""The committed virtual evidence has the outcome that is written beside it, and the set can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from attestation.endorsements.chain import Endorsements
from attestation.evidence.report import REPORT_SIZE, SIGNED_SIZE, Product
from attestation.verifier import BROKER, Expected, load_profile, verify_snp
from attestation.virtual.chip import Chip
from attestation.virtual.vectors import VECTORS, write_vectors
from attestation.virtual.vendor import Vendor

FOLDER = Path(__file__).resolve().parents[2] / "vectors/virtual"
INDEX = json.loads((FOLDER / "vectors.json").read_bytes())


def endorsements(vector: dict[str, Any]) -> Endorsements:
    return Endorsements(
        vek=(FOLDER / vector["vek"]).read_bytes(),
        intermediates=tuple((FOLDER / name).read_bytes() for name in vector["chain"]),
        crls=((FOLDER / vector["crl"]).read_bytes(),),
    )


@pytest.mark.parametrize("vector", INDEX["vectors"], ids=lambda vector: vector["name"])
def test_the_outcome_is_the_one_beside_it(vector: dict[str, Any]) -> None:
    appraisal = verify_snp(
        (FOLDER / vector["report"]).read_bytes(),
        endorsements(vector),
        load_profile((FOLDER / INDEX["profile"]).read_text()),
        Expected(
            report_data=bytes.fromhex(vector["report-data"]),
            measurements=frozenset({bytes.fromhex(INDEX["measurement"])}),
            host_data=bytes.fromhex(INDEX["host-data"]),
        ),
        datetime.fromisoformat(vector["at"]),
    )
    failures = sorted(failure.check for failure in appraisal.failures)
    assert (appraisal.status, failures) == (vector["status"], vector["failures"])
    assert appraisal.claims["platform"] == "virtual"


@pytest.mark.parametrize("vector", INDEX["vectors"], ids=lambda vector: vector["name"])
def test_none_of_it_passes_for_hardware(vector: dict[str, Any]) -> None:
    report = (FOLDER / vector["report"]).read_bytes()
    appraisal = verify_snp(report, endorsements(vector), BROKER, Expected(), datetime.fromisoformat(vector["at"]))
    assert appraisal.status == "contraindicated"
    assert "trusted-root" in {failure.check for failure in appraisal.failures}


def test_the_set_holds_no_private_key_and_nothing_unlisted() -> None:
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    named = {"vectors.json", "profile.toml"}
    for vector in INDEX["vectors"]:
        named |= {vector["report"], vector["vek"], vector["crl"], *vector["chain"]}
    assert files == named
    assert not [name for name in files if b"PRIVATE" in (FOLDER / name).read_bytes()]


def test_the_set_can_be_made_again(virtual_vendor: Vendor, tmp_path: Path) -> None:
    write_vectors(tmp_path, virtual_vendor)
    assert json.loads((tmp_path / "vectors.json").read_bytes()) == INDEX
    for name, vector in VECTORS.items():
        again, kept = ((folder / f"reports/{name}.bin").read_bytes() for folder in (tmp_path, FOLDER))
        assert len(again) == REPORT_SIZE
        if 0x090 not in vector.unsigned:
            assert again[:SIGNED_SIZE] == kept[:SIGNED_SIZE]


def test_there_is_an_honest_report_of_each_product() -> None:
    honest = {vector.product for vector in VECTORS.values() if not vector.failures}
    assert honest == set(Product)


def test_chips_are_who_they_say(virtual_chips: Mapping[Product, Chip]) -> None:
    assert virtual_chips[Product.TURIN].chip_id[8:] == bytes(56)
    assert len({chip.chip_id for chip in virtual_chips.values()}) == 3
