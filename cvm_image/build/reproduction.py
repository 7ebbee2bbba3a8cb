"""`seal image reproduce`: build the image again from recipe and lock, sharing nothing but the inputs, and compare."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from cvm_image.build.apt import find_archives
from cvm_image.build.errors import MissingInput, NotReproduced, UnusableLock
from cvm_image.build.image import PARTS, Build, make_parts, new_log
from cvm_image.build.lock import load_lock, write_lock
from cvm_image.build.provenance import read_provenance_file, recall_recipe
from cvm_image.build.recipe import load_recipe
from cvm_image.build.store import Store, digest_file
from cvm_image.verify import load_image

COMPARED = (*PARTS, "sbom.cdx.json")
"""Every file but the signatures: those need the builder's keys, and `seal image verify` checks them."""


def reproduce(
    image: Path, recipe_path: Path | None, *, store: Store, say: Callable[[str], None], offline: bool = False
) -> dict[str, str]:
    """Rebuild the image in `image` with an empty cache but for its inputs; return the digests of the equal files.

    `recipe_path` None takes recipe and lock from the store's archive, by the digests that the provenance names. Raises
    MissingInput if they are not there, UnusableLock if the image was not built from this lock, and NotReproduced with
    every file that differs.
    """
    if recipe_path is not None:
        return _reproduce(image, recipe_path, store, say, offline)
    if store.archive is None:
        raise MissingInput(
            "neither the recipe nor an archive of the inputs is named",
            where=str(image),
            do="Use --recipe or --archive.",
        )
    with tempfile.TemporaryDirectory(prefix="recipe-", dir=store.root) as name:
        recalled = recall_recipe(read_provenance_file(image), store.archive, Path(name))
        return _reproduce(image, recalled, store, say, offline)


def _reproduce(
    image: Path, recipe_path: Path, store: Store, say: Callable[[str], None], offline: bool
) -> dict[str, str]:
    manifest = load_image(image)
    recipe = load_recipe(recipe_path, variant=manifest.platform)
    lock = load_lock(recipe_path, recipe.name, recipe.suite)
    if hashlib.sha256(write_lock(lock).encode()).hexdigest() != manifest.lock_sha256:
        raise UnusableLock(
            "the image was built from another lock", where=str(recipe_path), do="Take recipe and lock of its release."
        )
    log = new_log(store, f"{recipe.name}-reproduce")
    archives = None if offline else find_archives(recipe.mirrors, recipe.keyring, log=log)
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=store.root) as name:
        fresh = Store(Path(name) / "cache", archive=store.archive, inputs=store.inputs)
        output = Path(name) / "image"
        output.mkdir()
        make_parts(Build(recipe, recipe_path, lock, fresh, archives, log, say), output)
        found = {part: digest_file(output / part) for part in COMPARED}
    differing = [
        f"{part}: {manifest.files.get(part, 'absent')} was signed, {digest} was built"
        for part, digest in found.items()
        if manifest.files.get(part) != digest
    ]
    if differing:
        raise NotReproduced(
            f"{len(differing)} of {len(found)} files differ",
            where=str(image),
            do="See `seal image diff`; was it built from these sources?",
            reasons=tuple(differing),
        )
    return found
