"""What an operator does to replace a broker's keys; the broker itself does the rest (own_keys, rewrapping)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from attestation.broker.config import CONFIG_NAME, load_config
from attestation.broker.kek_settings import PeersSettings
from attestation.broker.keks import replace_kek
from attestation.broker.own_keys import KeyFolder
from attestation.broker.storage import key_name, read_database
from policies.charter import read_store
from policies.charter.signing import current_charter
from policies.documents import BrokerEntry
from policies.errors import Unusable


@dataclass(frozen=True, slots=True)
class KeyState:
    """Which keys a broker has (by their names), and how many resources are under which KEK."""

    signing: str
    next_signing: str | None
    kek: str
    resources: Mapping[str, int]
    unused: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As `seal broker keys --json` prints it."""
        return {
            "signing-key": self.signing,
            "next-signing-key": self.next_signing,
            "key-encryption-key": self.kek,
            "resources": dict(self.resources),
            "unused": list(self.unused),
        }


def rotate_keys(folder: Path, at: datetime) -> BrokerEntry:
    """Make the next signing and issuer keys of the broker in `folder`; return its next entry for the charter.

    Raises Unusable if the charter there does not know it, or next keys are there already.
    """
    config = load_config(folder / CONFIG_NAME)
    root = folder / config.root
    if not root.is_file():
        raise Unusable("the broker has no charter yet", where=str(root), do="Its first keys have not been used.")
    entry = current_charter(read_store(folder / config.charter), root.read_bytes()).consortium.broker(config.name)
    if entry is None:
        do = "Put this broker's entry.json into the charter."
        raise Unusable(f"the charter has no broker {config.name}", where=str(folder / config.charter), do=do)
    return KeyFolder(folder, config).make_next(entry, at)


def rotate_kek(folder: Path) -> tuple[str, str]:
    """Put a new KEK file in place of the one in use; return the ids of old and new.

    Raises Unusable if the KEK is no file: a token's and a vault's keys are made there.
    """
    config = load_config(folder / CONFIG_NAME)
    if not isinstance(config.kek, str):
        do = "Make another key there, name it by `kek` and the one in use by `old_keks`, and have the broker reload."
        if isinstance(config.kek, PeersSettings):
            do = "Raise its `generation` in the settings, and have the broker reload."
        raise Unusable("the key-encryption key is not a file", where=str(folder / CONFIG_NAME), do=do)
    return replace_kek(folder / config.kek)


def key_state(folder: Path) -> KeyState:
    """Look at the keys of the broker in `folder`, running or not. Raises Unusable, UnusableKey or BrokerUnavailable."""
    config = load_config(folder / CONFIG_NAME)
    signing = [key_name(key.public_key()) for key in KeyFolder(folder, config).signing()]
    current, others = config.open_keks(folder)
    database = config.open_database(folder)
    try:
        resources = read_database(database, lambda step: step.count_by_kek())
    finally:
        database.dispose()
    unused = tuple(kek.key_id for kek in others if not any(kek.opens(key_id) for key_id in resources))
    for kek in (current, *others):
        kek.close()
    return KeyState(signing[0], signing[1] if len(signing) > 1 else None, current.key_id, resources, unused)
