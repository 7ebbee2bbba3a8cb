"""Making kits: for each broker, guest and user of a plan one set of files, checked against the charter, then signed.

Pure: files are names to bytes; `write_kit` alone writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from appliance.kits.plan import Plan, PlannedGuest, broker_addresses, brokers_for, init_data_of
from appliance.kits.readme import write_readme
from policies.charter import Charter, current_charter
from policies.charter.signing import AnyKey
from policies.documents import Address, BrokerEntry
from policies.errors import Unusable
from policies.init_data import BrokerAddress, ServerAddress
from policies.kits import (
    CHARTER,
    INIT_DATA,
    MANIFEST,
    README,
    ROOT,
    USER_FILE,
    HostEntry,
    KitImage,
    KitManifest,
    Port,
    sign_kit,
    verify_kit,
)

_FIRST_ROOT: Final = "metadata/1.root.json"
_PRIVATE: Final = re.compile(rb"PRIVATE KEY|AGE-SECRET-KEY|\"d\"\s*:\s*\"")
"""What no file of a kit holds: PEM, age and JWK private keys."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished kit: the name of its folder, and its files."""

    name: str
    manifest: KitManifest
    files: Mapping[str, bytes]


def make_kits(
    plan: Plan, store: Mapping[str, bytes], root: bytes | None, key: AnyKey, at: datetime, *, member: str | None = None
) -> list[Made]:
    """Return the kits of a plan, or of one member's places in it, under the charter in `store`.

    `root` is the charter's first root as the maker knows it. Raises KitRefused, naming every place of the plan that
    the charter does not have as planned, and for a key that is no member's.
    """
    charter = current_charter(store, root)
    chosen = [one for one in _kits(plan, charter, at) if member in (None, one[0].member)]
    if not chosen:
        raise Unusable("the plan has no place here", where=member or "deployment", do="Check the member's name.")
    return [_finished(manifest, own, store, root, key) for manifest, own in chosen]


def _finished(
    manifest: KitManifest, own: Mapping[str, bytes], store: Mapping[str, bytes], root: bytes | None, key: AnyKey
) -> Made:
    """The kit with everything in it, signed, and looked at once as its receiver will."""
    name = folder_name(manifest)
    files = {f"{CHARTER}{path}": raw for path, raw in store.items()} | {ROOT: store[_FIRST_ROOT], **own}
    files[README] = write_readme(manifest, name)
    digests = {path: hashlib.sha256(raw).hexdigest() for path, raw in sorted(files.items())}
    files[MANIFEST] = sign_kit(manifest.model_copy(update={"files": digests}), key)
    _refuse_secrets(files, name)
    return Made(name, verify_kit(files, name, trust=root).manifest, files)


