"""A broker's settings and its folder: one TOML file, and the files it names relative to itself.

broker.toml  root.json  charter/  keys/{signing.pem,issuer.pem,kek}  state/broker.sqlite
keys/witness.pem  state/witness.sqlite   if the broker witnesses the other members' ledgers (attestation.witness)
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from attestation.broker.database import Database, open_database
from attestation.broker.kek_settings import KekSettings, open_kek, other_keks
from attestation.broker.keks import KeyEncryption, create_kek
from attestation.broker.keys import create_issuer
from attestation.settings import read_settings
from policies.documents import BrokerEntry, Name
from policies.errors import Unusable
from policies.keys import generate_ed25519, public_pem, read_secret, write_secret

CONFIG_NAME: Final = "broker.toml"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Limits(_Section):
    """What bounds the broker."""

    session_seconds: Annotated[int, Field(ge=10, le=3600)] = 300
    sessions: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    client_rate: Annotated[float, Field(gt=0, strict=False)] = 200.0
    client_burst: Annotated[int, Field(ge=1)] = 1000


class BrokerConfig(_Section):
    """`broker.toml`. Paths are relative to the file's folder."""

    name: Name
    listen: Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$")]
    root: str = "root.json"
    charter: str = "charter"
    signing_key: str = "keys/signing.pem"
    issuer_key: str = "keys/issuer.pem"
    kek: KekSettings = "keys/kek"
    old_keks: Annotated[tuple[KekSettings, ...], Field(strict=False)] = ()
    database: str = "state/broker.sqlite"
    """A path, or the URL of a PostgreSQL database without a password."""
    database_password: str | None = None
    """A file (0600) with the database's password; None: PGPASSFILE's, or none."""
    witness_key: str = "keys/witness.pem"
    witness_state: str = "state/witness.sqlite"
    endorsements: str = "endorsements"
    kds: bool = True
    gpu_endorsements: str = "gpu"
    timestamp_hours: Annotated[int, Field(ge=1, le=24 * 30)] = 24
    limits: Limits = Limits()

    @field_validator("database")
    @classmethod
    def _known(cls, value: str) -> str:
        if "://" in value and not value.startswith(("postgresql://", "postgresql+psycopg://")):
            raise ValueError("this is neither a path nor the URL of a PostgreSQL database")
        return value

    def open_database(self, folder: Path, *, make: bool = False) -> Database:
        """The database of the broker in `folder`; `make`: it need not be there. Raises Unusable or UnusableKey."""
        if "://" in self.database:
            return open_database(self.database, password=self.password(folder))
        path = folder / self.database
        if not make and not path.is_file():
            raise Unusable("there is no broker's database", where=str(path), do="Name the broker's folder.")
        return open_database(f"sqlite:///{path.absolute()}")

    def open_keks(self, folder: Path) -> tuple[KeyEncryption, list[KeyEncryption]]:
        """The KEK in use, and those from which resources are to be taken. Raises UnusableKey."""
        return open_kek(folder, self.kek), other_keks(folder, self.kek, self.old_keks)

    def password(self, folder: Path) -> str | None:
        """The database's password. Raises UnusableKey."""
        if self.database_password is None:
            return None
        return read_secret(folder / self.database_password, 4096).decode("utf-8").rstrip("\r\n")

    def database_url(self, folder: Path) -> str:
        """The URL of the database of the broker in `folder`."""
        return self.database if "://" in self.database else f"sqlite:///{(folder / self.database).absolute()}"

    def state(self, folder: Path) -> Path | None:
        """The folder that a broker on a file has for itself; None for a database that processes share."""
        return None if "://" in self.database else (folder / self.database).parent


def load_config(path: Path) -> BrokerConfig:
    """Read a broker's settings. Raises Unusable, naming what is wrong."""
    return read_settings(BrokerConfig, path, do="See docs/how-to/run-a-broker.md.")


def create_broker(folder: Path, *, name: str, member: str, url: str, listen: str, at: datetime) -> BrokerEntry:
    """Make a new broker's folder (0700) with its keys and settings, and return its entry for the charter.

    The charter's root and store are still to be put in: `root.json` and `charter/`. Raises Unusable if the folder has
    a broker already.
    """
    config = folder / CONFIG_NAME
    if config.exists():
        raise Unusable("there is a broker here already", where=str(folder), do="Choose another folder.")
    BrokerConfig(name=name, listen=listen)
    for part in (folder, folder / "keys", folder / "state"):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing = generate_ed25519(folder / "keys/signing.pem")
    issuer = create_issuer(folder / "keys/issuer.pem", name, at)
    create_kek(folder / "keys/kek")
    entry = BrokerEntry(name=name, member=member, url=url, signing_key=public_pem(signing), issuer_certificate=issuer)
    (folder / "entry.json").write_bytes(entry.to_bytes())
    write_secret(config, f'name = "{name}"\nlisten = "{listen}"\n'.encode())
    return entry
