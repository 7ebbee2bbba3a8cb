"""The demonstration replaces its own folder and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.demo.setting import MARK, claim_folder
from policies.errors import Unusable


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("three years of work")
    with pytest.raises(Unusable, match="no demonstration's"):
        claim_folder(tmp_path)
    assert thesis.read_text() == "three years of work"


def test_a_file_and_a_link_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / MARK).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(Unusable, match="this is no folder"):
            claim_folder(tmp_path / name)
    assert (tmp_path / "target" / MARK).exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unusable, match="cannot be made"):
        claim_folder(tmp_path / "file" / "below")


def test_its_own_folder_and_an_empty_one_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with claim_folder(folder):
            (folder / "left-over").write_text("x")
        with claim_folder(folder):
            assert [path.name for path in folder.iterdir()] == [MARK]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with claim_folder(tmp_path / "demo"):
        (tmp_path / "demo" / "running").write_text("x")
        with pytest.raises(Unusable, match="another demonstration runs"):
            claim_folder(tmp_path / "demo")
        assert (tmp_path / "demo" / "running").exists()
