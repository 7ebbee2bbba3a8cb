"""What differs inside two built images: words of the command line, files of the initrd, files of the root."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from attestation.evidence.launch import MAX_CMDLINE
from cvm_image.build.disk import read_argument
from cvm_image.build.opening import Opened, opened
from cvm_image.build.store import digest_file
from cvm_image.build.tools import Tools
from cvm_image.difference import Change, compare
from cvm_image.files import read_file


def is_built(folder: Path) -> bool:
    """Whether the folder's command line names a root in the form of this build (a generated image's does not)."""
    path = folder / "cmdline"
    return path.is_file() and read_argument(read_file(path, MAX_CMDLINE).decode("ascii", "replace")) is not None


def diff_contents(one: Path, other: Path, tools: Tools) -> tuple[Change, ...]:
    """Return what changed inside, from the built image in `one` to that in `other`.

    Kinds are `word` (of the command line), `initrd file` and `root file`; a file's value is its mode and its SHA-256,
    or where its link leads. Raises what opening an image raises.
    """
    with opened(one, tools) as before, opened(other, tools) as after:
        return (
            *compare("word", _words(before), _words(after)),
            *compare("initrd file", _initrd(before), _initrd(after)),
            *compare("root file", _root(before), _root(after)),
        )


def _words(image: Opened) -> dict[str, str]:
    return {word.partition("=")[0]: word for word in image.cmdline.split(" ")}


def _initrd(image: Opened) -> Mapping[str, str]:
    return {
        entry.name: f"{'0755' if entry.executable else '0644'} {hashlib.sha256(entry.data).hexdigest()}"
        for entry in image.initrd
        if entry.data is not None
    }


def _root(image: Opened) -> Mapping[str, str]:
    """Every file of the root as the guest sees it: the workload's before the base's."""
    found: dict[str, str] = {}
    for name, path in image.walk():  # the base first, so that the workload's replaces it
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = f"{path.stat().st_mode & 0o7777:04o} {digest_file(path)}"
    return found
