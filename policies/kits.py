"""A kit: the signed folder that brings one broker, guest or user of a consortium to its host.

    kit.dsse.json   what the kit is for, and every file's SHA-256; a DSSE envelope, signed by a member's key
    README.md       one page for the operator
    root.json       the charter's first root
    charter/        the charter's store as it was when the kit was made
    init-data.toml  (guests) what the guest is started with
    kit.toml        (users) what `fl.ProdEnv` reads
    local/          made on the host and never sent: keys, image, disks. No part of the kit, and never looked into here

A kit holds no secret. What it decides is little: places, images, brokers and users are what the charter's thresholds
signed, and a kit that says otherwise is refused. So one member may make everybody's kits.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import rfc8785
from pydantic import AfterValidator, Field, StringConstraints, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signature

from policies.charter.content import Charter
from policies.charter.layout import tuf_key
from policies.charter.signing import AnyKey, current_charter, signer_pem
from policies.documents import Address, Digest, Document, Instant, Name, Platform, Text, complaints
from policies.errors import KitRefused, MalformedDocument, SealwrightError
from policies.init_data import BrokerAddress, ServerAddress, init_data_digest, parse_init_data

MANIFEST: Final = "kit.dsse.json"
LOCAL: Final = "local"
README: Final = "README.md"
ROOT: Final = "root.json"
CHARTER: Final = "charter/"
INIT_DATA: Final = "init-data.toml"
USER_FILE: Final = "kit.toml"
PAYLOAD_TYPE: Final = "application/vnd.sealwright.kit+json"
KIT_LIMIT: Final = 32 * 1024 * 1024
"""Bytes of a whole kit."""
MANIFEST_LIMIT: Final = 4 * 1024 * 1024
FILE_COUNT_LIMIT: Final = 8192 + 16
_DEPTH: Final = 7
_DO: Final = "Get the kit again from the member that made it, and compare the charter's id with that member."


def _ip(text: str) -> str:
    if str(ip_address(text)) != text:
        raise ValueError("an IP address in its shortest form")
    return text


HostName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$")
]
IpAddress = Annotated[str, AfterValidator(_ip)]
KitRole = Literal["broker", "server", "site", "inner", "gateway", "user"]
KitPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]


class HostEntry(Document):
    """A line of /etc/hosts that a host needs where names are not in the DNS."""

    address: IpAddress
    names: tuple[HostName, ...] = Field(min_length=1, max_length=16)


class Port(Document):
    """A TCP address that is listened on at the kit's host, so that it must be free, and what for."""

    listen: Address
    purpose: Text


class KitImage(Document):
    """The image that a guest is started from, where to get it, and with which (measured) processors."""

    name: Name
    manifest_sha256: Digest
    source: Text
    vcpu_model: str = Field(pattern=r"^EPYC[A-Za-z0-9-]{0,32}$")
    vcpus: int = Field(ge=1, le=512)
    memory_mib: int = Field(ge=256, le=1 << 24)
    gpus: int = Field(ge=0, le=16)


class KitManifest(Document):
    """What a kit is for, and its files. `charter_version` is the version of the charter that it carries."""

    version: Literal[1]
    role: KitRole
    name: Name
    member: Name
    platform: Platform
    charter: Digest
    charter_version: int = Field(ge=1)
    made: Instant
    brokers: tuple[BrokerAddress, ...] = Field(min_length=1, max_length=16)
    server: ServerAddress | None = None
    ports: tuple[Port, ...] = Field(default=(), max_length=16)
    hosts: tuple[HostEntry, ...] = Field(default=(), max_length=256)
    image: KitImage | None = None
    disks: tuple[Name, ...] = Field(default=(), max_length=16)
    files: dict[KitPath, Digest] = Field(min_length=1, max_length=FILE_COUNT_LIMIT)

    @property
    def place(self) -> str:
        """`ROLE NAME`, or `user MEMBER/NAME`, for people."""
        return f"user {self.member}/{self.name}" if self.role == "user" else f"{self.role} {self.name}"


@dataclass(frozen=True, slots=True)
class SignedKit:
    """A kit as it was verified: made by `verify_kit` alone. `signer` is the member whose key signed it."""

    manifest: KitManifest
    files: Mapping[str, bytes] = field(repr=False)
    charter: Charter = field(repr=False)
    signer: str

    @property
    def root(self) -> bytes:
        """The bytes of the charter's first root."""
        return self.files[ROOT]

    @property
    def store(self) -> dict[str, bytes]:
        """The charter's store that the kit carries."""
        return store_of(self.files)


def store_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the charter's store among a kit's files."""
    return {name.removeprefix(CHARTER): raw for name, raw in files.items() if name.startswith(CHARTER)}


def sign_kit(manifest: KitManifest, key: AnyKey) -> bytes:
    """Return the bytes of `kit.dsse.json`: the manifest, signed by a member's key."""
    envelope = Envelope(manifest.to_bytes(), PAYLOAD_TYPE, {})
    keyid = tuf_key(signer_pem(key)).keyid
    envelope.signatures[keyid] = Signature(keyid, key.sign(envelope.pae()).hex())
    raw: bytes = rfc8785.dumps(envelope.to_dict())
    return raw


