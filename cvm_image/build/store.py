"""The cache: inputs by digest, and what was made from them by the digest of everything that went in.

Both halves are safe to share between builds and to delete at any time. A file of the first half is checked against its
name whenever it is used; an entry of the second appears by one rename, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rfc8785

RULES = "1"
"""Changes when the build's own rules change in a way that changes its results: what older rules made is not used."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/sealwright/image`, by the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "sealwright" / "image"


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(step: str, **inputs: Any) -> str:
    """The name of what `step` makes from `inputs` (JSON values): a digest over both and the build's rules."""
    return hashlib.sha256(rfc8785.dumps({"rules": RULES, "step": step, "inputs": inputs})).hexdigest()


class Store:
    """A cache folder. `inputs/` holds files by digest, `made/` files and trees by content key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root / "logs"
        for folder in (root / "inputs", root / "made", self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def input(self, sha256: str) -> Path:
        """Where the input with this digest lies, or would."""
        return self.root / "inputs" / sha256

    def holds(self, sha256: str) -> bool:
        """Whether that input is here and intact; a damaged one is removed."""
        path = self.input(sha256)
        if not path.is_file():
            return False
        if digest_file(path) == sha256:
            return True
        path.unlink()
        return False

    def made(self, key: str) -> Path | None:
        """The file or tree that was made under this key, or None."""
        path = self.root / "made" / key
        return path if path.exists() else None

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
            if target.is_dir():
                shutil.rmtree(target)
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
