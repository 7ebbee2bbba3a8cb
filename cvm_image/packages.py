"""Which source files go into the measured archive."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvm_image.errors import UnusableImage

Platform = Literal["hardware", "virtual"]

SUFFIXES = frozenset({".py", ".rego", ".pem", ".toml", ".json"})
"""What a package consists of in the guest: sources, policies, roots, settings."""

MAX_FILE = 8 << 20
_PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class SourceTree:
    """A Python package's folder, and the patterns of paths in it that stay out (or, with `only`, the ones that go in).

    Patterns match the path below the folder, `/` between its parts, as in `fnmatch` (so `*` also spans folders).
    """

    folder: Path
    leave_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)


def guest_packages(platform: Platform) -> tuple[SourceTree, ...]:
    """Return our packages as a guest on `platform` has them.

    No guest holds the virtual platform, the broker, the witness or the auditor's part of the ledger; a hardware guest
    holds no code that could ask a virtual processor.
    """
    left_out: tuple[str, ...] = ("virtual/*", "broker/*", "witness/*", "ledger/audit*.py", "ledger/retrial*.py")
    if platform == "hardware":
        left_out += ("attester/virtual_port.py",)
    return (
        SourceTree(_PROJECT / "policies"),
        SourceTree(_PROJECT / "attestation", leave_out=left_out),
        SourceTree(_PROJECT / "fl"),
        SourceTree(
            _PROJECT / "appliance",
            only=(
                "__init__.py",
                "data_volume.py",
                "luks_header.py",
                "node.py",
                "sealed_volume.py",
                "user_data.py",
                "user_data_export.py",
                "vault.py",
            ),
        ),
    )


def collect(trees: Sequence[SourceTree | Path]) -> dict[str, bytes]:
    """Return the files of `trees` by their path below the archive's `lib`; a bare folder is taken whole.

    Raises UnusableImage for a folder that is no package, for a symbolic link (what it points to is not what was
    reviewed) and for a name that two trees share.
    """
    files: dict[str, bytes] = {}
    for tree in trees:
        source = tree if isinstance(tree, SourceTree) else SourceTree(tree)
        found = _tree_files(source)
        if f"{source.folder.name}/__init__.py" not in found:
            raise UnusableImage(
                "this folder is no Python package", where=str(source.folder), do="Name a folder with an __init__.py."
            )
        for name, content in found.items():
            if name in files:
                raise UnusableImage(f"{name} comes from two folders", where=str(source.folder), do="Leave one out.")
            files[name] = content
    return files


def _tree_files(tree: SourceTree) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for path in sorted(tree.folder.rglob("*")):
        below = path.relative_to(tree.folder).as_posix()
        if path.suffix not in SUFFIXES or "__pycache__" in path.parts or path.is_dir():
            continue
        if not any(fnmatch.fnmatchcase(below, pattern) for pattern in tree.only):
            continue
        if any(fnmatch.fnmatchcase(below, pattern) for pattern in tree.leave_out):
            continue
        if path.is_symlink() or not path.is_file():
            raise UnusableImage("only regular files can be measured", where=str(path), do="Replace it by a file.")
        content = path.read_bytes()
        if len(content) > MAX_FILE:
            raise UnusableImage(f"this file has more than {MAX_FILE} bytes", where=str(path), do="Leave it out.")
        files[f"{tree.folder.name}/{below}"] = content
    return files