def verify_kit(files: Mapping[str, bytes], where: str, *, trust: bytes | None = None) -> SignedKit:
    """Return the kit whose files (all of them, `local/` left out) are `files`.

    `trust` is the charter's first root as its reader knows it; without it, the kit's own root is believed. Raises
    KitRefused with every reason: each file that was changed, is missing or foreign; a signature by nobody who has a
    say; a place, image, broker or user that is not what the kit's charter says.
    """
    envelope, manifest = _read_manifest(files.get(MANIFEST), where)
    reasons = _file_reasons(manifest, files)
    root = files.get(ROOT, b"")
    if hashlib.sha256(root).hexdigest() != manifest.charter:
        reasons.append(f"{ROOT}: not the first root of the charter {manifest.charter[:16]}… that the kit names")
    if trust is not None and hashlib.sha256(trust).hexdigest() != manifest.charter:
        reasons.append(f"the kit is for the charter {manifest.charter[:16]}…, not for the one whose root you trust")
    try:
        charter = current_charter(store_of(files), root)
    except SealwrightError as error:
        raise _refused(where, [*reasons, f"{CHARTER}: {error.what}", *getattr(error, "reasons", ())]) from error
    signer = _signer(envelope, charter)
    if signer is None:
        reasons.append("no member of the charter signed the kit as it is")
    reasons += charter_reasons(manifest, files, charter)
    if reasons:
        raise _refused(where, reasons)
    return SignedKit(manifest, dict(files), charter, signer or "")


def open_signed_kit(folder: Path, *, trust: bytes | None = None) -> SignedKit:
    """Read and verify the kit in `folder`.

    A root that the host's operator put at `local/root.json` is what the kit must be for. Raises KitRefused.
    """
    own = folder / LOCAL / ROOT
    if trust is None and own.is_file():
        trust = _read(own, MANIFEST_LIMIT)
    return verify_kit(read_kit(folder), str(folder), trust=trust)


def is_kit(folder: Path) -> bool:
    """Return whether `folder` holds a kit's manifest."""
    return (folder / MANIFEST).is_file()


def read_kit(folder: Path) -> dict[str, bytes]:
    """Read every file of a kit by its name relative to `folder`, `local` left out. Raises KitRefused.

    Bounded by KIT_LIMIT and FILE_COUNT_LIMIT; anything but folders and regular files is refused by name.
    """
    if not is_kit(folder):
        raise _refused(str(folder), [f"{MANIFEST}: missing; there is no kit here"])
    files: dict[str, bytes] = {}
    strange: list[str] = []
    total = 0
    for name, path, regular in _walk(folder, "", _DEPTH):
        if not regular:
            strange.append(f"{name}: neither a file nor a folder")
            continue
        content = _read(path, KIT_LIMIT - total)
        total += len(content)
        files[name] = content
        if len(files) > FILE_COUNT_LIMIT:
            raise _refused(str(folder), [f"more than {FILE_COUNT_LIMIT} files"])
    if strange:
        raise _refused(str(folder), strange)
    return files


def charter_reasons(manifest: KitManifest, files: Mapping[str, bytes], charter: Charter) -> list[str]:
    """Return why a kit is not what `charter` says of its place; empty if it is.

    Asked of the kit's own charter when it is made and started, and of the current one by `seal doctor`.
    """
    reasons = []
    if charter.id != manifest.charter:
        reasons.append(f"the kit is for another charter than {charter.id[:16]}…")
    if charter.consortium.platform != manifest.platform:
        reasons.append(f"the charter is {charter.consortium.platform}, the kit {manifest.platform}")
    known = {broker.name: broker.url for broker in charter.consortium.brokers}
    for broker in manifest.brokers:
        if broker.name not in known:
            reasons.append(f"the charter has no broker {broker.name}")
        elif known[broker.name] != broker.url and manifest.role in {"broker", "user"}:
            # A guest may see another address, behind its host's translation: its init-data have it, and were enrolled.
            reasons.append(f"broker {broker.name} is not at {broker.url}, says the charter")
    if manifest.role == "broker":
        entry = charter.broker(manifest.name)
        if entry is None or entry.member != manifest.member:
            reasons.append(f"the charter has no broker {manifest.name} of {manifest.member}")
    elif manifest.role == "user":
        reasons += _user_reasons(manifest, files, charter)
    else:
        reasons += _guest_reasons(manifest, files, charter)
    return reasons


