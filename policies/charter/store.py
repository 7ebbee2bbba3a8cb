"""A charter's store: relative names to bytes, the same in a folder, in a broker's database and in an audit."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from policies.errors import MalformedDocument

STORE_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of a whole store."""
FILE_LIMIT: Final = 1024 * 1024
"""Bytes of any one file in it."""
FILE_COUNT_LIMIT: Final = 8192
_NAME: Final = re.compile(r"(metadata/[a-z0-9][a-z0-9._-]*|targets(/[a-z0-9][a-z0-9._-]*)+)")
_DEPTH: Final = 6


def store_complaints(store: Mapping[str, bytes]) -> list[str]:
    """Return how `store` goes beyond its bounds; nothing in it may be parsed before this is empty."""
    if len(store) > FILE_COUNT_LIMIT:
        return [f"the store has {len(store)} files, more than {FILE_COUNT_LIMIT}"]
    complaints = [f"{name}: larger than {FILE_LIMIT} bytes" for name in sorted(store) if len(store[name]) > FILE_LIMIT]
    if sum(map(len, store.values())) > STORE_LIMIT:
        complaints.append(f"the store is larger than {STORE_LIMIT} bytes")
    return complaints


def is_store_name(name: str) -> bool:
    """Return whether `name` can be a file of a store at all."""
    return len(name) <= 512 and ".." not in name.split("/") and _NAME.fullmatch(name) is not None


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if depth == 0:
                    raise MalformedDocument("folders are nested too deeply", where=name, do="Name a charter's folder.")
                yield from _walk(Path(entry.path), f"{name}/", depth - 1)
            else:
                yield name, Path(entry.path)


def read_store(folder: Path) -> dict[str, bytes]:
    """Read the store in `folder`: every file, by its name relative to `folder`, at most STORE_LIMIT bytes in all.

    Foreign files are read as well (`load_charter` names them). Raises MalformedDocument if `folder` is no folder, is
    too large, or holds anything but regular files and folders.
    """
    do = "Name the folder that holds `metadata/` and `targets/`."
    if not (folder / "metadata").is_dir():
        raise MalformedDocument("there is no charter here", where=str(folder), do=do)
    store: dict[str, bytes] = {}
    total = 0
    for name, path in _walk(folder, "", _DEPTH):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise MalformedDocument(f"cannot be read: {error.strerror}", where=str(path), do=do) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise MalformedDocument("this is not a regular file", where=str(path), do=do)
            total += status.st_size
            if status.st_size > FILE_LIMIT or total > STORE_LIMIT or len(store) >= FILE_COUNT_LIMIT:
                raise MalformedDocument("too large to be a charter", where=str(path), do=do)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                store[name] = file.read(FILE_LIMIT)
        finally:
            os.close(descriptor)
    return store


def write_store(folder: Path, store: Mapping[str, bytes]) -> None:
    """Make `folder` hold exactly `store`: files first, the timestamp last, then what is left over goes.

    Each file is written whole or not at all. A reader in between sees the old charter or a mixture that it refuses.
    Only `metadata/` and `targets/` are touched. Raises MalformedDocument for a name that no store has.
    """
    for name in store:
        if not is_store_name(name):
            raise MalformedDocument("no file of a charter has this name", where=name, do="Publish with `seal charter`.")
    for name in sorted(store, key=lambda item: (item == "metadata/timestamp.json", item)):
        path = folder / name
        if path.is_file() and not path.is_symlink() and path.read_bytes() == store[name]:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(store[name])
                os.fchmod(file.fileno(), 0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    for part in ("metadata", "targets"):
        if not (folder / part).is_dir():
            continue
        for name, path in list(_walk(folder / part, f"{part}/", _DEPTH)):
            if name not in store:
                path.unlink()
