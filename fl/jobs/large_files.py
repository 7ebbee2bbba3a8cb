"""Files of a job that are too large for its bundle: the bundle has their digests, and they travel as models do.

A submitter sends them with the job, each sealed under the model key for this job and this digest; the server opens them
once, in memory or in its spool; a site pulls them before its script starts, chunk by chunk, and goes on after a cut. An
approval of the bundle is one of their every byte: what does not have the bundle's digest is refused wherever it comes.
A script finds them as it finds any file of the bundle, beside it and read-only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fl.errors import RecipeUnusable

LARGE: Final = 16 << 20
"""A file that is added with more bytes than this travels by itself."""
MAX_LARGE: Final = 64
MAX_BYTES: Final = 32 << 30
"""All of a job's together."""
SLOWEST: Final = 4 << 20
"""Bytes a second at which sites are waited for while they pull a job's files."""
PIECE: Final = 1 << 20

_Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class LargeFile(BaseModel):
    """One file: where it goes in the bundle, and its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: Annotated[str, Field(min_length=1, max_length=2048)]
    sha256: _Digest
    size: Annotated[int, Field(ge=1, le=MAX_BYTES)]


@dataclass(frozen=True, slots=True)
class FileOnDisk:
    """An author's file, read piece by piece."""

    path: Path
    size: int

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """Its bytes from `offset` on, in pieces of `size`. Raises RecipeUnusable if it is shorter than it was."""
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset < self.size:
                piece = file.read(min(size, self.size - offset))
                if not piece:
                    raise RecipeUnusable(f"{self.path} has become shorter", where="add_file")
                offset += len(piece)
                yield memoryview(piece)

    @property
    def digest(self) -> str:
        """Its SHA-256, in hex."""
        found = hashlib.sha256()
        for piece in self.pieces(0, PIECE):
            found.update(piece)
        return found.hexdigest()


def on_disk(path: Path) -> FileOnDisk:
    """A file as it is now. Raises RecipeUnusable if it cannot be read, or is too large for any job."""
    try:
        size = path.stat().st_size
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "it is not readable")
    except OSError as error:
        raise RecipeUnusable(f"{path} cannot be read: {error.strerror}", where="add_file") from error
    if size > MAX_BYTES:
        raise RecipeUnusable(f"{path} has {size} bytes, a job's files at most {MAX_BYTES}", where="add_file")
    return FileOnDisk(path, size)


def found_in(files: tuple[LargeFile, ...], sources: Mapping[str, Path]) -> dict[str, FileOnDisk]:
    """What is to be sent, by digest, once each. `sources`: each file, by its digest.

    Raises RecipeUnusable for a file that is not there, or not the one that the bundle names.
    """
    found: dict[str, FileOnDisk] = {}
    for file in files:
        source = sources.get(file.sha256)
        if source is None or not source.is_file():
            raise RecipeUnusable(f"the file {file.path} ({file.sha256[:16]}…) is not there to be sent", where="files")
        if file.sha256 in found:
            continue
        one = on_disk(source)
        if one.size != file.size or one.digest != file.sha256:
            raise RecipeUnusable(f"{source} is not the file {file.path} that the bundle names", where="files")
        found[file.sha256] = one
    return found