def _guest_reasons(manifest: KitManifest, files: Mapping[str, bytes], charter: Charter) -> list[str]:
    place = charter.enrolment(manifest.role, manifest.name)
    if place is None or place.member != manifest.member:
        return [f"the charter has no place {manifest.role}/{manifest.name} of {manifest.member}"]
    reasons = []
    raw = files.get(INIT_DATA, b"")
    if init_data_digest(raw) != place.init_data_sha256:
        reasons.append(f"{INIT_DATA}: not the init-data that are enrolled for {manifest.place}")
    try:
        init = parse_init_data(raw, INIT_DATA)
        if (init.role, init.name, init.charter) != (manifest.role, manifest.name, manifest.charter):
            reasons.append(f"{INIT_DATA}: for another place")
        if init.brokers != manifest.brokers or init.server != manifest.server:
            reasons.append(f"{INIT_DATA}: names other brokers or another server than the kit")
    except MalformedDocument as error:
        reasons.append(f"{INIT_DATA}: {error.what}")
    image = charter.image(place.image)
    if manifest.image is None or image is None or manifest.image.name != place.image:
        return [
            *reasons,
            f"{manifest.place} is enrolled for the image {place.image}, which the kit or the charter lacks",
        ]
    if image.manifest_sha256 != manifest.image.manifest_sha256:
        reasons.append(f"the image {image.name} has the digest {image.manifest_sha256[:16]}… in the charter")
    settings = {(value.vcpu_model, value.vcpus) for value in image.measurements}
    if (manifest.image.vcpu_model, manifest.image.vcpus) not in settings:
        chosen = f"{manifest.image.vcpu_model} × {manifest.image.vcpus}"
        reasons.append(f"the charter has no measurement of the image {image.name} for {chosen}")
    return reasons


def _user_reasons(manifest: KitManifest, files: Mapping[str, bytes], charter: Charter) -> list[str]:
    reasons = []
    if charter.user(manifest.member, manifest.name) is None:
        reasons.append(f"the charter has no user {manifest.member}/{manifest.name}")
    if USER_FILE not in files:
        reasons.append(f"{USER_FILE}: missing")
    return reasons


def _read_manifest(raw: bytes | None, where: str) -> tuple[Envelope, KitManifest]:
    if raw is None:
        raise _refused(where, [f"{MANIFEST}: missing"])
    try:
        if len(raw) > MANIFEST_LIMIT:
            raise ValueError(f"larger than {MANIFEST_LIMIT} bytes")
        document: dict[str, Any] = json.loads(raw)
        if not isinstance(document, dict) or set(document) != {"payload", "payloadType", "signatures"}:
            raise ValueError("not a DSSE envelope")
        envelope = Envelope.from_dict(document)
        if rfc8785.dumps(envelope.to_dict()) != raw or envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError("not the one form of a kit's envelope")
        manifest = KitManifest.model_validate_json(envelope.payload)
        if manifest.to_bytes() != envelope.payload:
            raise ValueError("not in canonical form (RFC 8785)")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        words = "; ".join(complaints(error)) if isinstance(error, ValidationError) else str(error)
        raise _refused(where, [f"{MANIFEST}: no manifest of a kit ({words})"]) from error
    return envelope, manifest


def _file_reasons(manifest: KitManifest, files: Mapping[str, bytes]) -> list[str]:
    reasons = []
    for name, digest in sorted(manifest.files.items()):
        if name not in files:
            reasons.append(f"{name}: missing")
        elif hashlib.sha256(files[name]).hexdigest() != digest:
            reasons.append(f"{name}: changed")
    foreign = sorted(set(files) - set(manifest.files) - {MANIFEST})
    return reasons + [f"{name}: foreign, the kit was made without it" for name in foreign]


def _signer(envelope: Envelope, charter: Charter) -> str | None:
    """The member whose signature is on the kit, and no other is; None if there is none."""
    for member in charter.consortium.members:
        key = tuf_key(member.public_key)
        if set(envelope.signatures) != {key.keyid}:
            continue
        try:
            envelope.verify([key], 1)
        except VerificationError:
            return None
        return member.name
    return None


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, Path, bool]]:
    """Files below `folder` with their names, `local` at the top left out; the last value: is it a regular file?"""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            name = f"{prefix}{entry.name}"
            if name == LOCAL:
                continue
            if entry.is_dir(follow_symlinks=False) and depth > 0:
                yield from _walk(Path(entry.path), f"{name}/", depth - 1)
            else:
                yield name, Path(entry.path), entry.is_file(follow_symlinks=False)


def _read(path: Path, limit: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(str(path), [f"{path.name}: cannot be read: {error.strerror}"]) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refused(str(path), [f"{path.name}: not a regular file"])
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise _refused(str(path), [f"{path.name}: the kit is larger than {KIT_LIMIT} bytes"])
    return raw


def _refused(where: str, reasons: list[str]) -> KitRefused:
    what = "this kit may not be started"
    return KitRefused(f"{what}: {reasons[0]}", where=where, do=_DO, reasons=tuple(reasons))
