"""What is different between two images: settings, files, measured sources, dependencies, measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from attestation.errors import MalformedArchive
from attestation.evidence.cpio import read_archive
from cvm_image.manifest import ImageManifest
from cvm_image.verify import file_digest, load_image

MEASURED = ("firmware.fd", "kernel", "initrd", "cmdline")
"""The files that enter the launch measurement; the root file system does so through the command line."""

MAX_SBOM = 64 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `before` or `after` is None if the thing is on one side only.

    `kind` is one of `setting`, `file`, `measured file`, `archive`, `component`, `measurement`, and inside built images
    (`cvm_image.build.contents`) `word`, `initrd file`, `root file`.
    """

    kind: str
    name: str
    before: str | None
    after: str | None


def diff_images(one: Path, other: Path) -> tuple[Change, ...]:
    """Return what changed from the image in folder `one` to the one in `other`, as their files are now.

    Manifests are read, not verified; file digests are taken from the files. Raises UnusableImage if a folder is no
    image.
    """
    before, after = load_image(one), load_image(other)
    changes = compare("setting", _settings(before), _settings(after))
    for change in compare("file", _digests(one, before), _digests(other, after)):
        kind = "measured file" if change.name in MEASURED else "file"
        changes.append(Change(kind, change.name, change.before, change.after))
    changes += compare("archive", _archive(one / "initrd"), _archive(other / "initrd"))
    changes += compare("component", _components(one / "sbom.cdx.json"), _components(other / "sbom.cdx.json"))
    changes += compare("measurement", _measurements(before), _measurements(after))
    return tuple(changes)


def compare(kind: str, before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """Return what differs between two sets of named values, by name."""
    return [
        Change(kind, name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _settings(manifest: ImageManifest) -> dict[str, str]:
    return {name: str(value) for name, value in manifest.model_dump(exclude={"files", "measurements"}).items()}


def _measurements(manifest: ImageManifest) -> dict[str, str]:
    return {
        f"{value.vcpu_model} {value.vcpus} {value.vmm} {value.guest_features:#x}": value.measurement
        for value in manifest.measurements
    }


def _digests(folder: Path, manifest: ImageManifest) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in manifest.files if (folder / name).is_file()}


def _archive(path: Path) -> dict[str, str]:
    """Return the digests of an archive's files; empty for one that is missing, packed, or not ours."""
    try:
        entries = read_archive(path.read_bytes())
    except (OSError, MalformedArchive):
        return {}
    return {entry.name: sha256(entry.data).hexdigest() for entry in entries if entry.data is not None}


def _components(path: Path) -> dict[str, str]:
    """Return the version (of a package) or the digest (of a file) of each component of a bill of materials."""
    try:
        raw = path.read_bytes()
        document: Any = json.loads(raw) if len(raw) <= MAX_SBOM else {}
        return {
            f"{part['type']} {_place(part)}{part['name']}": str(part.get("version") or part["hashes"][0]["content"])
            for part in document["components"]
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def _place(part: dict[str, Any]) -> str:
    """Where in the image a component is, if that is said: one package may be in root and initrd."""
    named = {one["name"]: one["value"] for one in part.get("properties", ())}
    return f"{named['sealwright:place']}/" if "sealwright:place" in named else ""
