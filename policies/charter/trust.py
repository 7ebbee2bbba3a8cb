"""Verifying a charter: TUF's client workflow over a store, at a moment that the caller names.

python-tuf's own client reads its clock and a network; an auditor judges at a moment of years ago, offline. So the
workflow (TUF specification 1.0, section 5) is written out here over python-tuf's public metadata API, which parses and
checks signatures; a test holds it against python-tuf's client. It is stricter than TUF where a consortium can be:

* roots: a chain from the 1.root.json that the reader trusts, each signed by its predecessor's threshold and its own;
  the platform and the trust domain never change;
* the keys, roles and delegations are exactly those that follow from the `Consortium` in the root (`layout`), so no
  metadata can add a signer, widen a path or list one key under two ids;
* every file is in its one byte form (compact JSON, sorted) and every signature in it valid and by a key that has a
  say there; every file of the store is accounted for;
* nothing is parsed before its size is bounded, and no version may be below one that the reader has seen (`known`).

A member's own role that has lapsed does not stop the others: its files are left out, which grants nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    T,
    TargetFile,
    Targets,
    Timestamp,
    VerificationResult,
)
from tuf.api.serialization import DeserializationError, SerializationError
from tuf.api.serialization.json import JSONSerializer

from policies.charter.content import Charter, loose_ends, read_documents
from policies.charter.layout import (
    CONSORTIUM_FIELD,
    MEMBER_ROLE,
    SHARED_ROLES,
    SIGNED_DIGEST_FIELD,
    delegated_roles,
    delegations,
    key_names,
    listed,
    metadata_file,
    role_of,
    root_keys,
    root_roles,
    target_file,
)
from policies.charter.store import is_store_name, store_complaints
from policies.documents import Consortium, complaints, format_time
from policies.errors import CharterRefused

ROOT_CHAIN_LIMIT: Final = 1024
VERSION_LIMIT: Final = 2**31 - 1
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")


def metadata_bytes(metadata: Metadata[T]) -> bytes:
    """Return the one byte form of `metadata`: compact JSON with sorted members, signatures by key id."""
    metadata.signatures = dict(sorted(metadata.signatures.items()))
    return metadata.to_bytes(JSONSerializer(compact=True))


def signed_digest(metadata: Metadata[T]) -> str:
    """Return the SHA-256 (hex) of the signed part."""
    return hashlib.sha256(metadata.signed_bytes).hexdigest()


def parse_metadata(kind: type[T], name: str, raw: bytes) -> tuple[Metadata[T] | None, list[str]]:
    """Return the metadata of `kind` in `raw` and why it is not in good form; None if it cannot be read at all."""
    try:
        metadata: Metadata[T] = Metadata.from_bytes(raw)
        form = metadata_bytes(metadata)
        metadata.signed_bytes  # noqa: B018 - numbers that canonical JSON cannot hold are found here
    except (DeserializationError, SerializationError, TypeError, AttributeError, ValueError) as error:
        return None, [f"{name}: not readable as TUF metadata ({error.__cause__ or error})"]
    signed = metadata.signed
    if signed.type != kind.type:
        return None, [f"{name}: is of type {signed.type}, must be {kind.type}"]
    if type(signed.version) is not int or signed.version > VERSION_LIMIT:
        return None, [f"{name}: its version is no number between 1 and {VERSION_LIMIT}"]
    reasons = []
    if form != raw:
        reasons.append(f"{name}: not in its one byte form (compact JSON, sorted)")
    foreign = set(metadata.unrecognized_fields) | (set(signed.unrecognized_fields) - {CONSORTIUM_FIELD})
    if foreign or (CONSORTIUM_FIELD in signed.unrecognized_fields) != (kind is Root):
        reasons.append(f"{name}: has fields that do not belong there: {', '.join(sorted(foreign)) or CONSORTIUM_FIELD}")
    signatures = metadata.signatures.values()
    if any(item.unrecognized_fields or not _SIGNATURE.fullmatch(item.signature) for item in signatures):
        reasons.append(f"{name}: a signature is not 64 bytes in lower-case hex")
    return metadata, reasons


def read_consortium(name: str, root: Root) -> tuple[Consortium | None, list[str]]:
    """Return the consortium in `root` and every way in which the root's keys and roles do not follow from it."""
    raw = json.dumps(root.unrecognized_fields.get(CONSORTIUM_FIELD))
    try:
        consortium = Consortium.model_validate_json(raw)
    except ValidationError as error:
        return None, [f"{name}: its consortium is not valid: {words}" for words in complaints(error)]
    reasons = []
    if consortium.to_json() != root.unrecognized_fields[CONSORTIUM_FIELD]:
        reasons.append(f"{name}: its consortium leaves out fields")
    if root.consistent_snapshot is not True:
        reasons.append(f"{name}: consistent snapshots are not on")
    if _plain(root.keys) != _plain(root_keys(consortium)):
        reasons.append(f"{name}: its keys are not exactly its members' and brokers'")
    for role, wanted in root_roles(consortium).items():
        if _plain({role: root.roles[role]}) != _plain({role: wanted}):
            reasons.append(f"{name}: the role {role} is not signed by whom its consortium says")
    return consortium, reasons


