"""Building images in tests: with the locked packages where they can be had, with newer ones where they are gone."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from cvm_image.build.errors import BuildFailed, MissingInput, UnusableHost
from cvm_image.build.image import build_image
from cvm_image.build.locking import lock_recipe
from cvm_image.build.store import Store, default_cache
from cvm_image.signing import SigningKeys


def say(line: str) -> None:
    """Tell the test's log what is being made."""
    sys.stderr.write(f"{line}\n")


def copy_recipe(folder: Path, name: str, target: Path) -> Path:
    """Copy the recipe `name` of `folder` with its lock and files to the new folder `target`."""
    shutil.copytree(
        folder, target, ignore=lambda where, names: [one for one in names if _foreign(Path(where), folder, one, name)]
    )
    return target / f"{name}.toml"


def _foreign(where: Path, folder: Path, one: str, name: str) -> bool:
    return where == folder and one.endswith((".toml", ".json")) and not one.startswith(f"{name}.")


def build_or_skip(recipe: Path, output: Path, keys: SigningKeys) -> Path:
    """Build the image and return its folder; skip the test where that cannot be done, saying why."""
    if os.geteuid() != 0:
        pytest.skip("building an image needs root")
    for program in ("mmdebstrap", "bwrap"):
        if shutil.which(program) is None:
            pytest.skip(f"building an image needs {program}: appliance/setup.sh mmdebstrap bubblewrap")
    store = Store(default_cache())
    try:
        build_image(recipe, output, store=store, keys=keys, say=say)
    except (MissingInput, BuildFailed, UnusableHost) as gone:
        say(f"the locked packages are not to be had ({gone.what}); locking anew")
        try:
            lock_recipe(recipe, store=store, say=say)
        except (BuildFailed, UnusableHost, MissingInput) as error:
            pytest.skip(f"no packages can be had here: {error.what}")
        build_image(recipe, output, store=store, keys=keys, say=say)
    return output
