"""What a set of wheels still needs for the guest's Python: each one's own requirements, as they read in the guest.

pip downloads for another Python than the one that runs it, but reads conditions such as `python_version < "3.12"` by
the one that runs it. So what it brought is held against the wheels' own words, and asked for again until all is there.

Sources: PEP 508 (conditions), the core metadata specification (`Requires-Dist`), the wheel specification.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from email.parser import BytesHeaderParser
from pathlib import Path

from packaging.markers import InvalidMarker, UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from cvm_image.build.errors import BuildFailed

MAX_METADATA = 1 << 20


def guest_environment(python: str) -> dict[str, str]:
    """The variables of PEP 508 as they are in the guest; `python` is a version such as 3.13."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def needed_by(
    roots: Sequence[str], wheels: Mapping[str, Sequence[str]], environment: Mapping[str, str], provided: Sequence[str]
) -> tuple[set[str], list[str]]:
    """Walk from the requirements `roots`; return the names that are needed, and requirements of what is not there.

    `wheels` maps the canonical name of what is there to its own requirements. What is `provided` by something else is
    neither needed nor looked into. Raises BuildFailed for a requirement that cannot be read.
    """
    needed: set[str] = set()
    missing: set[str] = set()
    waiting = [(root, frozenset[str]()) for root in roots]
    seen = set(waiting)
    while waiting:
        text, extras = waiting.pop()
        requirement = _applies(text, extras, environment)
        if requirement is None:
            continue
        name = canonicalize_name(requirement.name)
        if name in provided:
            continue
        if name not in wheels:
            requirement.marker = None  # it applies in the guest, and pip would ask its own Python
            missing.add(str(requirement))
            continue
        needed.add(name)
        for own in wheels[name]:
            further = (own, frozenset(requirement.extras))
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return needed, sorted(missing)


def read_requirements(wheel: Path) -> tuple[str, ...]:
    """The `Requires-Dist` lines of a wheel. Raises BuildFailed for a file that is no wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [one for one in archive.infolist() if one.filename.endswith(".dist-info/METADATA")]
            named = [one for one in found if one.filename.count("/") == 1]
            if len(named) != 1 or named[0].file_size > MAX_METADATA:
                raise BuildFailed("the wheel has no metadata", where=wheel.name, do="Lock another version of it.")
            headers = BytesHeaderParser().parsebytes(archive.read(named[0]))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise BuildFailed(f"this is no wheel: {error}", where=wheel.name, do="Lock another version of it.") from None
    return tuple(str(line) for line in headers.get_all("Requires-Dist", []))


def _applies(text: str, extras: frozenset[str], environment: Mapping[str, str]) -> Requirement | None:
    """The requirement, if it holds in that environment for any of the extras that were asked for."""
    try:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *sorted(extras))):
            return requirement
    except (InvalidRequirement, InvalidMarker, UndefinedComparison, UndefinedEnvironmentName) as error:
        raise BuildFailed(
            f"a wheel's requirement cannot be read: {error}", where=text[:80], do="Lock without it."
        ) from None
    return None
