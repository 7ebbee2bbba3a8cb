"""What wheels need, as it reads in the guest: its Python is not the one that pip runs on."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvm_image.build.errors import BuildFailed
from cvm_image.build.image import PROJECT
from cvm_image.build.lock import load_lock
from cvm_image.build.requirements import guest_environment, needed_by, read_requirements

GUEST = guest_environment("3.13")
WHEELS = {
    "torch": ['setuptools; python_version >= "3.12"', 'old; python_version < "3.12"', "numpy", "opt; extra == 'opt'"],
    "setuptools": [],
    "old": [],
    "numpy": ["never-asked"],
    "httpx": ["h2 (>=4) ; extra == 'http2'", 'colorama; sys_platform == "win32"'],
    "h2": ["httpx"],
}


def test_conditions_are_read_by_the_guest_s_python() -> None:
    assert needed_by(["torch==2.6.0"], WHEELS, GUEST, ["numpy"]) == ({"torch", "setuptools"}, [])
    older = guest_environment("3.11")
    assert needed_by(["torch"], WHEELS, older, ["numpy"]) == ({"torch", "old"}, [])


def test_what_is_not_there_is_asked_for_without_its_condition() -> None:
    """The condition holds in the guest; pip, on another Python, would leave it out once more."""
    less = {name: needs for name, needs in WHEELS.items() if name != "setuptools"}
    assert needed_by(["torch"], less, GUEST, ["numpy"]) == ({"torch"}, ["setuptools"])


def test_extras_are_followed_where_they_are_asked_for_and_rings_end() -> None:
    assert needed_by(["httpx"], WHEELS, GUEST, []) == ({"httpx"}, [])
    assert needed_by(["HTTPX[http2]"], WHEELS, GUEST, []) == ({"httpx", "h2"}, [])


@pytest.mark.parametrize("line", ["", "a b", 'x; python_version < "three" and', "x; color == 'red'"])
def test_a_requirement_that_cannot_be_read_ends_the_lock(line: str) -> None:
    with pytest.raises(BuildFailed, match="cannot be read"):
        needed_by(["a"], {"a": [line]}, GUEST, [])


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_wheel_tells_what_it_needs(tmp_path: Path) -> None:
    text = b"Metadata-Version: 2.1\nName: a\nRequires-Dist: b>=1\nRequires-Dist: c; extra == 'x'\n\nRequires-Dist: d\n"
    made = wheel(tmp_path / "a-1-py3-none-any.whl", {"a-1.dist-info/METADATA": text, "a/x.dist-info/METADATA": b""})
    assert read_requirements(made) == ("b>=1", "c; extra == 'x'")


@pytest.mark.parametrize("files", [{}, {"a.dist-info/METADATA": b"x" * ((1 << 20) + 1)}])
def test_a_wheel_without_metadata_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(BuildFailed, match="no metadata"):
        read_requirements(wheel(tmp_path / "a.whl", files))


@given(raw=st.binary(max_size=200))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("wheel") / "a.whl"
    path.write_bytes(raw)
    with pytest.raises(BuildFailed):
        read_requirements(path)


@pytest.mark.parametrize("name", ["fl", "fl-gpu"])
def test_the_locks_hold_what_their_wheels_need(name: str) -> None:
    """As far as it shows without the wheels: torch for Python 3.12 and later needs setuptools beside it."""
    wheels = {one.name for one in load_lock(PROJECT / "cvm_image/recipes" / f"{name}.toml", name, "trixie").wheels}
    assert "torch" not in wheels or "setuptools" in wheels
