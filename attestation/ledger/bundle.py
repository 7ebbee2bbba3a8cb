"""An audit bundle: a ledger with all that stands behind it, as a folder that needs nothing else for years.

checkpoint                    the signed head (C2SP signed note), cosigned as the charter demands
entries/00000000.json         each entry's canonical bytes
receipts/00000000.json        its inclusion proof under that head
blobs/<sha256>                evidence, init-data, EARs, certificates, deposits, by their digest
charter/<version>.<stamp>/    each charter that was followed: a TUF store, as `seal charter` reads it
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from attestation.ledger.checkpoint import MAX_CHECKPOINT
from attestation.ledger.entry import MAX_ENTRY, Entry, parse_entry
from attestation.ledger.receipt import Receipt
from policies.errors import Unusable

MAX_FILES: Final = 2_000_000
MAX_FILE: Final = 1024 * 1024
"""Bytes of any file in a bundle."""
DEPTH: Final = 8
CHECKPOINT: Final = "checkpoint"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class HeadLike(Protocol):
    """A signed head and its size."""

    @property
    def size(self) -> int:
        """How many entries."""

    @property
    def checkpoint(self) -> str:
        """The signed note."""


class LedgerReader(Protocol):
    """One snapshot of a broker's database (attestation.broker.storage.Transaction)."""

    def size(self) -> int:
        """How many entries there are."""

    def published(self) -> Any:
        """The signed head that others are shown, cosigned if it has to be: `size`, `checkpoint`."""

    def entries(self, start: int, end: int) -> list[bytes]:
        """Entries' bytes."""

    def blob(self, digest: str) -> bytes | None:
        """A blob."""

    def receipt(self, number: int, head: Any) -> Receipt:
        """An entry's receipt."""


def entry_file(number: int) -> str:
    """Name of an entry."""
    return f"entries/{number:08d}.json"


def receipt_file(number: int) -> str:
    """Name of an entry's receipt."""
    return f"receipts/{number:08d}.json"


def blob_file(digest: str) -> str:
    """Name of a blob."""
    return f"blobs/{digest}"


def charter_folder(entry: Entry) -> str:
    """Folder of the charter that a `charter` entry names."""
    return f"charter/{entry.body['charter']['version']}.{entry.body['timestamp']}"


def blob_references(entry: Entry) -> list[str]:
    """The digests of the blobs that an entry names; a charter's files are not among them, they have their folder."""
    body = entry.body
    found: list[Any] = [body.get("ear"), body.get("full-ear"), body.get("certificate"), body.get("deposit")]
    evidence = body.get("evidence")
    if isinstance(evidence, dict) and body.get("evidence-kept", True) is True:
        found += evidence.values()
    return [digest for digest in found if isinstance(digest, str) and _DIGEST.fullmatch(digest)]


def export_bundle(reader: LedgerReader, folder: Path) -> tuple[int, int]:
    """Write the ledger of `reader`, up to its published head, into the new `folder`.

    Returns how many entries that are, and how many there are beyond, which too few witnesses have cosigned yet.
    Raises Unusable if the folder is not empty or the database has lost something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Unusable("there is something here already", where=str(folder), do="Name a new folder.")
    head = reader.published()
    for number in range(head.size):
        (raw,) = reader.entries(number, number + 1)
        entry = parse_entry(raw)
        _write(folder / entry_file(number), raw)
        _write(folder / receipt_file(number), reader.receipt(number, head).to_bytes())
        for digest in blob_references(entry):
            _copy(folder / blob_file(digest), reader.blob, digest)
        if entry.kind == "charter":
            for name, digest in entry.body["files"].items():
                _copy(folder / charter_folder(entry) / name, reader.blob, digest)
    _write(folder / CHECKPOINT, head.checkpoint.encode("utf-8"))
    return int(head.size), reader.size() - int(head.size)


def list_bundle(folder: Path) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Every file of a bundle by name, and what is no regular file of bearable size (name, why). Raises Unusable."""
    if not folder.is_dir():
        raise Unusable(
            "there is no audit bundle", where=str(folder), do="Name the folder that `seal audit export` made."
        )
    files: dict[str, Path] = {}
    odd: list[tuple[str, str]] = []
    for name, path in _walk(folder, "", DEPTH, odd):
        if len(files) >= MAX_FILES:
            raise Unusable(f"more than {MAX_FILES} files", where=str(folder), do="Name an audit bundle.")
        files[name] = path
    return files, odd


def read_file(path: Path, limit: int = MAX_FILE) -> bytes:
    """A regular file's bytes, at most `limit`. Raises Unusable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unusable("this is no regular file", where=str(path), do="Get the bundle again.")
            raw = file.read(limit + 1)
    except OSError as error:
        raise Unusable(f"it cannot be read: {error.strerror}", where=str(path), do="Get the bundle again.") from error
    if len(raw) > limit:
        raise Unusable(f"it is larger than {limit} bytes", where=str(path), do="Get the bundle again.")
    return raw


def file_limit(name: str) -> int:
    """Bytes of the largest file that may have this name in a bundle."""
    if name == CHECKPOINT:
        return MAX_CHECKPOINT
    return MAX_ENTRY if name.startswith("entries/") else MAX_FILE


def _walk(folder: Path, prefix: str, depth: int, odd: list[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as found:
        for item in sorted(found, key=lambda one: one.name):
            name = f"{prefix}{item.name}"
            if item.is_dir(follow_symlinks=False):
                if depth == 0:
                    odd.append((name, "folders are nested too deeply"))
                else:
                    yield from _walk(Path(item.path), f"{name}/", depth - 1, odd)
            elif item.is_file(follow_symlinks=False):
                yield name, Path(item.path)
            else:
                odd.append((name, "no regular file"))


def _copy(path: Path, blobs: Callable[[str], bytes | None], digest: str) -> None:
    if path.exists():
        return
    content = blobs(digest)
    if content is None:
        raise Unusable("the database has lost a blob", where=digest, do="Restore the database; the ledger names it.")
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise Unusable(f"it cannot be written: {error.strerror}", where=str(path), do="Name another folder.") from error


def strays(files: Mapping[str, Path], known: set[str]) -> list[str]:
    """The files that nothing in the ledger accounts for."""
    return [name for name in files if name not in known]