def write_kit(kit: Made, target: Path) -> None:
    """Write a kit as the new folder `target`, whole or not at all.

    Raises Unusable if there is one: what lies in its `local/` may be the only copy.
    """
    if target.exists():
        raise Unusable("there is a kit already", where=str(target), do="Move it away, or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, raw in kit.files.items():
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        os.chmod(scratch, 0o755)  # noqa: S103, PTH101 - nothing in a kit is secret
        scratch.replace(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def folder_name(manifest: KitManifest) -> str:
    """The name of a kit's folder."""
    who = f"{manifest.member}-{manifest.name}" if manifest.role == "user" else manifest.name
    return f"{manifest.role}-{who}"


def _kits(plan: Plan, charter: Charter, at: datetime) -> Iterator[tuple[KitManifest, dict[str, bytes]]]:
    for broker in charter.consortium.brokers:
        yield _broker_kit(broker, plan, charter, at)
    for guest in plan.guests:
        yield _guest_kit(guest, plan, charter, at)
    for user in plan.users:
        yield _user_kit(user.member, user.name, plan.server(user.server), plan, charter, at)


def _broker_kit(
    broker: BrokerEntry, plan: Plan, charter: Charter, at: datetime
) -> tuple[KitManifest, dict[str, bytes]]:
    own = next(address for address in broker_addresses(charter) if address.name == broker.name)
    port = Port(listen=plan.broker_listens(own), purpose=f"broker {broker.name}: guests, users and auditors over TLS")
    return _manifest("broker", broker.name, broker.member, plan, charter, at, ports=(port,)), {}


def _guest_kit(guest: PlannedGuest, plan: Plan, charter: Charter, at: datetime) -> tuple[KitManifest, dict[str, bytes]]:
    image, approved = plan.image(guest.image), charter.image(guest.image)
    if approved is None:
        raise Unusable(
            f"the charter has not approved the image {guest.image}",
            where=f"{guest.role} {guest.name}",
            do="Propose it with `seal charter enrol` and have it signed.",
        )
    ports = () if guest.listen is None else (Port(listen=guest.listen, purpose=f"{guest.role} {guest.name}"),)
    manifest = _manifest(
        guest.role,
        guest.name,
        guest.member,
        plan,
        charter,
        at,
        ports=ports,
        server=plan.server_of(guest),
        brokers=brokers_for(guest, charter),
        disks=guest.disks,
        image=KitImage(
            name=guest.image,
            manifest_sha256=approved.manifest_sha256,
            source=image.source,
            vcpu_model=guest.vcpu_model,
            vcpus=guest.vcpus,
            memory_mib=guest.memory_mib,
            gpus=guest.gpus,
        ),
    )
    return manifest, {INIT_DATA: init_data_of(guest, plan, charter)}


def _user_kit(
    member: str, name: str, server: ServerAddress, plan: Plan, charter: Charter, at: datetime
) -> tuple[KitManifest, dict[str, bytes]]:
    manifest = _manifest("user", name, member, plan, charter, at, server=server)
    return manifest, {USER_FILE: _user_file(member, name, charter, server)}


def _user_file(member: str, user: str, charter: Charter, server: ServerAddress) -> bytes:
    """`kit.toml` of a user's kit."""
    lines = [f"member = {_quoted(member)}", f"user = {_quoted(user)}", f"charter = {_quoted(charter.id)}"]
    for broker in charter.consortium.brokers:
        lines += ["", "[[brokers]]", f"name = {_quoted(broker.name)}", f"url = {_quoted(broker.url)}"]
    lines += ["", "[server]", f"name = {_quoted(server.name)}", f"address = {_quoted(server.address)}", ""]
    return "\n".join(lines).encode("utf-8")


def _manifest(
    role: str,
    name: str,
    member: str,
    plan: Plan,
    charter: Charter,
    at: datetime,
    *,
    ports: tuple[Port, ...] = (),
    server: ServerAddress | None = None,
    brokers: tuple[BrokerAddress, ...] | None = None,
    disks: tuple[str, ...] = (),
    image: KitImage | None = None,
) -> KitManifest:
    brokers = broker_addresses(charter) if brokers is None else brokers
    needed = {urlsplit(broker.url).hostname or "" for broker in brokers}
    needed |= set() if server is None else {host_of(server.address)}
    needed |= {host_of(port.listen) for port in ports}
    return KitManifest.model_validate(
        {
            "version": 1,
            "role": role,
            "name": name,
            "member": member,
            "platform": charter.consortium.platform,
            "charter": charter.id,
            "charter_version": charter.version,
            "made": at,
            "brokers": brokers,
            "server": server,
            "ports": ports,
            "hosts": _entries(plan.hosts, needed),
            "image": image,
            "disks": disks,
            "files": {ROOT: charter.id},
        }
    )


def _entries(hosts: tuple[HostEntry, ...], needed: set[str]) -> tuple[HostEntry, ...]:
    """The entries with the names that this kit's host has to resolve, and those names alone."""
    narrowed = ((entry.address, tuple(name for name in entry.names if name in needed)) for entry in hosts)
    return tuple(HostEntry(address=address, names=names) for address, names in narrowed if names)


def host_of(address: Address) -> str:
    """The host in `host:port`, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def _refuse_secrets(files: Mapping[str, bytes], kit: str) -> None:
    """No secret goes into a kit by any of its sources; should one be about to, nothing is written."""
    for name, raw in files.items():
        if _PRIVATE.search(raw):
            raise Unusable(f"{name} holds a private key", where=kit, do="Take it out of the charter; replace the key.")


def _quoted(text: str) -> str:
    return json.dumps(text)
