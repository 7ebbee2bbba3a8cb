"""Policies that are ready to use: the floor, appraisal and admission, and release policies written for their owner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from policies.documents import NAME_PATTERN, ROLES
from policies.errors import MalformedDocument

_FOLDER: Final = Path(__file__).with_name("rego")
READY_MADE: Final = ("admission", "appraisal", "export", "floor", "peers", "release")
"""Names of the modules; each is the package `sealwright.NAME`."""
FOUNDING: Final = ("admission", "appraisal", "export", "floor", "peers")
"""Those that a new charter begins with."""


@cache
def ready_made(name: str) -> str:
    """Return the text of the ready-made module `name` (one of READY_MADE)."""
    if name not in READY_MADE:
        raise ValueError(f"there is no ready-made policy {name!r}")
    return (_FOLDER / f"{name}.rego").read_text("utf-8")


def shared_policies() -> dict[str, bytes]:
    """Return the ready-made policies that a charter shares, as target files (path → bytes): what founding puts in."""
    return {f"policies/{name}.rego": ready_made(name).encode("utf-8") for name in FOUNDING}


def release_policy(
    *,
    roles: Iterable[str],
    names: Iterable[str] = (),
    images: Iterable[str] = (),
    members: Iterable[str] = (),
    jurisdictions: Iterable[str] = (),
    approved_init_data: Mapping[str, str] | None = None,
    max_session_age_seconds: int = 300,
    max_releases: int = 1000,
    kbs: bool = False,
) -> bytes:
    """Return a release policy: who may have a resource (target `members/OWNER/release/TYPE.TAG.rego`).

    `roles` are required; empty `names`, `images`, `members`, `jurisdictions` do not narrow it further.
    `approved_init_data` maps "role/name" to the init-data digest that the owner approves itself, beyond the enrolment.
    `kbs` opens the resource to stock guests over the Key Broker protocol as well, which binds less than our own.

    Raises MalformedDocument for what is no role, name, digest or positive number.
    """
    approved = dict(approved_init_data or {})
    sets = {"roles": sorted(set(roles)), "names": sorted(set(names)), "images": sorted(set(images))}
    sets |= {"members": sorted(set(members)), "jurisdictions": sorted(set(jurisdictions))}
    wrong = [word for word in sets["roles"] if word not in ROLES]
    named = (*sets["names"], *sets["images"], *sets["members"])
    wrong += [word for word in named if not re.fullmatch(NAME_PATTERN, word)]
    wrong += [word for word in sets["jurisdictions"] if not re.fullmatch(r"[A-Z]{2}(-[A-Z0-9]{1,3})?", word)]
    wrong += [
        f"{place} → {digest}"
        for place, digest in approved.items()
        if not re.fullmatch(r"[a-z]+/[a-z0-9][a-z0-9._-]{0,62}", place) or not re.fullmatch(r"[0-9a-f]{64}", digest)
    ]
    if wrong or not sets["roles"] or max_session_age_seconds < 1 or max_releases < 1:
        raise MalformedDocument(
            "not the parts of a release policy: " + (", ".join(wrong) or "at least one role and numbers above 0"),
            where="release policy",
            do="Give roles and names of guests as they are enrolled, and numbers above 0.",
        )
    constants = {name: _set(words) for name, words in sets.items()}
    constants["approved_init_data"] = json.dumps(approved, sort_keys=True)
    constants["max_session_age_seconds"] = str(max_session_age_seconds)
    constants["max_releases"] = str(max_releases)
    text = ready_made("release")
    for name, literal in constants.items():
        text, count = re.subn(rf"^{name} := .*$", f"{name} := {literal}", text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the ready-made release policy has no constant {name}")
    if kbs:
        text += "\n# Stock guests may have it as well, over the Key Broker protocol.\nkbs := true\n"
    return text.encode("utf-8")


def _set(words: list[str]) -> str:
    return "{" + ", ".join(json.dumps(word) for word in words) + "}" if words else "set()"
