"""Reading, signing and publishing proposals, and putting the time on a charter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, Root, Snapshot, T, Targets

from policies.charter.content import Charter
from policies.charter.layout import (
    MEMBER_ROLE,
    SHARED_ROLES,
    delegations,
    key_names,
    listed,
    root_roles,
    tuf_key,
)
from policies.charter.proposal import FIRST_ROOT, TIMESTAMP_FILE, Proposal, newest_snapshot
from policies.charter.trust import Inspection, Shortfall, inspect, metadata_bytes, parse_metadata
from policies.errors import ProposalRefused
from policies.keys import public_pem

_SIGNED_IN_TURN: Final = "Compare what it says with what you expect; ask its author for a new one if in doubt."


class SigningKey(Protocol):
    """A private Ed25519 key wherever it lives (file, PKCS#11 token)."""

    def public_pem(self) -> str:
        """Return the public half in PEM."""

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes of the signature over `data`."""


AnyKey = Ed25519PrivateKey | SigningKey


def current_charter(store: Mapping[str, bytes], root: bytes | None = None) -> Charter:
    """Return the charter in `store` whatever the time and without its timestamp: what a change starts from."""
    trusted = root or store.get(FIRST_ROOT, b"")
    if newest_snapshot(store) == 0:
        raise refusal("the charter to change does not hold", ["it has no snapshot"])
    charter, work = inspect(store, trusted, None, snapshot=newest_snapshot(store))
    if charter is None or work.shortfalls:
        raise refusal("the charter to change does not hold", all_reasons(work))
    return charter


def refusal(what: str, reasons: list[str], do: str = "Correct the change and propose again.") -> ProposalRefused:
    """Return the refusal of a proposal with its reasons."""
    return ProposalRefused(what, where="proposal", do=do, reasons=tuple(reasons))


def all_reasons(work: Inspection) -> list[str]:
    """Return every reason of an inspection, missing signatures included."""
    return [*work.reasons, *map(str, work.shortfalls)]


def review(proposal: Proposal, at: datetime, *, root: bytes | None = None) -> tuple[Charter, tuple[Shortfall, ...]]:
    """Judge a proposal from `root` (default: its own first root); return what it makes and which signatures it lacks.

    Raises ProposalRefused with every reason but missing signatures: a proposal that passes needs nothing else.
    """
    known: Charter | None = None
    if proposal.base:
        known = current_charter(proposal.base, root)
    elif root is not None and root != proposal.root:
        raise refusal("this proposal founds another charter than the one you trust", ["it brings its own first root"])
    charter, work = inspect(proposal.store(), root or proposal.root, at, snapshot=proposal.version)
    reasons = list(work.reasons)
    if charter is None:
        raise refusal("the proposal would make a charter that does not hold", reasons)
    if known is not None:
        reasons.extend(_steps(known, charter))
    if reasons:
        raise refusal("the proposal would make a charter that does not hold", reasons)
    return charter, tuple(work.shortfalls)


def _steps(known: Charter, charter: Charter) -> list[str]:
    """A proposal takes each role one version further at most, and the snapshot exactly one."""
    reasons = []
    for role, version in charter.versions.items():
        before = known.versions.get(role, 0)
        if role in (Root.type, *SHARED_ROLES, Targets.type) or role.startswith(MEMBER_ROLE):
            if version not in (before, before + 1):
                reasons.append(f"{role}: goes from version {before} to {version}")
            elif version == before and charter.digests[role] != known.digests[role]:
                reasons.append(f"{role}: version {version} is changed without a new version")
    if charter.version != known.version + 1:
        reasons.append(f"the charter goes from version {known.version} to {charter.version}")
    return reasons


def signer_pem(key: AnyKey) -> str:
    """Return the public half of a key, wherever it lives."""
    return public_pem(key) if isinstance(key, Ed25519PrivateKey) else key.public_pem()


def add_signature(metadata: Metadata[T], key: AnyKey) -> None:
    """Sign `metadata` with `key`, in place."""
    keyid = tuf_key(signer_pem(key)).keyid
    metadata.signatures[keyid] = Signature(keyid, key.sign(metadata.signed_bytes).hex())


def sign(proposal: Proposal, key: AnyKey, at: datetime, *, root: bytes | None = None) -> Proposal:
    """Return the proposal with the signatures of `key` on everything in it that this key has a say in.

    The proposal is judged first, from `root` if the signer brings one. Raises ProposalRefused if it would not hold, or
    if the key has no say in any of it.
    """
    charter, shortfalls = review(proposal, at, root=root)
    keyid = tuf_key(signer_pem(key)).keyid
    base = current_charter(proposal.base, root) if proposal.base else None
    speaks = set(key_names(charter.consortium)) | set(key_names(base.consortium) if base else ())
    if keyid not in speaks:
        raise refusal("this key belongs to no member", [f"key {keyid[:16]}… is not in the charter"], _SIGNED_IN_TURN)
    signed: dict[str, bytes] = {}
    for name, raw in proposal.metadata.items():
        role = name.removesuffix(".json").split(".", 1)[1]
        if keyid in _may_sign(role, charter, base):
            signed[name] = _signed(name, raw, key)
    if not signed:
        names = listed({who for item in shortfalls for who in item.may_sign})
        raise refusal("this key has no say in this proposal", [f"it waits for {names}"], _SIGNED_IN_TURN)
    return replace(proposal, metadata={**proposal.metadata, **signed})


def _may_sign(role: str, charter: Charter, base: Charter | None) -> set[str]:
    if role in (Root.type, Targets.type, Snapshot.type):
        keyids = set(root_roles(charter.consortium)[role].keyids)
        return keyids | (set(root_roles(base.consortium)[role].keyids) if base and role == Root.type else set())
    roles = delegations(charter.consortium).roles or {}
    return set(roles[role].keyids) if role in roles else set()


def _signed(name: str, raw: bytes, key: AnyKey) -> bytes:
    role = name.removesuffix(".json").split(".", 1)[1]
    if role == Root.type:
        return _with_signature(Root, name, raw, key)
    if role == Snapshot.type:
        return _with_signature(Snapshot, name, raw, key)
    return _with_signature(Targets, name, raw, key)


def _with_signature(kind: type[T], name: str, raw: bytes, key: AnyKey) -> bytes:
    metadata, reasons = parse_metadata(kind, name, raw)
    if metadata is None:
        raise refusal("the proposal is damaged", reasons, _SIGNED_IN_TURN)
    add_signature(metadata, key)
    return metadata_bytes(metadata)


def publish(
    store: Mapping[str, bytes], proposal: Proposal, at: datetime, *, root: bytes | None = None
) -> dict[str, bytes]:
    """Return the new store. It holds once the brokers have signed its timestamp (`sign_timestamp`).

    Raises ProposalRefused if signatures are missing (each role with what it has and what it needs), if the charter has
    moved on since the proposal was made, or if anything else does not hold.
    """
    _, shortfalls = review(proposal, at, root=root)
    moved = {name for name in set(store) | set(proposal.base) if store.get(name) != proposal.base.get(name)}
    if moved - {TIMESTAMP_FILE}:
        raise refusal(
            "the charter has moved on since this was proposed",
            [f"{name}: differs" for name in sorted(moved - {TIMESTAMP_FILE})],
            "Propose the change again on the current charter.",
        )
    if shortfalls:
        raise refusal(
            "too few have signed this proposal",
            [str(item) for item in shortfalls],
            "Let the members named sign it with `seal charter sign`.",
        )
    new = proposal.store()
    if TIMESTAMP_FILE in store:
        new[TIMESTAMP_FILE] = store[TIMESTAMP_FILE]
    return new
