"""The page of checks is what the code says, and says of every check what it is, and what it is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.verifier.check import CHECKS
from attestation.verifier.checks_page import COMPARED_WITH, PEERS, page
from attestation.verifier.profile import SHOW
from attestation.verifier.profile_toml import profile_to_toml

PAGE = Path(__file__).parents[3] / "docs/reference/checks.md"


def test_the_page_is_what_the_code_prints() -> None:
    assert PAGE.read_text() == page(), "run: python -m attestation.verifier.checks_page > docs/reference/checks.md"


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_says_its_rule_its_attack_and_its_peers(name: str) -> None:
    one = CHECKS[name]
    rule, _, attack = " ".join(one.rule.split()).partition(" Attack: ")
    assert rule.endswith(".")
    assert attack.endswith(".")
    marks = one.peers.split()
    assert len(marks) == len(PEERS)
    assert set(marks) <= set("Yoc-!")
    assert f"| `{name}` |" in page()


def test_the_settings_named_on_the_page_are_in_a_profile() -> None:
    text = profile_to_toml(SHOW)
    for name, place in COMPARED_WITH.items():
        assert name in CHECKS
        setting = place.partition(",")[0].rpartition(".")[2]
        if setting != "the caller":
            assert setting in text, place
