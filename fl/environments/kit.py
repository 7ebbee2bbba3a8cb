"""A user's kit: the folder with which a data scientist reaches the consortium's brokers and FL server.

    kit.dsse.json every file's SHA-256, signed by a member (`policies.kits`): checked before anything is used
    root.json     the charter's first root
    kit.toml      member, user, charter, [[brokers]] name and url, [server] name and address
    local/        made on the user's machine, and no part of the kit:
        tls.key, tls.pem   the user's TLS key and self-signed certificate (the charter names it)
        signing.key   Ed25519 key with which job records are signed
        results.key   the 96 secret bytes of the hybrid key to which results are sealed
        model.key     the 32 bytes under which first models are sealed (only submitters have it)
        root.json     the root that the user trusts beforehand, if it was put there: the kit must be for it

Files with keys are readable by their owner alone, or they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from attestation.client import fetch_charter
from attestation.hybrid import HybridPrivateKey
from fl.errors import KitUnusable
from policies.documents import Digest, Document, Name, parse_toml
from policies.init_data import BrokerAddress, ServerAddress
from policies.keys import load_private_key, read_secret
from policies.kits import LOCAL, USER_FILE, open_signed_kit

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from attestation.client import BrokerClient
    from policies.charter import Charter

MODEL_KEY_SIZE: Final = 32


class KitFile(Document):
    """`kit.toml`."""

    member: Name
    user: Name
    charter: Digest
    brokers: Annotated[tuple[BrokerAddress, ...], Field(min_length=1, max_length=16)]
    server: ServerAddress


@dataclass(frozen=True, slots=True)
class Kit:
    """An opened kit. It never prints its keys."""

    file: KitFile
    root: bytes = field(repr=False)
    tls_key: str = field(repr=False)
    tls_certificate: str
    signing_key: Ed25519PrivateKey = field(repr=False)
    results_key: HybridPrivateKey = field(repr=False)
    model_key: bytes | None = field(repr=False)

    @property
    def user(self) -> str:
        """`MEMBER/USER`."""
        return f"{self.file.member}/{self.file.user}"


@dataclass(frozen=True, slots=True)
class CurrentCharter:
    """The charter as a broker serves it now, verified from the kit's root, with that broker's signed time."""

    charter: Charter
    at: datetime
    broker: BrokerClient


def open_kit(folder: Path) -> Kit:
    """Verify and read a kit.

    Raises KitRefused, naming each file that was changed, is missing or foreign; KitUnusable for what is no user's kit,
    or whose keys are missing; UnusableKey for a key file that others may read.
    """
    if not folder.is_dir():
        raise KitUnusable("there is no such folder", where=str(folder))
    signed = open_signed_kit(folder)
    if signed.manifest.role != "user":
        raise KitUnusable(f"this is the kit of {signed.manifest.place}, not of a user", where=str(folder))
    file = parse_toml(KitFile, signed.files[USER_FILE], str(folder / USER_FILE))
    manifest = signed.manifest
    if (file.member, file.user, file.charter) != (manifest.member, manifest.name, manifest.charter):
        raise KitUnusable("kit.toml is for somebody else than the kit", where=str(folder))
    keys = folder / LOCAL
    try:
        certificate = _read(keys / "tls.pem", 64 << 10).decode("ascii")
        model = read_secret(keys / "model.key") if (keys / "model.key").exists() else None
        kit = Kit(
            file,
            signed.root,
            read_secret(keys / "tls.key").decode("ascii"),
            certificate,
            load_private_key(keys / "signing.key"),
            HybridPrivateKey.from_bytes(read_secret(keys / "results.key")),
            model,
        )
    except (OSError, UnicodeDecodeError) as error:
        raise KitUnusable(f"a file in local/ cannot be read: {error}", where=str(folder)) from error
    if model is not None and len(model) != MODEL_KEY_SIZE:
        raise KitUnusable(f"model.key has {len(model)} bytes, not {MODEL_KEY_SIZE}", where=str(folder))
    return kit


@contextmanager
def current_charter(kit: Kit, timeout: float) -> Iterator[CurrentCharter]:
    """Fetch the charter from the first of the kit's brokers that has it. Raises Refused, BrokerUnavailable."""
    brokers = [(broker.name, broker.url) for broker in kit.file.brokers]
    fetched = fetch_charter(brokers, root=kit.root, timeout=timeout)
    try:
        yield CurrentCharter(fetched.charter, fetched.at, fetched.client)
    finally:
        fetched.client.close()


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise KitUnusable(f"{path.name} has more than {limit} bytes", where=str(path))
    return raw
