"""Making proposals: founding a charter, changing one, and both in one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from tuf.api.metadata import Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets

from policies.charter.content import Charter
from policies.charter.layout import (
    CONSORTIUM_FIELD,
    MEMBER_ROLE,
    SIGNED_DIGEST_FIELD,
    delegated_roles,
    delegations,
    metadata_file,
    role_of,
    root_keys,
    root_roles,
    target_file,
)
from policies.charter.proposal import Proposal
from policies.charter.signing import (
    AnyKey,
    current_charter,
    publish,
    refusal,
    review,
    sign,
)
from policies.charter.timestamps import TIMESTAMP_LIFETIME, sign_timestamp
from policies.charter.trust import metadata_bytes, parse_metadata, signed_digest
from policies.documents import Consortium


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long each kind of metadata is valid from the moment of the proposal (at publishing for the timestamp)."""

    root: timedelta = timedelta(days=730)
    roles: timedelta = timedelta(days=365)
    snapshot: timedelta = timedelta(days=365)
    timestamp: timedelta = TIMESTAMP_LIFETIME


@dataclass(frozen=True, slots=True)
class Changes:
    """What a proposal changes: target files to `put` (path → bytes) and to `remove`, the consortium, roles to `renew`.

    `renew` names roles ("root", "targets", "images", … "member-NAME") to be issued again with a new expiry although
    they stay the same.
    """

    put: Mapping[str, bytes] = field(default_factory=dict)
    remove: frozenset[str] = frozenset()
    consortium: Consortium | None = None
    renew: frozenset[str] = frozenset()


def propose_founding(
    consortium: Consortium,
    files: Mapping[str, bytes],
    at: datetime,
    *,
    note: str = "",
    lifetimes: Lifetimes | None = None,
) -> Proposal:
    """Return the proposal that founds a charter of `consortium` with the target `files` (path → bytes).

    Raises ProposalRefused with every reason if a file is not what its path demands.
    """
    return _assemble({}, None, consortium, dict(files), frozenset(), at, note, lifetimes or Lifetimes())


def propose(
    store: Mapping[str, bytes],
    changes: Changes,
    at: datetime,
    *,
    root: bytes | None = None,
    note: str = "",
    lifetimes: Lifetimes | None = None,
) -> Proposal:
    """Return the proposal that makes `changes` to the charter in `store` (trusted from `root`, or its own first root).

    An expired charter may be changed: that is how it is renewed. Raises ProposalRefused if the store does not hold
    otherwise, if the changes change nothing, or if what they make would not hold.
    """
    current = current_charter(store, root)
    files = dict(current.files)
    lost = sorted(changes.remove - set(files))
    if lost:
        raise refusal("nothing to remove", [f"{path}: is not in the charter" for path in lost])
    for path in changes.remove:
        del files[path]
    files.update(changes.put)
    consortium = changes.consortium or current.consortium
    if files == current.files and consortium == current.consortium and not changes.renew:
        raise refusal("this changes nothing", ["the charter says all of this already"])
    return _assemble(store, current, consortium, files, changes.renew, at, note, lifetimes or Lifetimes())


def _assemble(
    base: Mapping[str, bytes],
    current: Charter | None,
    consortium: Consortium,
    files: Mapping[str, bytes],
    renew: frozenset[str],
    at: datetime,
    note: str,
    lifetimes: Lifetimes,
) -> Proposal:
    by_role: dict[str, dict[str, bytes]] = {role: {} for role in delegated_roles(consortium)}
    strays = [f"{path}: no file of this charter stands here" for path in files if role_of(path) not in by_role]
    if strays:
        raise refusal("some files have no place in the charter", strays)
    for path, raw in files.items():
        by_role[str(role_of(path))][path] = raw
    before = dict(current.versions) if current else {}
    issued: dict[str, Metadata[Any]] = {}
    roles_expire, root_expires = (_whole(at + life) for life in (lifetimes.roles, lifetimes.root))
    if current is None or consortium != current.consortium or Root.type in renew:
        issued[Root.type] = Metadata(
            Root(
                version=before.get(Root.type, 0) + 1,
                expires=root_expires,
                keys=root_keys(consortium),
                roles=root_roles(consortium),
                consistent_snapshot=True,
                unrecognized_fields={CONSORTIUM_FIELD: consortium.to_json()},
            )
        )
    wanted = delegations(consortium)
    if current is None or Targets.type in renew or _signers_differ(current.consortium, consortium):
        number = before.get(Targets.type, 0) + 1
        issued[Targets.type] = Metadata(Targets(version=number, expires=roles_expire, delegations=wanted))
    targets: dict[str, bytes] = {}
    for role, content in by_role.items():
        if _unchanged(role, content, current, wanted) and role not in renew:
            continue
        listing = {path: TargetFile.from_data(path, raw, ["sha256"]) for path, raw in sorted(content.items())}
        issued[role] = Metadata(Targets(version=before.get(role, 0) + 1, expires=roles_expire, targets=listing))
        targets.update({target_file(path, listing[path].hashes["sha256"]): raw for path, raw in content.items()})
    issued[Snapshot.type] = Metadata(
        Snapshot(
            version=before.get(Snapshot.type, 0) + 1,
            expires=_whole(at + lifetimes.snapshot),
            meta={
                f"{role}.json": _pin(role, issued.get(role), base, before)
                for role in (Targets.type, *by_role)
                if role in issued or role in before
            },
        )
    )
    metadata = {metadata_file(role, item.signed.version): metadata_bytes(item) for role, item in issued.items()}
    proposal = Proposal(note, dict(base), metadata, {name: raw for name, raw in targets.items() if name not in base})
    review(proposal, at)
    return proposal


