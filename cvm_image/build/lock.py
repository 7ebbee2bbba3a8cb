"""The lock: every input of an image by version and SHA-256. What is not in it does not go into the image.

It is JSON, written by `seal image lock` and read by `seal image build`, one package a line, so that a review of its
change shows what an update brings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cvm_image.build.errors import UnusableLock

MAX_LOCK = 16 << 20

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{4,20000}={0,2}$")]
Purpose = Literal["tools", "firmware", "kernel", "base", "compiler", "driver"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LockedPackage(_Part):
    """One Debian package. `path` is where it lies below the mirror of `archive`."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]{1,80}$")]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+:~-]{1,120}$")]
    architecture: Literal["amd64", "all"]
    archive: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    path: Annotated[str, StringConstraints(pattern=r"^pool/[A-Za-z0-9_.+~:%/-]{1,300}\.deb$")]
    size: Annotated[int, Field(ge=1, le=4 << 30)]
    sha256: Sha256


class LockedWheel(_Part):
    """One Python distribution as a wheel, by its file name on the package index."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,80}$")]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+!-]{1,60}$")]
    file: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]{1,200}\.whl$")]
    size: Annotated[int, Field(ge=1, le=1 << 30)]
    sha256: Sha256


class LockedFile(_Part):
    """A file that lies beside the recipe (a `docker save` archive)."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+@/-]{0,200}$")]
    size: Annotated[int, Field(ge=1, le=64 << 30)]
    sha256: Sha256


class LockedModule(_Part):
    """A kernel module that is compiled by the build: its digest before it was signed, and the signature (PKCS#7).

    The signature is an input, because the key that made it is gone: see `cvm_image.build.modules`.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    sha256: Sha256
    signature: Base64


class Lock(_Part):
    """All inputs of one recipe. `epoch` (seconds) stands in for every time that would otherwise be the clock's.

    What most recipes have none of (from `compiler` on) is left out of the file where it is empty.
    """

    version: Literal[1] = 1
    recipe: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    suite: str
    epoch: Annotated[int, Field(ge=0, le=1 << 40)]
    tools: list[LockedPackage]
    firmware: list[LockedPackage]
    kernel: list[LockedPackage]
    base: list[LockedPackage]
    wheels: list[LockedWheel]
    compiler: list[LockedPackage] = []
    driver: list[LockedPackage] = []
    sdk: list[LockedWheel] = []
    containers: Annotated[list[LockedFile], Field(max_length=1)] = []
    modules: list[LockedModule] = []
    certificate: Base64 | None = None

    def digests(self) -> list[str]:
        """The SHA-256 of every input that is a file."""
        groups: tuple[Sequence[LockedPackage | LockedWheel | LockedFile], ...] = (
            self.tools,
            self.firmware,
            self.kernel,
            self.base,
            self.wheels,
            self.compiler,
            self.driver,
            self.sdk,
            self.containers,
        )
        return [one.sha256 for group in groups for one in group]

    def packages(self, purpose: Purpose) -> list[LockedPackage]:
        """The packages of one tree, in the lock's order."""
        chosen: list[LockedPackage] = getattr(self, purpose)
        return chosen


_ALWAYS = ("tools", "firmware", "kernel", "base", "wheels")
_SELDOM = ("compiler", "driver", "sdk", "containers", "modules")


def lock_path(recipe: Path) -> Path:
    """Where the lock of the recipe at `recipe` lies: `NAME.lock.json` beside it."""
    return recipe.with_suffix(".lock.json")


def write_lock(lock: Lock) -> str:
    """Return the lock as text: canonical, and one input a line."""
    head = {"version": lock.version, "recipe": lock.recipe, "suite": lock.suite, "epoch": lock.epoch}
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    if lock.certificate is not None:
        parts.append(f'  "certificate": {json.dumps(lock.certificate)}')
    for group in _ALWAYS + _SELDOM:
        inputs: list[LockedPackage | LockedWheel | LockedFile | LockedModule] = sorted(
            getattr(lock, group), key=lambda one: (one.name, getattr(one, "version", ""))
        )
        if group in _SELDOM and not inputs:
            continue
        lines = ",\n".join(f"    {json.dumps(one.model_dump())}" for one in inputs)
        parts.append(f"  {json.dumps(group)}: [\n{lines}\n  ]" if inputs else f"  {json.dumps(group)}: []")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_lock(raw: bytes, *, where: str) -> Lock:
    """Read a lock strictly. Raises UnusableLock, also for one that is not in the form in which it is written."""
    if len(raw) > MAX_LOCK:
        raise UnusableLock("the lock is too large", where=where, do=f"At most {MAX_LOCK} bytes.")
    try:
        lock = Lock.model_validate_json(raw)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise UnusableLock(
            f"the lock is refused: {found}", where=where, do="Renew it with `seal image lock`."
        ) from None
    if write_lock(lock).encode() != raw:
        raise UnusableLock(
            "the lock is not in the form in which it is written", where=where, do="Renew it with `seal image lock`."
        )
    return lock


def load_lock(recipe: Path, name: str, suite: str) -> Lock:
    """Read the lock beside the recipe at `recipe` and see that it is this recipe's. Raises UnusableLock."""
    path = lock_path(recipe)
    try:
        raw = path.read_bytes()
    except OSError:
        raise UnusableLock("the recipe has no lock", where=str(path), do=f"Make it: seal image lock {recipe}") from None
    lock = read_lock(raw, where=str(path))
    if (lock.recipe, lock.suite) != (name, suite):
        raise UnusableLock(
            f"the lock is that of {lock.recipe} ({lock.suite}), not of {name} ({suite})",
            where=str(path),
            do="Renew it with `seal image lock`.",
        )
    return lock
