"""The page of GPU checks is what the code says, and names settings that exist."""

from __future__ import annotations

from pathlib import Path

from attestation.verifier.gpu.checks_page import COMPARED_WITH, page
from attestation.verifier.gpu.nras import NRAS_CHECKS
from attestation.verifier.gpu.profile import SHOW_GPU
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml
from attestation.verifier.gpu.verify import ORDERED

PAGE = Path(__file__).parents[3] / "docs/reference/gpu-checks.md"


def test_the_page_is_what_the_code_prints() -> None:
    command = "python -m attestation.verifier.gpu.checks_page > docs/reference/gpu-checks.md"
    assert PAGE.read_text() == page(), f"run: {command}"


def test_every_check_is_on_the_page() -> None:
    for name in (*(one.name for one in ORDERED), *NRAS_CHECKS):
        assert f"| `{name}` |" in page()


def test_the_settings_named_on_the_page_are_in_a_profile() -> None:
    text = gpu_profile_to_toml(SHOW_GPU)
    for name, places in COMPARED_WITH.items():
        assert name in {one.name for one in ORDERED} | set(NRAS_CHECKS)
        for place in places.split(", "):
            if not place.startswith("the "):
                assert place.rpartition(".")[2] in text, place
