"""The cache: inputs by digest, and what was made from them by the digest of everything that went in.

Both halves are safe to share between builds and to delete at any time. A file of the first half is checked against its
name whenever it is used; an entry of the second appears by one rename, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rfc8785

from cvm_image.build.errors import MissingInput, UnusableHost

WAIT_SECONDS = 1800.0
"""How long a build waits for another one in the same cache."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/sealwright/image`, by the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "sealwright" / "image"


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(step: str, *, rules: Sequence[str], **inputs: Any) -> str:
    """The name of what `step` makes from `inputs` (JSON values): a digest over both and over the rules it is made by.

    `rules` are the modules of this package that make it: what an older version of them made is not used.
    """
    here = Path(__file__).parent
    code = {name: digest_file(here / f"{name}.py") for name in rules}
    return hashlib.sha256(rfc8785.dumps({"rules": code, "step": step, "inputs": inputs})).hexdigest()


class Store:
    """A cache folder. `inputs/` holds files by digest, `made/` files and trees by content key.

    `archive`, if given, is a folder of inputs by digest (from `export_inputs`) that is asked before any mirror;
    `inputs` is another store's folder of inputs to use instead of an own one.
    """

    def __init__(self, root: Path, *, archive: Path | None = None, inputs: Path | None = None) -> None:
        self.root = root
        self.logs = root / "logs"
        self.inputs = root / "inputs" if inputs is None else inputs
        self.archive = archive
        for folder in (self.inputs, root / "made", self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def input(self, sha256: str) -> Path:
        """Where the input with this digest lies, or would."""
        return self.inputs / sha256

    def holds(self, sha256: str) -> bool:
        """Whether that input is here and intact; a damaged one is removed."""
        path = self.input(sha256)
        if not path.is_file() and self.archive is not None and (self.archive / sha256).is_file():
            partial = path.with_name(f"{sha256}.partial")
            shutil.copyfile(self.archive / sha256, partial)
            partial.rename(path)
        if not path.is_file():
            return False
        if digest_file(path) == sha256:
            return True
        path.unlink()
        return False

    def export_inputs(self, digests: Iterable[str], archive: Path, *, more: Mapping[str, bytes]) -> int:
        """Copy those inputs into the folder `archive`, by digest, and return how many it then has of them.

        `more` are inputs that are no files of the store (digest → bytes): the recipe itself, and what lies beside it.
        Raises MissingInput for one that is not here, or was damaged.
        """
        archive.mkdir(parents=True, exist_ok=True)
        wanted = sorted(set(digests))
        for sha256 in wanted:
            if not self.holds(sha256):
                raise MissingInput("an input is not in the cache", where=str(self.input(sha256)), do="Lock once more.")
            if not (archive / sha256).is_file() or digest_file(archive / sha256) != sha256:
                partial = archive / f"{sha256}.partial"
                shutil.copyfile(self.input(sha256), partial)
                partial.rename(archive / sha256)
        for sha256, data in more.items():
            partial = archive / f"{sha256}.partial"
            partial.write_bytes(data)
            partial.rename(archive / sha256)
        return len(set(wanted) | set(more))

    def made(self, key: str) -> Path | None:
        """The file or tree that was made under this key, or None."""
        path = self.root / "made" / key
        return path if path.exists() else None

    @contextlib.contextmanager
    def alone(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the cache for one build; another waits, at most `WAIT_SECONDS`. Raises UnusableHost after that."""
        descriptor = os.open(self.root / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            told = False
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UnusableHost(
                            f"another build has held this cache for {WAIT_SECONDS:.0f} s",
                            where=str(self.root),
                            do="End it, or name another cache.",
                        ) from None
                if not told:
                    say("waiting for another build that uses this cache")
                    told = True
                time.sleep(0.5)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[Path]:
        """Yield a new empty folder in which to make it; rename what is at `<folder>/result` to its key at the end.

        If the body raises, nothing is kept.
        """
        folder = Path(tempfile.mkdtemp(prefix="making-", dir=self.root))
        try:
            folder.chmod(0o755)
            yield folder
            target = self.root / "made" / key
            if not target.exists():
                (folder / "result").rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Put `source` at `target` without a second copy on the disk where that is possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def folder_digest(files: Mapping[str, bytes]) -> str:
    """One digest for a set of files by name."""
    return hashlib.sha256(
        rfc8785.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    ).hexdigest()