def _plain(parts: Mapping[str, Any]) -> str:
    return json.dumps({name: part.to_dict() for name, part in parts.items()}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Metadata that too few have signed: the file, its role, whose keys count, who has signed, how many must."""

    file: str
    role: str
    may_sign: tuple[str, ...]
    signed: tuple[str, ...]
    needed: int
    before: bool = False

    def __str__(self) -> str:
        who = "the signers of the root before it: " if self.before else ""
        return (
            f"{self.file}: {who}role {self.role} needs {self.needed} signatures, has {len(self.signed)} "
            f"(by {listed(self.signed)})"
        )


@dataclass(slots=True)
class Inspection:
    """One pass over a store that gathers every reason against it. `at` None leaves expiry unjudged.

    Missing signatures are kept apart as `shortfalls`: a proposal has some until all have signed.
    """

    store: Mapping[str, bytes]
    at: datetime | None
    reasons: list[str] = field(default_factory=list)
    shortfalls: list[Shortfall] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    expiries: list[datetime] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    targets: dict[str, Metadata[Targets]] = field(default_factory=dict)

    def fetch(self, name: str, kind: type[T]) -> Metadata[T] | None:
        """Take the metadata `name` out of the store; note what is wrong with its form."""
        self.seen.add(name)
        if name not in self.store:
            self.reasons.append(f"{name}: missing")
            return None
        metadata, reasons = parse_metadata(kind, name, self.store[name])
        self.reasons.extend(reasons)
        return metadata

    def expired(self, name: str, signed: Signed) -> bool:
        """Note when `signed` lapses; return whether it has."""
        if self.at is not None and signed.is_expired(self.at):
            return True
        self.expiries.append(signed.expires)
        return False

    def expiry(self, name: str, signed: Signed) -> None:
        """Hold an expired `signed` against the store."""
        if self.expired(name, signed):
            self.reasons.append(f"{name}: expired on {format_time(signed.expires)}")

    def signatures(self, name: str, role: str, metadata: Metadata[T], delegators: tuple[Root | Targets, ...]) -> None:
        """Judge signatures over `metadata` against each delegator's keys and threshold for `role`."""
        payload = metadata.signed_bytes
        good: set[str] = set()
        for delegator in delegators:
            try:
                result: VerificationResult = delegator.get_verification_result(role, payload, metadata.signatures)
            except ValueError:
                self.reasons.append(f"{name}: nobody delegates to the role {role}")
                return
            good |= set(result.signed)
            if not result.verified:
                every = {*result.signed, *result.unsigned}
                self.shortfalls.append(
                    Shortfall(
                        file=name,
                        role=role,
                        may_sign=tuple(sorted(self.names.get(keyid, keyid[:8]) for keyid in every)),
                        signed=tuple(sorted(self.names.get(keyid, keyid[:8]) for keyid in result.signed)),
                        needed=result.threshold,
                        before=delegator is not delegators[-1],
                    )
                )
        for keyid in metadata.signatures:
            if keyid not in good:
                who = self.names.get(keyid, f"the unknown key {keyid[:8]}…")
                self.reasons.append(f"{name}: the signature by {who} is not valid for the role {role}")

    def record(self, role: str, metadata: Metadata[T]) -> None:
        """Keep the version and digest of a role, the floor of later loads."""
        self.versions[role] = metadata.signed.version
        self.digests[role] = signed_digest(metadata)

    def root_chain(self, trusted: bytes) -> tuple[Root, Consortium] | None:
        """Follow the roots from `trusted` to the newest in the store; None if the chain breaks."""
        first, reasons = parse_metadata(Root, "the trusted root", trusted)
        if first is None or reasons:
            self.reasons.extend(reasons)
            return None
        if first.signed.version != 1:
            self.reasons.append(f"the trusted root: is version {first.signed.version}, must be version 1")
            return None
        if self.store.get("metadata/1.root.json") != trusted:
            self.reasons.append("metadata/1.root.json: not the root that you trust")
            self.seen.add("metadata/1.root.json")
        current: Root | None = None
        consortium: Consortium | None = None
        metadata: Metadata[Root] | None = first
        for version in range(1, ROOT_CHAIN_LIMIT + 1):
            name = metadata_file(Root.type, version)
            if version > 1:
                if name not in self.store:
                    break
                metadata = self.fetch(name, Root)
            self.seen.add(name)
            if metadata is None:
                return None
            new, reasons = read_consortium(name, metadata.signed)
            self.reasons.extend(reasons)
            if new is None:
                return None
            self.names |= key_names(new)
            if metadata.signed.version != version:
                self.reasons.append(f"{name}: says it is version {metadata.signed.version}")
            self.signatures(
                name, Root.type, metadata, (metadata.signed,) if current is None else (current, metadata.signed)
            )
            if consortium is not None:
                for what in ("platform", "trust_domain"):
                    if getattr(new, what) != getattr(consortium, what):
                        self.reasons.append(f"{name}: changes the {what.replace('_', ' ')}, which never changes")
            self.record(Root.type, metadata)
            current, consortium = metadata.signed, new
        if current is None or consortium is None:
            return None
        self.expiry(metadata_file(Root.type, current.version), current)
        return current, consortium

    def timestamp(self, root: Root) -> MetaFile | None:
        """Verify the timestamp; return what it says of the snapshot."""
        name = metadata_file(Timestamp.type, 0)
        metadata = self.fetch(name, Timestamp)
        if metadata is None:
            return None
        self.signatures(name, Timestamp.type, metadata, (root,))
        self.expiry(name, metadata.signed)
        self.record(Timestamp.type, metadata)
        meta = metadata.signed.snapshot_meta
        if meta.length is None or set(meta.hashes or {}) != {"sha256"} or meta.unrecognized_fields:
            self.reasons.append(f"{name}: does not give the snapshot's length and SHA-256")
            return None
        return meta

    def snapshot(self, root: Root, consortium: Consortium, meta: MetaFile) -> Snapshot | None:
        """Verify the snapshot that `meta` names, and that it lists exactly the roles that the charter has."""
        name = metadata_file(Snapshot.type, meta.version)
        metadata = self.fetch(name, Snapshot)
        if metadata is None:
            return None
        try:
            meta.verify_length_and_hashes(self.store[name])
        except LengthOrHashMismatchError as error:
            self.reasons.append(f"{name}: not the snapshot that the timestamp names ({error})")
        self.signatures(name, Snapshot.type, metadata, (root,))
        self.expiry(name, metadata.signed)
        self.record(Snapshot.type, metadata)
        if metadata.signed.version != meta.version:
            self.reasons.append(f"{name}: says it is version {metadata.signed.version}")
        must = {f"{role}.json" for role in (Targets.type, *SHARED_ROLES)}
        may = must | {f"{role}.json" for role in delegated_roles(consortium)}
        there = set(metadata.signed.meta)
        self.reasons.extend(f"{name}: lists {extra}, which is no role here" for extra in sorted(there - may))
        self.reasons.extend(f"{name}: does not list {lost}" for lost in sorted(must - there))
        for listed_name, entry in metadata.signed.meta.items():
            if set(entry.unrecognized_fields) != {SIGNED_DIGEST_FIELD} or entry.hashes or entry.length is not None:
                self.reasons.append(f"{name}: {listed_name} is not pinned by {SIGNED_DIGEST_FIELD}")
        return metadata.signed

    def role(self, role: str, snapshot: Snapshot, delegator: Root | Targets) -> Metadata[Targets] | None:
        """Verify the targets metadata of `role` that `snapshot` lists."""
        entry = snapshot.meta[f"{role}.json"]
        name = metadata_file(role, entry.version)
        metadata = self.fetch(name, Targets)
        if metadata is None:
            return None
        self.signatures(name, role, metadata, (delegator,))
        self.record(role, metadata)
        if metadata.signed.version != entry.version:
            self.reasons.append(f"{name}: says it is version {metadata.signed.version}")
        pinned = str(entry.unrecognized_fields.get(SIGNED_DIGEST_FIELD))
        if not hmac.compare_digest(pinned.encode(), signed_digest(metadata).encode()):
            self.reasons.append(f"{name}: not the {role} that the snapshot names")
        self.targets[role] = metadata
        return metadata

    def delegated(self, role: str, snapshot: Snapshot, delegator: Targets) -> None:
        """Verify a delegated role and take its files."""
        metadata = self.role(role, snapshot, delegator)
        if metadata is None:
            return
        name = metadata_file(role, metadata.signed.version)
        if metadata.signed.delegations is not None:
            self.reasons.append(f"{name}: delegates further, which no role may")
        lapsed = self.expired(name, metadata.signed)
        if lapsed and role.startswith(MEMBER_ROLE):
            self.warnings.append(f"{name}: expired on {format_time(metadata.signed.expires)}; its files do not count")
        elif lapsed:
            self.reasons.append(f"{name}: expired on {format_time(metadata.signed.expires)}")
        for path, target in metadata.signed.targets.items():
            raw = self.target(name, role, path, target)
            if raw is not None and not lapsed:
                self.files[path] = raw

    def target(self, name: str, role: str, path: str, target: TargetFile) -> bytes | None:
        """Return the bytes of one target after path, length and digest were checked."""
        if role_of(path) != role:
            self.reasons.append(f"{name}: {path} is not for the role {role} to decide")
            return None
        if set(target.hashes) != {"sha256"} or target.unrecognized_fields:
            self.reasons.append(f"{name}: {path} is not listed by length and SHA-256 alone")
            return None
        file = target_file(path, target.hashes["sha256"])
        self.seen.add(file)
        raw = self.store.get(file)
        if raw is None:
            self.reasons.append(f"{file}: missing")
            return None
        try:
            target.verify_length_and_hashes(raw)
        except LengthOrHashMismatchError:
            self.reasons.append(f"{file}: not the bytes that {name} lists")
            return None
        return raw

    def strangers(self) -> None:
        """Name every file of the store that the metadata does not account for."""
        for name in sorted(set(self.store) - self.seen):
            words = "does not belong to this charter" if is_store_name(name) else "no file of a charter has this name"
            self.reasons.append(f"{name[:200]!r}: {words}")

    def floor(self, known: Charter, charter_id: str, consortium: Consortium) -> None:
        """Hold versions against those that the reader has seen: no step back, no second content of one version.

        A role whose one key was replaced starts anew, and so does the timestamp when any key was: the old key may have
        signed a version far ahead (TUF 5.3.11). The snapshot's floor, and with it the charter's, always holds.
        """
        if known.id != charter_id:
            self.reasons.append(f"this is charter {charter_id[:16]}…, known is {known.id[:16]}…")
            return
        keys_changed = set(key_names(known.consortium)) != set(key_names(consortium))
        for role, version in known.versions.items():
            owner, old = (party.member(role.removeprefix(MEMBER_ROLE)) for party in (consortium, known.consortium))
            if role.startswith(MEMBER_ROLE) and (owner is None or old is None or owner.public_key != old.public_key):
                continue
            if role == Timestamp.type and role not in self.versions:
                continue  # it was left aside; a store that has none was refused before
            if role not in self.versions:
                self.reasons.append(f"{role}: was in version {known.version} of the charter and is missing")
            elif role == Timestamp.type:
                if not keys_changed and self.versions[role] < version:
                    self.reasons.append(f"{role}: version {self.versions[role]} is offered, version {version} is known")
            elif self.versions[role] < version:
                self.reasons.append(f"{role}: version {self.versions[role]} is offered, version {version} is known")
            elif self.versions[role] == version and self.digests[role] != known.digests[role]:
                self.reasons.append(f"{role}: version {version} is offered with other content than is known")


def inspect(
    store: Mapping[str, bytes],
    root: bytes,
    at: datetime | None,
    *,
    known: Charter | None = None,
    snapshot: int | None = None,
) -> tuple[Charter | None, Inspection]:
    """Judge `store`; return the charter (None if there are reasons against it) and the inspection with the reasons.

    The charter is there even if signatures are missing: whoever trusts it looks at `shortfalls` as well.

    With `snapshot` the timestamp is left aside and that version of the snapshot is judged: for a store that is about
    to get a new timestamp. `at` None leaves expiry unjudged, so that a lapsed charter can be renewed.
    """
    work = Inspection(store, at)
    work.reasons.extend(store_complaints(store))
    if work.reasons:
        return None, work
    chain = work.root_chain(root)
    if chain is None:
        return None, work
    newest, consortium = chain
    charter_id = hashlib.sha256(root).hexdigest()
    if snapshot is None:
        meta = work.timestamp(newest)
    else:
        work.seen.add(metadata_file(Timestamp.type, 0))
        meta = _unstamped(store, snapshot)
    listing = work.snapshot(newest, consortium, meta) if meta is not None else None
    if listing is not None and f"{Targets.type}.json" in listing.meta:
        top = work.role(Targets.type, listing, newest)
        if top is not None:
            name = metadata_file(Targets.type, top.signed.version)
            work.expiry(name, top.signed)
            if top.signed.targets:
                work.reasons.append(f"{name}: lists files itself, which only its delegations may")
            wanted = delegations(consortium).to_dict()
            there = top.signed.delegations.to_dict() if top.signed.delegations else None
            if json.dumps(there, sort_keys=True) != json.dumps(wanted, sort_keys=True):
                work.reasons.append(f"{name}: its delegations do not follow from the consortium in the root")
            else:
                for role in delegated_roles(consortium):
                    if f"{role}.json" in listing.meta:
                        work.delegated(role, listing, top.signed)
                work.strangers()
    documents, reasons = read_documents(work.files, consortium)
    work.reasons.extend(reasons)
    if known is not None:
        work.floor(known, charter_id, consortium)
    if work.reasons:
        return None, work
    charter = Charter(
        id=charter_id,
        version=work.versions[Snapshot.type],
        consortium=consortium,
        expires=min(work.expiries),
        files=MappingProxyType(dict(sorted(work.files.items()))),
        versions=MappingProxyType(work.versions),
        digests=MappingProxyType(work.digests),
        warnings=(*work.warnings, *loose_ends(documents, work.files, consortium)),
        documents=MappingProxyType(documents),
    )
    return charter, work


def _unstamped(store: Mapping[str, bytes], version: int) -> MetaFile:
    name = metadata_file(Snapshot.type, version)
    return MetaFile.from_data(version, store.get(name, b""), ["sha256"])


def load_charter(store: Mapping[str, bytes], root: bytes, at: datetime, *, known: Charter | None = None) -> Charter:
    """Verify `store` from the trusted first `root` (bytes of 1.root.json) at the moment `at`, and return the charter.

    `known` is a charter that the reader has seen before: nothing older, and no second content of the same version, is
    accepted. Raises CharterRefused with every reason.
    """
    charter, work = inspect(store, root, at, known=known)
    if charter is None or work.shortfalls:
        raise CharterRefused(
            "the charter does not hold",
            where=f"charter {hashlib.sha256(root).hexdigest()[:16]}… at {format_time(at)}",
            do="Get the current charter from a broker or a member, and compare the root with what you were given.",
            reasons=(*work.reasons, *map(str, work.shortfalls)),
        )
    return charter
