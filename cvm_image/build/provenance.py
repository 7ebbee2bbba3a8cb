"""SLSA provenance: from which inputs, by which recipe and builder an image was built, signed like its manifest.

The statement (SLSA provenance v1.0, predicate `https://slsa.dev/provenance/v1`) names every input by digest, recipe and
lock among them, and holds no time: the same build gives the same bytes. With an archive of the inputs
(`seal image lock --archive`) it is all that `seal image reproduce` needs.
"""

from __future__ import annotations

import hashlib
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cvm_image.build.errors import MissingInput
from cvm_image.build.lock import Lock, LockedPackage, lock_path, write_lock
from cvm_image.build.recipe import Recipe, base_of, load_recipe
from cvm_image.build.workload import recipe_files
from cvm_image.errors import ImageRefused
from cvm_image.statement import MAX_STATEMENT, BuilderKey, read_statement, sign_statement, unusable, verify_envelope
from policies.keys import fingerprint, public_pem

PROVENANCE = "provenance.dsse.json"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "tag:sealwright,2026:image-build/v1"
WHAT = "image provenance"
_RECIPE, _LOCK, _BASES, _FILES = "recipe", "lock", "recipes/", "files/"


@dataclass(frozen=True)
class RecipeSource:
    """The recipe as it was read: its bytes, those of the recipe that it is based on (by name, if any), and those of the
    files beside it that it names (path below their folder → bytes, whether executable)."""

    recipe: bytes
    bases: Mapping[str, bytes]
    files: Mapping[str, tuple[bytes, bool]]

    def inputs(self, lock: Lock) -> dict[str, bytes]:
        """Recipe, lock and files by digest, as an archive keeps them."""
        contents = [self.recipe, *self.bases.values(), write_lock(lock).encode()]
        contents += [data for data, _ in self.files.values()]
        return {_digest(data): data for data in contents}


def read_source(recipe: Recipe, recipe_path: Path) -> RecipeSource:
    """Read the recipe at `recipe_path` and the files that it lays over the root."""
    files = {} if recipe.workload.files is None else recipe_files(recipe_path.parent / recipe.workload.files)
    base = base_of(recipe_path)
    bases = {} if base is None else {base.name: base.read_bytes()}
    return RecipeSource(
        recipe_path.read_bytes(), bases, {name: (file.data, file.executable) for name, file in files.items()}
    )


def sign_provenance(
    files: Mapping[str, str], recipe: Recipe, source: RecipeSource, lock: Lock, builder: BuilderKey
) -> bytes:
    """Return the bytes of `provenance.dsse.json` about `files` (name → SHA-256)."""
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"recipe": recipe.name, "variant": recipe.variant},
            "internalParameters": {"epoch": lock.epoch, "suite": lock.suite},
            "resolvedDependencies": [*_sources(source, lock), *_inputs(lock)],
        },
        "runDetails": {
            "builder": {
                "id": f"tag:sealwright,2026:builder/{fingerprint(public_pem(builder.public_key()))}",
                "version": {"sealwright": metadata.version("sealwright")},
            },
        },
    }
    return sign_statement(PREDICATE_TYPE, files, predicate, builder)


def verify_provenance(raw: bytes, files: Mapping[str, str], builder: Ed25519PublicKey) -> dict[str, Any]:
    """Return the predicate if `builder` signed it and it is about exactly `files`. Raises ImageRefused if not."""
    envelope, said, predicate = read_statement(raw, PREDICATE_TYPE, what=WHAT, where=PROVENANCE)
    verify_envelope(envelope, builder, what="provenance", where=PROVENANCE)
    if said != dict(files):
        raise ImageRefused(
            "the provenance is about other files than the manifest's", where=PROVENANCE, do="Get the image again."
        )
    return predicate


