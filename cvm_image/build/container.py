"""A `docker save` archive as part of the workload layer: its layers applied in order, as files below one folder.

The archive is what docker and podman write: a tar with `manifest.json`, the image's configuration, and its layers as
tars, packed or not (docker image specification v1.2; OCI image layout beside it since docker 25). Each layer is checked
against the digest that the configuration names (`rootfs.diff_ids`). Every name in it comes from a stranger: nothing is
written outside the folder, nothing through a link, and nothing but directories, files and links.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import rfc8785
from pydantic import BaseModel, ConfigDict, Field

from cvm_image.build import contained
from cvm_image.build.contained import MEMORY
from cvm_image.build.errors import MissingInput, UnusableRecipe
from cvm_image.build.lock import LockedFile
from cvm_image.build.store import Store, digest_file

CONTAINER = contained.CONTAINER.as_posix()
"""Where the container lies in the guest: `root/`, and `start.json`, what of its configuration is obeyed."""

MAX_DOCUMENT = 4 << 20
MAX_LAYERS = 256
MAX_ENTRIES = 1_000_000
MAX_BYTES = 32 << 30
_MODE = 0o775
"""What is kept of a file's mode: nothing by which somebody else may write it, or gain rights by starting it."""
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_GZIP = b"\x1f\x8b"
_DO = "Make it by `docker save NAME -o FILE`."


class Start(BaseModel):
    """What is run in a container: the words of its command, its environment and its folder."""

    model_config = ConfigDict(frozen=True, strict=True)
    argv: list[str] = Field(min_length=1, max_length=256)
    env: list[str] = Field(default=[], max_length=1024)
    cwd: str = "/"


class _Settings(BaseModel):
    """The part of an image's configuration that is read; the rest (volumes, ports, labels) is not."""

    model_config = ConfigDict(strict=True)
    Entrypoint: list[str] | None = None
    Cmd: list[str] | None = None
    Env: list[str] | None = None
    WorkingDir: str = ""


