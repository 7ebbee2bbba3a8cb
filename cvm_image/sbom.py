"""The bill of materials: a CycloneDX document of what the guest is made of, from the dependency lock alone."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from cvm_image.errors import UnusableImage

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!_-]+)")
_REQUIREMENT = re.compile(r"\s*(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")
_NAMESPACE = uuid.UUID("5ea15ea1-0000-4000-8000-000000000003")
_SELF = "sealwright"


def read_lock(lock: bytes) -> dict[str, str]:
    """Return normalised name → version of a constraints file. Raises UnusableImage for a line of another form."""
    pins: dict[str, str] = {}
    for number, line in enumerate(lock.decode("utf-8", "replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _PIN.fullmatch(text.partition(";")[0].strip())
        if found is None:
            raise UnusableImage(
                f"line {number} is no pin: {text[:80]!r}", where="dependency lock", do="Write NAME==VERSION."
            )
        pins[normalise(found["name"])] = found["version"]
    return pins


def runtime_closure(pins: Mapping[str, str], roots: tuple[str, ...] = (_SELF,)) -> dict[str, str]:
    """Return the pins that the `roots` need at run time, found by walking the installed packages' own requirements.

    Requirements of extras are not followed; a requirement that is not installed does not apply to this platform.
    """
    needed: dict[str, str] = {}
    waiting = [normalise(root) for root in roots]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        if name in pins:
            needed[name] = pins[name]
        try:
            requirements = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            needed.pop(name, None)
            continue
        for requirement in requirements:
            found = _REQUIREMENT.match(requirement)
            if found is None or "extra ==" in requirement.replace('"', "'").partition(";")[2]:
                continue
            other = normalise(found["name"])
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return dict(sorted(needed.items()))


def make_sbom(name: str, version: str, components: Mapping[str, str], measured: Mapping[str, bytes]) -> bytes:
    """Return the CycloneDX 1.6 JSON of an image: third-party `components` (name → version) and `measured` files.

    The same input gives the same bytes: the serial number is derived from the content, and there is no time in it.
    """
    parts: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{component}@{pinned}",
            "name": component,
            "version": pinned,
            "purl": f"pkg:pypi/{component}@{pinned}",
        }
        for component, pinned in sorted(components.items())
    ]
    parts += [
        {
            "type": "file",
            "bom-ref": f"file:{path}",
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
        }
        for path, content in sorted(measured.items())
    ]
    subject = {"type": "operating-system", "bom-ref": f"image:{name}", "name": name, "version": version}
    body: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": parts,
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    body["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}"
    return json.dumps(body, indent=2, sort_keys=True).encode() + b"\n"


def normalise(name: str) -> str:
    """Return a package's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