def recall_recipe(raw: bytes, archive: Path, target: Path) -> Path:
    """Write recipe, lock and files of a provenance below `target`, from an archive of inputs; return the recipe's path.

    Nobody's signature is asked for: what is rebuilt is compared with the image. Raises MissingInput for an input that
    the archive has not, UnusableImage for no provenance.
    """
    _, _, predicate = read_statement(raw, PREDICATE_TYPE, what=WHAT, where=PROVENANCE)
    try:
        wanted = predicate["buildDefinition"]["resolvedDependencies"]
        name = predicate["buildDefinition"]["externalParameters"]["recipe"]
        sources = [
            (one["name"], one["digest"]["sha256"], bool(one.get("annotations", {}).get("executable")))
            for one in wanted
            if one["name"] in {_RECIPE, _LOCK} or one["name"].startswith((_BASES, _FILES))
        ]
        if not isinstance(name, str) or "/" in name or len({one for one, _, _ in sources}) != len(sources):
            raise ValueError("its recipe has no name, or an input is there twice")
        if any(not _plain(one) for one, _, _ in sources):
            raise ValueError("an input's name climbs out of its folder")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(WHAT, PROVENANCE, error) from error
    recipe = target / f"{name}.toml"
    kept = {source: _kept(archive, sha256, source) for source, sha256, _ in sources}
    if not {_RECIPE, _LOCK} <= kept.keys():
        raise unusable(WHAT, PROVENANCE, ValueError("it names no recipe or no lock"))
    recipe.write_bytes(kept[_RECIPE])
    lock_path(recipe).write_bytes(kept[_LOCK])
    for source, data in kept.items():
        if source.startswith(_BASES):
            (target / source.rpartition("/")[2]).write_bytes(data)
    folder = target / (load_recipe(recipe).workload.files or "files")
    for source, _, executable in sources:
        if source.startswith(_FILES):
            path = folder / source.removeprefix(_FILES)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept[source])
            path.chmod(0o755 if executable else 0o644)
    return recipe


def _kept(archive: Path, sha256: str, what: str) -> bytes:
    try:
        data = (archive / sha256).read_bytes()
    except OSError:
        data = b""
    if _digest(data) != sha256:
        raise MissingInput(
            f"the archive has not the {what} that the image was built from",
            where=str(archive / sha256),
            do="Give the archive of its release, or the recipe with --recipe.",
        )
    return data


def _plain(name: str) -> bool:
    return not any(part in {"", ".", ".."} for part in name.split("/")) and "\0" not in name


def _sources(source: RecipeSource, lock: Lock) -> Iterator[dict[str, Any]]:
    yield {"name": _RECIPE, "digest": {"sha256": _digest(source.recipe)}}
    yield {"name": _LOCK, "digest": {"sha256": _digest(write_lock(lock).encode())}}
    for name, data in source.bases.items():
        yield {"name": f"{_BASES}{name}", "digest": {"sha256": _digest(data)}}
    for name, (data, executable) in sorted(source.files.items()):
        entry: dict[str, Any] = {"name": f"{_FILES}{name}", "digest": {"sha256": _digest(data)}}
        yield entry | ({"annotations": {"executable": True}} if executable else {})


def _inputs(lock: Lock) -> Iterator[dict[str, Any]]:
    for purpose in ("tools", "firmware", "kernel", "base", "compiler", "driver"):
        for package in lock.packages(purpose):
            yield {
                "name": f"{purpose}/{package.name}",
                "uri": package_url(package),
                "digest": {"sha256": package.sha256},
            }
    for group, wheels in (("wheels", lock.wheels), ("sdk", lock.sdk)):
        for wheel in wheels:
            yield {
                "name": f"{group}/{wheel.name}",
                "uri": f"pkg:pypi/{wheel.name}@{wheel.version}",
                "digest": {"sha256": wheel.sha256},
            }
    for file in lock.containers:
        yield {"name": f"container/{file.name}", "digest": {"sha256": file.sha256}}


def package_url(package: LockedPackage) -> str:
    """The package's purl (package-url specification, type `deb`)."""
    version = urllib.parse.quote(package.version, safe=".+~-")
    return f"pkg:deb/debian/{package.name}@{version}?arch={package.architecture}"


def read_provenance_file(folder: Path) -> bytes:
    """The bytes of an image's provenance. Raises MissingInput if it has none."""
    try:
        with (folder / PROVENANCE).open("rb") as file:
            return file.read(MAX_STATEMENT + 1)
    except OSError:
        raise MissingInput(
            "the image has no provenance that names its recipe",
            where=str(folder / PROVENANCE),
            do="Name the recipe with --recipe.",
        ) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
