"""What Python distributions are installed here, as their installers' own records have it (PyPA core metadata)."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

OWN: Final = "sealwright"
_NOT_OF_THE_WHEEL: Final = frozenset({"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json"})


@dataclass(frozen=True, slots=True)
class Build:
    """What the installation of a wheel wrote down of it."""

    tag: str
    """For which interpreter and platform it is, such as `cp311-cp311-manylinux_2_28_x86_64`."""
    contents: str
    """SHA-256 (hex) of path and digest of every file of the wheel: the same wherever it is installed."""


@dataclass(frozen=True, slots=True)
class Packages:
    """Distributions by their normalised names."""

    versions: Mapping[str, str]
    providers: Mapping[str, Collection[str]]
    """Of each top-level module, the distributions that bring it; our own is none of them."""
    build: Callable[[str], Build | None]
    """The build of an installed distribution; None where its installer kept no record of it."""
    needs: Callable[[str], Collection[str]]
    """The installed distributions that one asks for in this environment, without extras."""


def normalised(name: str) -> str:
    """A distribution's name as names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def packages_here() -> Packages:
    """Those of this process's interpreter, which scripts in its sandboxes have, too. They are looked for once."""
    versions: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        versions.setdefault(normalised(found.metadata["Name"]), found.version)  # the first on the path is imported
    providers = {
        module: frozenset(map(normalised, names)) - {OWN}
        for module, names in importlib.metadata.packages_distributions().items()
    }
    return Packages(versions, providers, _build, lambda name: _needs(name) & versions.keys())


@cache
def _build(name: str) -> Build | None:
    found = importlib.metadata.distribution(name)
    wheel, record = found.read_text("WHEEL"), found.read_text("RECORD")
    tags = sorted(line.partition(":")[2].strip() for line in (wheel or "").splitlines() if line.startswith("Tag:"))
    if not tags or not record:
        return None
    rows = sorted((row[0], row[1]) for row in csv.reader(record.splitlines()) if len(row) == 3 and _of_the_wheel(*row))
    return Build(tags[0], hashlib.sha256(repr(rows).encode()).hexdigest()) if rows else None


def _of_the_wheel(path: str, digest: str, _size: str) -> bool:
    """Whether a row of RECORD is of the wheel, and not of what its installation added."""
    own = path.rpartition("/")[2] in _NOT_OF_THE_WHEEL and ".dist-info/" in path
    return bool(digest) and not path.startswith(("..", "/")) and not path.endswith(".pyc") and not own


@cache
def _needs(name: str) -> frozenset[str]:
    from packaging.requirements import InvalidRequirement, Requirement

    found = set()
    for line in importlib.metadata.requires(name) or ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue  # of an old package: pip passes it over, too
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            found.add(normalised(wanted.name))
    return frozenset(found)
