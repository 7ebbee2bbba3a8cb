"""Python distributions for the guest: resolved once with their digests, fetched by pip, never from a source archive."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from cvm_image.build.apt import take_input
from cvm_image.build.commands import run
from cvm_image.build.errors import BuildFailed, MissingInput
from cvm_image.build.lock import LockedWheel
from cvm_image.build.requirements import guest_environment, needed_by, read_requirements
from cvm_image.build.store import Store, digest_file

PLATFORMS = (
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


MAX_TRIES = 8
"""How often what pip brought may turn out to need more in the guest."""


def lock_wheels(
    names: Sequence[str], *, python: str, constraints: Path, provided: Sequence[str], store: Store, log: Path
) -> list[LockedWheel]:
    """Resolve `names` and all they need for the guest's Python under `constraints`, and put the wheels in the store.

    A name with a version of its own (`name==version`) is not under them. `provided` names what Debian's packages bring
    (numpy, torch): those are left out of the result. Raises BuildFailed where what they need cannot be had.
    """
    if not names:
        return []
    own = {name.partition("==")[0] for name in names if "==" in name}
    lines = [line for line in constraints.read_text().splitlines() if line.partition("==")[0] not in own]
    with tempfile.NamedTemporaryFile("w", prefix="constraints-", dir=store.root) as others:
        others.write("\n".join(lines) + "\n")
        others.flush()
        under = ["--constraint", others.name]
        asked = list(names)
        for _ in range(MAX_TRIES):
            with tempfile.TemporaryDirectory(prefix="wheels-", dir=store.root) as landing:
                folder = Path(landing)
                _download([*asked, *under], folder, python=python, log=log)
                there = {_name_of(file): read_requirements(file) for file in folder.glob("*.whl")}
                needed, missing = needed_by(names, there, guest_environment(python), provided)
                if not missing:
                    return _take(folder, needed, store)
            asked += missing
    raise BuildFailed("what the wheels need has no end", where=", ".join(missing), do="Name other wheels.")


def lock_pinned(pins: Path, *, python: str, store: Store, log: Path) -> list[LockedWheel]:
    """Lock the wheels that the file `pins` lists (`name==version` a line), and nothing that they ask for besides."""
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=store.root) as landing:
        folder = Path(landing)
        _download(["--no-deps", "--requirement", str(pins)], folder, python=python, log=log)
        return _take(folder, {_name_of(file) for file in folder.glob("*.whl")}, store)


def _take(folder: Path, wanted: Collection[str], store: Store) -> list[LockedWheel]:
    """Put the wheels of these names into the store."""
    locked = []
    for file in sorted(folder.glob("*.whl")):
        name, version = _name_of(file), file.name.split("-")[1]
        if name in wanted:
            digest, size = digest_file(file), file.stat().st_size
            take_input(store, file, digest, file.name)
            locked.append(LockedWheel(name=name, version=version, file=file.name, size=size, sha256=digest))
    return locked


def _name_of(wheel: Path) -> str:
    return canonicalize_name(wheel.name.partition("-")[0])


def fetch_wheels(wheels: Sequence[LockedWheel], store: Store, *, online: bool, log: Path) -> None:
    """Have every wheel in the store. Raises MissingInput for what cannot be had."""
    missing = [wheel for wheel in wheels if not store.holds(wheel.sha256)]
    if not missing:
        return
    if not online:
        raise MissingInput(
            f"{len(missing)} wheels are not in the cache, {missing[0].file} among them",
            where=str(store.root),
            do="Build once without --offline, or give the lock's archive with --archive.",
        )
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=store.root) as landing:
        folder = Path(landing)
        wanted = folder / "requirements.txt"
        wanted.write_text("".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in missing))
        python = _python_of(missing)
        _download(["--no-deps", "--require-hashes", "-r", str(wanted)], folder, python=python, log=log)
        for wheel in missing:
            take_input(store, folder / wheel.file, wheel.sha256, wheel.file)


def _python_of(wheels: Sequence[LockedWheel]) -> str:
    tags = {wheel.file.split("-")[-3] for wheel in wheels}
    versions = sorted(tag.removeprefix("cp3") for tag in tags if tag.startswith("cp31"))
    return f"3.{versions[-1]}" if versions else "3.13"


def _download(arguments: Sequence[str], folder: Path, *, python: str, log: Path) -> None:
    tag = "cp" + python.replace(".", "")
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    argv += [f"--platform={platform}" for platform in PLATFORMS]
    argv += [f"--python-version={python}", "--implementation=cp", f"--abi={tag}", "--abi=abi3", "--abi=none"]
    env = {name: value for name, value in os.environ.items() if name.upper().startswith(("PIP_", "HTTP", "NO_PROXY"))}
    env["HOME"] = str(Path.home())
    run([*argv, *arguments], what="fetching wheels", log=log, timeout=3600, env=env)
