"""The workload layer: our packages, wheels, and the recipe's own files, as names and bytes before they are a tree."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from cvm_image.build.errors import MissingInput, UnusableRecipe
from cvm_image.build.lock import LockedWheel
from cvm_image.build.recipe import Recipe
from cvm_image.build.store import Store
from cvm_image.build.tools import Mount, Tools
from cvm_image.packages import collect as collect_packages
from cvm_image.packages import guest_packages

OURS = "usr/lib/sealwright/packages"
"""Where our own packages lie in the guest."""
WHEELS = "usr/lib/sealwright/wheels"
"""Where the locked wheels lie in the guest."""
PATH_FILE = "usr/lib/python3/dist-packages/sealwright.pth"
"""Names `WHEELS` to interpreters that our programs start as processes of their own (the Rego evaluator is one)."""
GUEST = "usr/lib/sealwright/guest"
"""Where the modules of the guest's first program lie."""
INIT = "usr/lib/sealwright/init"
WORLD_FILE = "etc/sealwright/attester"
"""The one word that says which secure processor this image asks for (read by `attestation.attester.world`)."""

_LEFT_OUT = ("*/__pycache__/*", "*.pyc", "*/.*", ".*")
_MAX_FILE = 512 << 20
_MAX_WHEEL = 4 << 30


@dataclass(frozen=True)
class File:
    """One file of the layer."""

    data: bytes
    executable: bool = False


def collect(recipe: Recipe, recipe_path: Path) -> dict[str, File]:
    """Every file of the workload layer but the wheels', by its path in the guest.

    Raises UnusableRecipe for a folder that is not there.
    """
    files: dict[str, File] = {WORLD_FILE: File(f"{recipe.variant}\n".encode())}
    if recipe.workload.packages:
        for name, data in collect_packages(guest_packages(recipe.variant)).items():
            files[f"{OURS}/{name}"] = File(data)
        files[PATH_FILE] = File(f"/{WHEELS}\n".encode())
        _take_guest(recipe, files)
    if recipe.workload.container is not None:
        files[f"{OURS}/contained.py"] = File((Path(__file__).parent / "contained.py").read_bytes())
    if recipe.workload.files is not None:
        files |= recipe_files(recipe_path.parent / recipe.workload.files)
    return files


def _take_guest(recipe: Recipe, files: dict[str, File]) -> None:
    """The first program of the verified root and its modules; a hardware image has no relay to the virtual platform."""
    for path in sorted((Path(__file__).parent / "guest").glob("*.py")):
        if path.name == "relay.py" and recipe.variant == "hardware":
            continue
        files[f"{GUEST}/{path.name}"] = File(path.read_bytes())
    files[INIT] = File((Path(__file__).parent / "guest" / "init").read_bytes(), executable=True)


def recipe_files(folder: Path) -> dict[str, File]:
    """The files below a recipe's folder of files. Raises UnusableRecipe if it is not there or holds anything else."""
    files: dict[str, File] = {}
    if not folder.is_dir():
        raise UnusableRecipe("the recipe names a folder that is not there", where=str(folder), do="Correct the recipe.")
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if any(fnmatchcase(f"/{inside}", pattern) or fnmatchcase(inside, pattern) for pattern in _LEFT_OUT):
            continue
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise UnusableRecipe("a source is no plain file", where=str(path), do="Only files and folders go in.")
        if path.is_file():
            files[inside] = File(path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))
    return files


def lay_out_wheels(wheels: Sequence[LockedWheel], store: Store, root: Path, place: str = WHEELS) -> None:
    """Write the files of the locked wheels below `place` of the new folder `root`.

    They may be larger than memory. Raises MissingInput for a wheel whose archive holds what no wheel may: absolute
    names, `..`, a file twice.
    """
    _folder(root, root)
    for wheel in wheels:
        with zipfile.ZipFile(store.input(wheel.sha256)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_WHEEL:
                raise MissingInput(f"{wheel.file} is too large unpacked", where=wheel.name, do="Leave it out.")
            for info in archive.infolist():
                path = PurePosixPath(info.filename)
                inside = None if info.is_dir() else _place_in_wheel(path)
                if inside is None:
                    continue
                target = root / place / inside
                if path.is_absolute() or ".." in path.parts or (target.exists() and target.name != "__init__.py"):
                    raise MissingInput(
                        f"{wheel.file} holds the name {info.filename!r}", where=wheel.name, do="Lock another version."
                    )
                _folder(target.parent, root)
                with archive.open(info) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                target.chmod(0o644)


def _place_in_wheel(path: PurePosixPath) -> str | None:
    """Where a member of a wheel goes below the site folder; None for scripts, headers and data."""
    if path.parts and path.parts[0].endswith(".data"):
        if len(path.parts) > 2 and path.parts[1] in {"purelib", "platlib"}:
            return "/".join(path.parts[2:])
        return None
    return str(path)


def write_tree(files: Mapping[str, File], root: Path) -> None:
    """Write the files below `root`, directories 0755, files 0644 or 0755."""
    _folder(root, root)
    for name, file in sorted(files.items()):
        path = root / name
        _folder(path.parent, root)
        path.unlink(missing_ok=True)  # it may be linked to a file of the cache
        path.write_bytes(file.data)
        path.chmod(0o755 if file.executable else 0o644)


def _folder(path: Path, root: Path) -> None:
    """Make the folder and those between it and `root`, 0755, where they are not there yet."""
    if path.is_dir():
        return
    if path != root:
        _folder(path.parent, root)
    path.mkdir(parents=path == root)
    path.chmod(0o755)


def compile_python(tools: Tools, root: Path, folders: Sequence[str]) -> None:
    """Compile every module below these folders of `root`, so that the guest need not (it could not keep the result).

    The compiled files carry a digest of their source and no time (PEP 552, unchecked: the root is on dm-verity).
    """
    for folder in folders:
        if not (root / folder).is_dir():
            continue
        tools.run(
            [
                "python3",
                "-I",
                "-m",
                "compileall",
                "-q",
                "-f",
                "-j1",
                "--invalidation-mode=unchecked-hash",
                "-s/build/root",
                "-p/",
                f"/build/root/{folder}",
            ],
            what="compiling Python",
            mounts=(Mount(root, "/build/root", writable=True),),
            env={"PYTHONHASHSEED": "0"},
            timeout=600,
        )