class _RootFs(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str
    diff_ids: list[str] = Field(min_length=1, max_length=MAX_LAYERS)


class _Configuration(BaseModel):
    model_config = ConfigDict(strict=True)
    architecture: str
    os: str
    config: _Settings = _Settings()
    rootfs: _RootFs


class _Image(BaseModel):
    model_config = ConfigDict(strict=True)
    Config: str
    Layers: list[str] = Field(min_length=1, max_length=MAX_LAYERS)


def unpack_container(archive: Path, folder: Path) -> Start:
    """Lay the one image of a `docker save` archive out at `folder`/root and write `folder`/start.json.

    Owners are not kept (the layer is root's); nor are set-id bits, and what lets all write. Raises UnusableRecipe for
    an archive that holds no or several images, another architecture, a layer with another digest, or a name that no
    image may have.
    """
    try:
        with tarfile.open(archive) as outer:
            image, configuration = _read_image(outer)
            root = folder / "root"
            root.mkdir(parents=True)
            root.chmod(0o755)
            budget = _Budget()
            for name, digest in zip(image.Layers, configuration.rootfs.diff_ids, strict=True):
                _apply_layer(outer, name, digest, root, budget)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise _refused(archive, " ".join(str(error).split())[:300] or type(error).__name__) from error
    start = Start(
        argv=[*(configuration.config.Entrypoint or []), *(configuration.config.Cmd or [])],
        env=configuration.config.Env or [],
        cwd=configuration.config.WorkingDir or "/",
    )
    for place in (*MEMORY, "/dev", "/proc"):
        (folder / "root" / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (folder / "start.json").write_bytes(rfc8785.dumps(start.model_dump()))
    return start


def lock_container(name: str, recipe_path: Path, store: Store) -> LockedFile:
    """Pin the archive `name` that lies beside the recipe, and keep it in the store. Raises UnusableRecipe without."""
    file = recipe_path.parent / name
    if not file.is_file():
        raise UnusableRecipe("the recipe names a container that is not there", where=str(file), do=_DO)
    locked = LockedFile(name=name, size=file.stat().st_size, sha256=digest_file(file))
    _kept(locked, file, store)
    return locked


def take_container(locked: LockedFile, recipe_path: Path, store: Store) -> Path:
    """The locked archive, from the store or from beside the recipe. Raises MissingInput if neither has it."""
    if not store.holds(locked.sha256):
        file = recipe_path.parent / locked.name
        if not file.is_file() or digest_file(file) != locked.sha256:
            raise MissingInput(
                f"{locked.name} is not the container that was locked, or not there",
                where=str(file),
                do="Put it beside the recipe, give the lock's archive with --archive, or lock anew.",
            )
        return _kept(locked, file, store)
    return store.input(locked.sha256)


def _kept(locked: LockedFile, file: Path, store: Store) -> Path:
    target = store.input(locked.sha256)
    partial = target.with_name(f"{locked.sha256}.partial")
    shutil.copyfile(file, partial)
    partial.rename(target)
    return target


class _Budget:
    """How much one archive may still hold."""

    def __init__(self) -> None:
        self.entries = MAX_ENTRIES
        self.bytes = MAX_BYTES

    def spend(self, size: int) -> None:
        self.entries -= 1
        self.bytes -= size
        if self.entries < 0 or self.bytes < 0:
            raise ValueError("it holds too many or too large files")


def _read_image(outer: tarfile.TarFile) -> tuple[_Image, _Configuration]:
    images = json.loads(_document(outer, "manifest.json"))
    if not isinstance(images, list) or len(images) != 1:
        raise ValueError("it holds no or several images; save one")
    image = _Image.model_validate(images[0])
    configuration = _Configuration.model_validate_json(_document(outer, image.Config))
    if (configuration.os, configuration.architecture) != ("linux", "amd64"):
        raise ValueError(f"it is for {configuration.os}/{configuration.architecture}, not for linux/amd64")
    if len(image.Layers) != len(configuration.rootfs.diff_ids) or configuration.rootfs.type != "layers":
        raise ValueError("its configuration names other layers than its manifest")
    if not (configuration.config.Entrypoint or configuration.config.Cmd):
        raise ValueError("it names no command to run")
    return image, configuration


def _document(outer: tarfile.TarFile, name: str) -> bytes:
    with _member(outer, name) as file:
        data: bytes = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise ValueError(f"{name} is too large")
    return data


@contextmanager
def _member(outer: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    try:
        file = outer.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"it holds no file {name!r}")
    with file:
        yield file


def _apply_layer(outer: tarfile.TarFile, name: str, digest: str, root: Path, budget: _Budget) -> None:
    with _member(outer, name) as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        plain = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
        reader = _Hashing(plain)
        with tarfile.open(fileobj=cast(Any, reader), mode="r|") as layer:
            for entry in layer:
                budget.spend(entry.size)
                _apply_entry(layer, entry, root)
        reader.drain(budget)
    if f"sha256:{reader.digest.hexdigest()}" != digest:
        raise ValueError(f"its layer {name} has another digest than its configuration names")


class _Hashing:
    """A layer's bytes on their way into tarfile."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.digest.update(data)
        return data

    def drain(self, budget: _Budget) -> None:
        """Read what follows the end of the tar, since the digest covers it."""
        while data := self.read(1 << 20):
            budget.bytes -= len(data)
            if budget.bytes < 0:
                raise ValueError("it holds too many or too large files")


def _apply_entry(layer: tarfile.TarFile, entry: tarfile.TarInfo, root: Path) -> None:
    parts = _parts(entry.name)
    if not parts:
        return
    path = _place(root, parts)
    if path.name == _OPAQUE:
        for one in sorted(path.parent.iterdir()):
            _remove(one)
        return
    if path.name.startswith(_WHITEOUT):
        _remove(_place(root, (*parts[:-1], _named(path.name.removeprefix(_WHITEOUT)))))
        return
    if entry.isdir():
        if path.is_symlink() or not path.is_dir():
            _remove(path)
            path.mkdir()
        path.chmod(entry.mode & _MODE)
        return
    _remove(path)
    if entry.isreg():
        source = layer.extractfile(entry)
        if source is None:
            raise ValueError(f"{entry.name} has no content")
        with path.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        path.chmod(entry.mode & _MODE)
    elif entry.issym():
        path.symlink_to(entry.linkname)
    elif entry.islnk():
        other = _place(root, _parts(entry.linkname))
        if other.is_symlink() or not other.is_file():
            raise ValueError(f"{entry.name} is a link to {entry.linkname}, which is no file of its")
        path.hardlink_to(other)
    else:
        raise ValueError(f"{entry.name} is no directory, file or link")


def _parts(name: str) -> tuple[str, ...]:
    """The steps of a member's name. Raises ValueError for one that is absolute or climbs."""
    path = PurePosixPath(name)
    parts = tuple(part for part in path.parts if part != ".")
    if path.is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"it holds the name {name!r}")
    return parts


def _named(name: str) -> str:
    if name in {"", ".", ".."}:
        raise ValueError(f"it takes away {name!r}")
    return name


def _place(root: Path, parts: Sequence[str]) -> Path:
    """Where a member goes, its folders made. A folder that is a link leads elsewhere in the container, never out of it.

    Raises ValueError for a way through a link that cannot be followed inside the root.
    """
    folder = root
    for part in parts[:-1]:
        folder = folder / part
        if folder.is_symlink():
            folder = _followed(root, folder)
        if not folder.is_dir():
            if folder.exists():
                raise ValueError(f"{part} in {'/'.join(parts)!r} is no directory")
            folder.mkdir()
            folder.chmod(0o755)
    return folder / parts[-1]


def _followed(root: Path, link: Path) -> Path:
    """The directory that a link leads to when `root` is the root of all, found step by step."""
    steps = 0
    at = link.parent
    waiting = [link.name]
    while waiting:
        part = waiting.pop(0)
        if part in {"", "."}:
            continue
        if part == "..":
            at = at.parent if at != root else root
            continue
        step = at / part
        if step.is_symlink():
            steps += 1
            if steps > 40:
                raise ValueError(f"{link.name} is a link without end")
            target = step.readlink()
            at = root if target.is_absolute() else at
            waiting = [one for one in target.parts if one != "/"] + waiting
            continue
        at = step
    return at


def _remove(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def _refused(archive: Path, why: str) -> UnusableRecipe:
    return UnusableRecipe(f"the container's archive cannot be used: {why}", where=str(archive), do=_DO)
