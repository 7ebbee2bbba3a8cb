"""The fuzz targets of SEV-SNP evidence hold for good evidence and for simple damage, without a fuzzer."""

from __future__ import annotations

import pytest
from snp_seeds import SEEDS
from snp_targets import TARGETS

from attestation.canonical import read_json_object
from attestation.evidence.azure_json import parse_azure_evidence
from attestation.evidence.guest_components_json import parse_guest_components


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


def test_the_json_seeds_are_good() -> None:
    components, azure = (read_json_object(seed, where="seed", limit=1 << 20) for seed in SEEDS["json-evidence"]())
    assert len(parse_guest_components(components).report) == 1184
    assert parse_azure_evidence(azure).quote is not None


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_good_and_damaged_evidence(name: str) -> None:
    for seed in SEEDS[name]()[:4]:
        for damaged in (seed, seed[:-1], seed[1:], seed + b"\0", b"", seed.replace(b"A", b"\xff"), seed * 2):
            TARGETS[name](damaged)
        for position in range(0, len(seed), max(1, len(seed) // 40)):
            TARGETS[name](seed[:position] + bytes([seed[position] ^ 0x55]) + seed[position + 1 :])
