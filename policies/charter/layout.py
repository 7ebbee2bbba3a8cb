"""How a consortium's document becomes TUF roles, and which file may stand where.

One function of the `Consortium` gives all keys, roles and delegations, for those who write metadata and for those who
verify it: metadata that says anything else is refused, so the root's `sealwright` field is the one place to read.

| role | signed by | decides over |
|---|---|---|
| root, targets, snapshot | `threshold` members | members, brokers, thresholds; delegations; versions |
| timestamp | `broker_threshold` brokers | that a snapshot is the current one |
| images, enrolments, code, policies | each its own threshold of members | `images/*`, `enrolments/*/*`, … |
| member-NAME | that member alone | `members/NAME/*/*` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from securesystemslib.signer import Key, SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, Role, Root, Snapshot, Targets, Timestamp

from policies.devices import DeviceIssuer, TaskApproval
from policies.documents import (
    BundleApproval,
    Consortium,
    Document,
    Enrolment,
    ExportBudget,
    ImageReference,
    Split,
    User,
)
from policies.keys import load_public_pem
from policies.vaults import VaultRecovery

CONSORTIUM_FIELD: Final = "sealwright"
"""The field of the TUF root that holds the `Consortium`."""
SIGNED_DIGEST_FIELD: Final = "sealwright-signed-sha256"
"""In the snapshot, beside a role's version: the SHA-256 of the role's signed part. TUF's own hashes are over the file
with its signatures, which would have to be complete before the snapshot is signed; this lets one round of offline
signing do, and still pins the content."""

SHARED_ROLES: Final = ("images", "enrolments", "code", "policies")
MEMBER_ROLE: Final = "member-"
_SHARED_PATHS: Final = {
    "images": "images/*",
    "enrolments": "enrolments/*/*",
    "code": "code/*",
    "policies": "policies/*",
}
POLICY_FILES: Final = {
    "floor.rego": "sealwright.floor",
    "appraisal.rego": "sealwright.appraisal",
    "admission.rego": "sealwright.admission",
    "peers.rego": "sealwright.peers",
    "export.rego": "sealwright.export",
    "appraisal.toml": None,
}
"""What `policies/` may hold, and the Rego package that each module must declare."""
RELEASE_PACKAGE: Final = "sealwright.release"

_NAME: Final = r"[a-z0-9][a-z0-9._-]{0,62}"
_TYPE: Final = r"[a-z0-9][a-z0-9_-]{0,62}"
_JSON_TARGETS: Final[tuple[tuple[str, type[Document]], ...]] = (
    (rf"images/(?P<name>{_NAME})\.json", ImageReference),
    (rf"enrolments/(?P<role>broker|server|site|inner|gateway)/(?P<name>{_NAME})\.json", Enrolment),
    (rf"enrolments/vault-(?P<role>broker|server|site|inner|gateway)/(?P<name>{_NAME})\.json", VaultRecovery),
    (rf"enrolments/device-issuer/(?P<name>{_NAME})\.json", DeviceIssuer),
    (r"code/(?P<bundle>[0-9a-f]{64})\.json", BundleApproval),
    (r"code/device-(?P<task>[0-9a-f]{64})\.json", TaskApproval),
    (rf"members/(?P<member>{_NAME})/users/(?P<name>{_NAME})\.json", User),
    (rf"members/(?P<member>{_NAME})/budget/exports\.json", ExportBudget),
    (rf"members/(?P<member>{_NAME})/split/(?P<type>{_TYPE})\.(?P<tag>{_NAME})\.json", Split),
)
_RELEASE_TARGET: Final = re.compile(rf"members/(?P<member>{_NAME})/release/(?P<type>{_TYPE})\.(?P<tag>{_NAME})\.rego")


def tuf_key(pem: str) -> SSlibKey:
    """Return the TUF form of an Ed25519 public key in PEM; its key id is the hash of the key, never a chosen one."""
    return SSlibKey.from_crypto(load_public_pem(pem))


def key_names(consortium: Consortium) -> dict[str, str]:
    """Return key id → the name of the member or broker whose key it is."""
    names = {tuf_key(member.public_key).keyid: member.name for member in consortium.members}
    names.update({tuf_key(broker.signing_key).keyid: f"broker {broker.name}" for broker in consortium.brokers})
    return names


def root_keys(consortium: Consortium) -> dict[str, Key]:
    """Return the keys that the TUF root lists: every member's and every broker's."""
    pems = [*(member.public_key for member in consortium.members), *(b.signing_key for b in consortium.brokers)]
    return {key.keyid: key for key in map(tuf_key, pems)}


def root_roles(consortium: Consortium) -> dict[str, Role]:
    """Return the four top-level roles."""
    members = [tuf_key(member.public_key).keyid for member in consortium.members]
    brokers = [tuf_key(broker.signing_key).keyid for broker in consortium.brokers]
    return {
        Root.type: Role(list(members), consortium.threshold),
        Targets.type: Role(list(members), consortium.threshold),
        Snapshot.type: Role(list(members), consortium.threshold),
        Timestamp.type: Role(brokers, consortium.broker_threshold),
    }


def delegations(consortium: Consortium) -> Delegations:
    """Return the delegations of the top-level targets role: the shared roles and one role a member."""
    keys: dict[str, Key] = {}
    for member in consortium.members:
        key = tuf_key(member.public_key)
        keys[key.keyid] = key
    roles = {
        role: DelegatedRole(role, list(keys), consortium.threshold_for(role), True, [_SHARED_PATHS[role]])
        for role in SHARED_ROLES
    }
    for member in consortium.members:
        name = MEMBER_ROLE + member.name
        own = tuf_key(member.public_key).keyid
        roles[name] = DelegatedRole(name, [own], 1, True, [f"members/{member.name}/*/*"])
    return Delegations(keys, roles)


def delegated_roles(consortium: Consortium) -> tuple[str, ...]:
    """Return the names of all delegated roles, in their order."""
    return (*SHARED_ROLES, *(MEMBER_ROLE + member.name for member in consortium.members))


def role_of(path: str) -> str | None:
    """Return the delegated role that decides over the target `path`, or None if no role may hold it."""
    if rego_package(path) is not None or path == "policies/appraisal.toml" or json_target(path) is not None:
        first, *rest = path.split("/")
        return MEMBER_ROLE + rest[0] if first == "members" else first
    return None


def json_target(path: str) -> tuple[type[Document], dict[str, str]] | None:
    """Return the kind of document that the target `path` holds and what the path says of it, or None."""
    for pattern, kind in _JSON_TARGETS:
        found = re.fullmatch(pattern, path)
        if found:
            return kind, found.groupdict()
    return None


def rego_package(path: str) -> str | None:
    """Return the package that the Rego module at the target `path` must declare, or None if no module stands there."""
    if path.startswith("policies/"):
        return POLICY_FILES.get(path.removeprefix("policies/"))
    return RELEASE_PACKAGE if _RELEASE_TARGET.fullmatch(path) else None


def release_path(resource: str) -> str | None:
    """Return the target that holds the release policy of `resource` (REPOSITORY/TYPE/TAG).

    None if there can be none: a TYPE with a dot would make two resources share one file name.
    """
    repository, kind, tag = resource.split("/")
    path = f"members/{repository}/release/{kind}.{tag}.rego"
    return path if re.fullmatch(_TYPE, kind) and _RELEASE_TARGET.fullmatch(path) else None


def split_path(resource: str) -> str | None:
    """Return the target that says how `resource` (REPOSITORY/TYPE/TAG) is split, or None if there can be none."""
    repository, kind, tag = resource.split("/")
    path = f"members/{repository}/split/{kind}.{tag}.json"
    return path if re.fullmatch(_TYPE, kind) and json_target(path) is not None else None


def resource_of(path: str) -> str | None:
    """Return the resource whose release policy the target `path` is, or None."""
    found = _RELEASE_TARGET.fullmatch(path)
    return f"{found['member']}/{found['type']}/{found['tag']}" if found else None


def metadata_file(role: str, version: int) -> str:
    """Return the name of a role's metadata in a store (consistent snapshots; the timestamp has one name)."""
    return f"metadata/{role}.json" if role == Timestamp.type else f"metadata/{version}.{role}.json"


def target_file(path: str, sha256: str) -> str:
    """Return the name of a target in a store (consistent snapshots: the digest precedes the file's name)."""
    folder, _, name = path.rpartition("/")
    return f"targets/{folder}/{sha256}.{name}"


def listed(names: Iterable[str]) -> str:
    """Return names as a sentence has them: `a, b and c`; `nobody` for none."""
    several = sorted(names)
    if not several:
        return "nobody"
    return several[0] if len(several) == 1 else f"{', '.join(several[:-1])} and {several[-1]}"
