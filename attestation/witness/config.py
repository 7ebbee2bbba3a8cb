"""A witness's settings and folder, alone or beside a broker.

witness.toml  entry.json  root.json  charter/  keys/{witness.pem,issuer.pem}  state/witness.sqlite
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, StringConstraints

from attestation.broker.config import load_config as load_broker_config
from attestation.broker.keys import create_issuer
from attestation.settings import read_settings
from attestation.witness.service import PREFIX
from attestation.witness.store import create_store
from policies.documents import BrokerEntry, Name, Witness, parse_document
from policies.errors import Unusable
from policies.keys import generate_ed25519, public_pem, write_secret

CONFIG_NAME: Final = "witness.toml"
_ENTRY_LIMIT: Final = 64 * 1024


class WitnessConfig(BaseModel):
    """`witness.toml`. Paths are relative to the file's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name
    listen: Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$")]
    root: str = "root.json"
    charter: str = "charter"
    entry: str = "entry.json"
    witness_key: str = "keys/witness.pem"
    issuer_key: str = "keys/issuer.pem"
    state: str = "state/witness.sqlite"


def load_config(path: Path) -> WitnessConfig:
    """Read a witness's settings. Raises Unusable, naming what is wrong."""
    return read_settings(WitnessConfig, path, do="See docs/how-to/run-a-witness.md.")


def create_witness(folder: Path, *, name: str, member: str, url: str, listen: str, at: datetime) -> Witness:
    """Make the folder (0700) of a witness that stands alone: keys, settings, empty state; return its entry.

    `url` is where its server is reached, without a path. The charter's root and store are still to be put in:
    `root.json` and `charter/`. Raises Unusable if the folder has a witness already.
    """
    config = folder / CONFIG_NAME
    if config.exists():
        raise Unusable("there is a witness here already", where=str(folder), do="Choose another folder.")
    WitnessConfig(name=name, listen=listen)
    for part in (folder, folder / "keys", folder / "state"):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    create_store(folder / "state/witness.sqlite")
    key = generate_ed25519(folder / "keys/witness.pem")
    issuer = create_issuer(folder / "keys/issuer.pem", name, at)
    entry = Witness(
        name=name,
        member=member,
        url=url.rstrip("/") + PREFIX,
        public_key=public_pem(key),
        issuer_certificate=issuer,
    )
    (folder / "entry.json").write_bytes(entry.to_bytes())
    write_secret(config, f'name = "{name}"\nlisten = "{listen}"\n'.encode())
    return entry


def add_witness(folder: Path) -> Witness:
    """Give the broker in `folder` a key and an empty state to witness other members' ledgers with; return its entry.

    The witness has the broker's name, address and TLS certificate. Raises Unusable if the broker has a witness already.
    """
    config = load_broker_config(folder / "broker.toml")
    broker = read_broker_entry(folder / "entry.json")
    create_store(folder / config.witness_state)
    key = generate_ed25519(folder / config.witness_key)
    entry = Witness(
        name=broker.name,
        member=broker.member,
        url=broker.url.rstrip("/") + PREFIX,
        public_key=public_pem(key),
        issuer_certificate=broker.issuer_certificate,
    )
    (folder / "witness.json").write_bytes(entry.to_bytes())
    return entry


def read_broker_entry(path: Path) -> BrokerEntry:
    """A broker's entry.json, as `seal broker init` made it. Raises Unusable."""
    return parse_document(BrokerEntry, _read(path), str(path))


def read_witness_entry(path: Path) -> Witness:
    """A witness's entry.json, as it was made for the charter. Raises Unusable."""
    return parse_document(Witness, _read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_ENTRY_LIMIT + 1)
    except OSError as error:
        do = "Put it back as it was made for the charter."
        raise Unusable(f"the entry cannot be read: {error.strerror}", where=str(path), do=do) from error
