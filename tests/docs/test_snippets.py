"""Every command and snippet in the documentation runs, or is named here with the place that runs it.

A page's ```sh and ```python blocks run in order, in one folder of their own that holds a copy of `examples/`, with the
project's own commands first on PATH. A block after a line that says `needs SNP` or `needs a GPU` is not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UNSEEN = re.compile(r"needs (SNP|a GPU)", re.IGNORECASE)
SECONDS = 120

RUN_ELSEWHERE = {
    "make": "by .ci/run, which uses the same Makefile",
    ".venv/bin/seal audit verify build/demo/audit --trust build/demo/root.json": "by tests/appliance/test_demo.py",
}
"""First words of commands that a block may hold without being run here, and who runs them."""


CEREMONIES = {
    "let-a-member-leave.md",
    "recover-a-vault.md",
    "refuse-a-firmware-version.md",
    "replace-a-broker.md",
    "replace-a-lost-key.md",
    "run-a-broker.md",
    "run-a-witness.md",
    "withdraw-an-image.md",
}
"""Pages whose commands take long: found a consortium each, and go through one ceremony of it."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """The page's blocks that can run here: (language, text), commands run elsewhere taken out."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        if UNSEEN.search(before):
            continue
        lines = [line for line in match[2].splitlines() if not any(line.startswith(start) for start in RUN_ELSEWHERE)]
        if any(line.strip() for line in lines):
            found.append((match[1], "\n".join(lines)))
    return found


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.long] if page.name in CEREMONIES else [],
        )
        for page in PAGES
        if blocks(page)
    ],
)
def test_the_page_s_blocks_run(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "HOME": str(tmp_path),
    }
    for language, text in blocks(page):
        argv = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        result = subprocess.run(
            argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert result.returncode == 0, f"{page.name}:\n{text}\n--- said\n{result.stdout}{result.stderr}"


def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_every_test_that_a_page_names_exists() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {path}::{name}"
        for page in PAGES
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", page.read_text())
        if not (ROOT / path).exists() or f"def {name}(" not in (ROOT / path).read_text()
    ]
    assert not missing


def test_every_row_of_the_threat_model_names_a_test() -> None:
    page = ROOT / "docs/explanation/threat-model.md"
    rows = [
        line for line in page.read_text().splitlines() if line.startswith("| ") and not line.startswith("| attempt")
    ]
    assert len(rows) >= 40
    assert [row for row in rows if "`tests/" not in row.split("|")[-2]] == []


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site/explanation/threat-model/index.html").exists()
