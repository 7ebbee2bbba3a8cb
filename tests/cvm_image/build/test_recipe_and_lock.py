"""Recipes and locks are read strictly, and written one way."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvm_image.build.errors import UnusableLock, UnusableRecipe
from cvm_image.build.lock import Lock, LockedPackage, load_lock, lock_path, read_lock, write_lock
from cvm_image.build.modules import sign_modules
from cvm_image.build.provenance import read_source
from cvm_image.build.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "cvm_image" / "recipes"

MINIMAL = """
name = "tiny"
init = "/usr/lib/sealwright/init"
"""


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def package(name: str, digest: str = "a") -> LockedPackage:
    return LockedPackage(
        name=name,
        version="1:2.0~rc1-1+b2",
        architecture="amd64",
        archive="debian",
        path=f"pool/main/t/{name}/{name}_2.0%7erc1-1_amd64.deb",
        size=10,
        sha256=digest * 64,
    )


def lock_of(*base: LockedPackage) -> Lock:
    return Lock(recipe="tiny", suite="trixie", epoch=1, tools=[], firmware=[], kernel=[], base=list(base), wheels=[])


def test_what_a_recipe_leaves_open_has_the_strict_value(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL))
    assert recipe.variant == "hardware"
    assert recipe.network.inbound == ()
    assert recipe.mirrors == {"debian": "host", "debian-security": "host"}
    assert load_recipe(recipe_file(tmp_path, MINIMAL), variant="virtual").variant == "virtual"


@pytest.mark.parametrize(
    "line",
    [
        'inti = "/x"',
        'variant = "both"',
        '[base]\npackages = ["$(reboot)"]',
        '[base]\nremove = ["../etc/passwd"]',
        '[workload]\nfiles = "/etc"',
        '[workload]\nfiles = "a/../../b"',
        '[kernel]\narguments = ["two words"]',
        "[network]\ninbound = [0]",
        "[launch]\nvcpus = [0]",
    ],
)
def test_a_recipe_with_a_wrong_field_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UnusableRecipe):
        load_recipe(recipe_file(tmp_path, MINIMAL + line + "\n"))


def test_a_recipe_that_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableRecipe, match="no TOML"):
        load_recipe(recipe_file(tmp_path, "name = "))
    with pytest.raises(UnusableRecipe, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")


def test_a_recipe_says_what_differs_from_the_one_it_is_based_on(tmp_path: Path) -> None:
    base = MINIMAL + '[base]\npackages = ["python3"]\nprograms = ["python3"]\n'
    (tmp_path / "other.toml").write_text(base.replace("tiny", "other"))
    path = recipe_file(tmp_path, 'based_on = "other.toml"\nname = "tiny"\n[base]\npackages = ["busybox"]\n')
    recipe = load_recipe(path)
    assert (recipe.name, recipe.init) == ("tiny", "/usr/lib/sealwright/init")
    assert (recipe.base.packages, recipe.base.programs) == (("busybox",), ("python3",))
    source = read_source(recipe, path)
    assert source.bases == {"other.toml": (tmp_path / "other.toml").read_bytes()}
    for wrong in ("../other.toml", "/other.toml", "none.toml", "tiny.toml", 7):
        text = f"based_on = {wrong!r}\nname = 'tiny'\n"
        with pytest.raises(UnusableRecipe):
            load_recipe(recipe_file(tmp_path, text))


def test_a_lock_is_read_only_as_it_is_written() -> None:
    lock = lock_of(package("zlib1g"), package("bash"))
    text = write_lock(lock)
    assert read_lock(text.encode(), where="here").base == [package("bash"), package("zlib1g")]
    for other in (text + " ", text.replace('"epoch": 1', '"epoch":1'), text.replace("debian", "debian", 1) + "\n"):
        with pytest.raises(UnusableLock):
            read_lock(other.encode(), where="here")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a" * 64, "A" * 64),
        ("pool/main", "../pool"),
        ('"size": 10', '"size": 0'),
        ('"size": 10', '"size": "10"'),
        ('"version": 1,', '"version": 2,'),
        ('"name": "bash"', '"name": "bash", "extra": 1'),
    ],
)
def test_a_lock_with_a_wrong_field_is_refused(old: str, new: str) -> None:
    text = write_lock(lock_of(package("bash")))
    assert old in text
    with pytest.raises(UnusableLock):
        read_lock(text.replace(old, new).encode(), where="here")


def test_what_a_lock_has_none_of_is_left_out_of_it() -> None:
    lock = lock_of(package("bash"))
    assert "modules" not in write_lock(lock)
    certificate, signed = sign_modules({"x": b"code"}, "tiny")
    more = lock.model_copy(update={"modules": signed, "certificate": certificate, "compiler": [package("gcc")]})
    text = write_lock(more)
    assert read_lock(text.encode(), where="here") == more
    assert set(more.digests()) == {"a" * 64}
    with pytest.raises(UnusableLock):
        read_lock(write_lock(lock).replace('"base"', '"modules": [],\n  "base"').encode(), where="here")


def test_a_lock_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, MINIMAL)
    with pytest.raises(UnusableLock, match="no lock"):
        load_lock(path, "tiny", "trixie")
    lock_path(path).write_text(write_lock(lock_of(package("bash"))))
    assert load_lock(path, "tiny", "trixie").epoch == 1
    with pytest.raises(UnusableLock, match="not of other"):
        load_lock(path, "other", "trixie")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_has_its_lock(path: Path) -> None:
    recipe = load_recipe(path)
    lock = load_lock(path, recipe.name, recipe.suite)
    names = {one.name for one in lock.base}
    assert set(recipe.base.packages) <= names
    assert lock.kernel
    assert lock.firmware
    assert (lock.certificate is not None) == bool(lock.modules) == (recipe.gpu is not None)
    assert "://" not in lock_path(path).read_text()