def _signers_differ(old: Consortium, new: Consortium) -> bool:
    """Whether the delegations, or who signs them, change: the old signatures may then no longer do."""
    if delegations(old).to_dict() != delegations(new).to_dict():
        return True
    return root_roles(old)[Targets.type].to_dict() != root_roles(new)[Targets.type].to_dict()


def _unchanged(role: str, content: Mapping[str, bytes], current: Charter | None, wanted: Delegations) -> bool:
    """Whether the metadata of a delegated role can stay as it is: same files, same signers.

    A member without resources needs no file of its own, and nobody has to wait for its signature.
    """
    had = current is not None and role in current.versions
    if current is None or not had:
        return role.startswith(MEMBER_ROLE) and not content
    if content != {path: raw for path, raw in current.files.items() if role_of(path) == role}:
        return False
    old = (delegations(current.consortium).roles or {}).get(role)
    new = (wanted.roles or {}).get(role)
    return old is not None and new is not None and old.to_dict() == new.to_dict()


def _pin(role: str, issued: Metadata[Any] | None, base: Mapping[str, bytes], before: Mapping[str, int]) -> MetaFile:
    metadata: Metadata[Any] | None = issued
    if metadata is None:
        name = metadata_file(role, before[role])
        metadata, reasons = parse_metadata(Targets, name, base[name])
        if metadata is None:
            raise refusal("the charter to change does not hold", reasons)
    return MetaFile(metadata.signed.version, unrecognized_fields={SIGNED_DIGEST_FIELD: signed_digest(metadata)})


def _whole(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)


def found(
    consortium: Consortium,
    files: Mapping[str, bytes],
    member_keys: Iterable[AnyKey],
    broker_keys: Iterable[AnyKey],
    at: datetime,
    *,
    lifetimes: Lifetimes | None = None,
) -> dict[str, bytes]:
    """Found a charter in one step with the keys at hand: propose, sign with each, publish, put the time on.

    Raises ProposalRefused with every reason, as the four steps do.
    """
    lives = lifetimes or Lifetimes()
    proposal = propose_founding(consortium, files, at, lifetimes=lives)
    return _carry_out({}, proposal, member_keys, broker_keys, at, lives)


def amend(
    store: Mapping[str, bytes],
    changes: Changes,
    member_keys: Iterable[AnyKey],
    broker_keys: Iterable[AnyKey],
    at: datetime,
    *,
    lifetimes: Lifetimes | None = None,
) -> dict[str, bytes]:
    """Change a charter in one step with the keys at hand: the same four steps as `found`."""
    lives = lifetimes or Lifetimes()
    return _carry_out(store, propose(store, changes, at, lifetimes=lives), member_keys, broker_keys, at, lives)


def _carry_out(
    store: Mapping[str, bytes],
    proposal: Proposal,
    member_keys: Iterable[AnyKey],
    broker_keys: Iterable[AnyKey],
    at: datetime,
    lifetimes: Lifetimes,
) -> dict[str, bytes]:
    for key in member_keys:
        proposal = sign(proposal, key, at)
    new = publish(store, proposal, at)
    for key in broker_keys:
        new = sign_timestamp(new, key, at, lifetimes.timestamp)
    return new
