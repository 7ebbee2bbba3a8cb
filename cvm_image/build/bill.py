"""The bill of materials of a built image: CycloneDX of every locked package, wheel and file of ours in it."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cvm_image.build.lock import Lock, LockedPackage
from cvm_image.build.provenance import package_url
from cvm_image.build.workload import File

_NAMESPACE = uuid.UUID("5ea1ed00-0000-5000-8000-000000000002")


def bill_of_materials(lock: Lock, files: Mapping[str, File], *, version: str) -> bytes:
    """Return CycloneDX 1.6 JSON: the packages of base, kernel and firmware, the wheels, and the workload's own files.

    Of the tools tree only what the initrd takes from it is named. The same input gives the same bytes; there is no time
    in it.
    """
    in_initrd = [one for one in lock.tools if one.name in {"busybox-static", "dmsetup"}]
    parts = [
        *_packages(lock.base, "root"),
        *_packages(lock.kernel, "kernel"),
        *_packages(lock.firmware, "firmware"),
        *_packages(in_initrd, "initrd"),
        *_packages(lock.driver, "driver"),
    ]
    parts += [
        _part("library", f"pkg:pypi/{wheel.name}@{wheel.version}", wheel.name, wheel.version, wheel.sha256, place)
        for place, wheels in (("root", lock.wheels), ("gpu-sdk", lock.sdk))
        for wheel in wheels
    ]
    parts += [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(file.data).hexdigest()}],
        }
        for name, file in sorted(files.items())
    ]
    subject = {"type": "operating-system", "bom-ref": f"image:{lock.recipe}", "name": lock.recipe, "version": version}
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


def _packages(packages: Sequence[LockedPackage], place: str) -> list[dict[str, Any]]:
    return [
        _part(
            "library",
            package_url(one),
            one.name,
            one.version,
            one.sha256,
            place,
        )
        for one in packages
    ]


def _part(kind: str, purl: str, name: str, version: str, sha256: str, place: str) -> dict[str, Any]:
    return {
        "type": kind,
        "bom-ref": f"{place}:{purl}",
        "name": name,
        "version": version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "properties": [{"name": "sealwright:place", "value": place}],
    }
