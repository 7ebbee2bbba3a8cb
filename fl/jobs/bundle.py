"""Bundles: every file of a recipe's folder and the job's settings, named by one digest.

A bundle's bytes are `SEALBNDL` and a version (u32), the manifest's length (u32), the manifest, then the files in the
manifest's order; integers are big-endian. The manifest is canonical JSON (RFC 8785):
`{"files": [{"path", "sha256", "size"}], "job": {settings}, "version": 1}`, with files sorted by path. The digest is the
manifest's SHA-256; it covers every byte that can run. What is not listed does not run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl.errors import MalformedMessage, RecipeUnusable
from fl.jobs.lock import LOCK_FILE, make_lock, own_lock
from fl.jobs.packages import Packages, packages_here
from fl.jobs.settings import Digest, JobSettings

MAGIC: Final = b"SEALBNDL"
VERSION: Final = 1
MAX_BUNDLE: Final = 64 << 20
MAX_MANIFEST: Final = 8 << 20
MAX_FILES: Final = 2000
PATH: Final = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}){0,15}$")
"""Relative, printable, no part that begins with a dot: nothing that any file system reads in another way."""

_HEAD: Final = struct.Struct(">8sII")
LEFT_OUT: Final = frozenset({"__pycache__"})


class BundledFile(BaseModel):
    """One file: where it goes, and its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str
    sha256: Digest
    size: int = Field(ge=0, le=MAX_BUNDLE)

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if not PATH.fullmatch(self.path):
            raise ValueError(f"path {self.path!r} is not allowed")
        return self


class Manifest(BaseModel):
    """What is in a bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    files: Annotated[tuple[BundledFile, ...], Field(max_length=MAX_FILES, strict=False)]
    job: JobSettings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [file.path for file in self.files]
        large = [file.path for file in self.job.files]
        if paths != sorted(set(paths)) or large != sorted(set(large)):
            raise ValueError("the files are not sorted by path, each once")
        for path in large:
            if not PATH.fullmatch(path) or path in paths:
                raise ValueError(f"path {path!r} is not allowed, or of two files")
        paths = [*paths, *large]
        folders = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
        if folders & set(paths):
            raise ValueError("a file's path is also a folder")
        for script in sorted(self.job.scripts):
            if script not in paths or script in large:
                raise ValueError(f"script {script!r} is not among the files")
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every byte was checked."""

    digest: str
    manifest: Manifest
    files: Mapping[str, bytes]
    raw: bytes

    @property
    def settings(self) -> JobSettings:
        """The job's settings."""
        return self.manifest.job


def make_bundle(
    folder: Path, settings: JobSettings, added: Mapping[str, bytes] | None = None, packages: Packages | None = None
) -> Bundle:
    """The bundle of every file under `folder` but hidden ones and `__pycache__`, of `added`, by path, and of the lock
    (`fl.jobs.lock`) of what is installed: `packages` (None: here).

    Raises RecipeUnusable for links, special files, paths that are not allowed, what is over a limit, and imports or an
    author's own lock that do not go with what is installed.
    """
    files = {**{path: _read(folder, path) for path in _listed(folder)}, **(added or {})}
    files[LOCK_FILE] = make_lock(files, settings, packages or packages_here(), own_lock(files.get(LOCK_FILE)))
    manifest: dict[str, Any] = {
        "version": VERSION,
        "files": [
            {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for path, data in sorted(files.items())
        ],
        "job": settings.model_dump(mode="json"),
    }
    try:
        text = rfc8785.dumps(manifest)
        raw = _HEAD.pack(MAGIC, VERSION, len(text)) + text + b"".join(files[path] for path in sorted(files))
        return parse_bundle(raw)
    except (MalformedMessage, rfc8785.CanonicalizationError) as error:
        what = error.what if isinstance(error, MalformedMessage) else str(error)
        raise RecipeUnusable(f"the folder makes no bundle: {what}", where=str(folder)) from error


def parse_bundle(raw: bytes) -> Bundle:
    """Check a whole bundle. Raises MalformedMessage unless every byte is accounted for."""
    if len(raw) > MAX_BUNDLE:
        raise MalformedMessage(f"it has {len(raw)} bytes, more than {MAX_BUNDLE}", where="bundle")
    if len(raw) < _HEAD.size:
        raise MalformedMessage("it ends before its head", where="bundle")
    magic, version, length = _HEAD.unpack_from(raw)
    if magic != MAGIC or version != VERSION:
        raise MalformedMessage("it is not a bundle of this version", where="bundle")
    if length > MAX_MANIFEST or length > len(raw) - _HEAD.size:
        raise MalformedMessage("its manifest is longer than the bundle or the limit", where="bundle")
    text = raw[_HEAD.size : _HEAD.size + length]
    manifest = _parse_manifest(text)
    at = _HEAD.size + length
    files: dict[str, bytes] = {}
    for file in manifest.files:
        data = raw[at : at + file.size]
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            raise MalformedMessage(f"file {file.path} is not what the manifest says", where="bundle")
        files[file.path] = data
        at += file.size
    if at != len(raw):
        raise MalformedMessage(f"{len(raw) - at} bytes follow the last file", where="bundle")
    return Bundle(hashlib.sha256(text).hexdigest(), manifest, files, raw)


def _parse_manifest(text: bytes) -> Manifest:
    try:
        document: Any = json.loads(text)
        if rfc8785.dumps(document) != text:
            raise MalformedMessage("its manifest is not canonical JSON", where="bundle")
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "manifest"
        raise MalformedMessage(f"its manifest is wrong at {place}: {first['msg']}", where="bundle") from error
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise MalformedMessage("its manifest is not JSON", where="bundle") from error


def _listed(folder: Path) -> list[str]:
    found: list[str] = []
    total = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_OUT)
        for name in [*names, *folders]:
            if name.startswith("."):
                continue
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise RecipeUnusable(f"{relative} is a link or no regular file", where=str(folder))
            if not PATH.fullmatch(relative):
                raise RecipeUnusable(f"the path {relative!r} may not be in a bundle", where=str(folder))
            total += path.lstat().st_size
            found.append(relative)
            if total > MAX_BUNDLE or len(found) > MAX_FILES:
                raise RecipeUnusable(
                    f"the folder has more than {MAX_FILES} files or {MAX_BUNDLE} bytes",
                    where=str(folder),
                    do="Keep data and results elsewhere: every file of the recipe's folder is in its bundle.",
                )
    return found


def _read(folder: Path, path: str) -> bytes:
    descriptor = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_BUNDLE + 1)
