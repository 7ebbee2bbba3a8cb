"""A broker's own signing and issuer keys, and how they are replaced while it runs.

`seal broker rotate` makes the next ones beside those in use (`keys/next/`). The charter says from when on they are the
broker's: the commit that writes down the charter which names them is the first that they sign. Then they take the
place of the old ones in the folder; whatever dies in between, the charter tells again which are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.config import BrokerConfig
from attestation.broker.keys import Issuer, create_issuer, load_issuer
from policies.documents import BrokerEntry
from policies.errors import SealwrightError, Unusable, UnusableKey
from policies.keys import generate_ed25519, load_private_key, public_pem


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """What a broker signs and issues with."""

    signing: Ed25519PrivateKey
    issuer: Issuer

    def are(self, entry: BrokerEntry) -> bool:
        """Whether they are those of a charter's entry."""
        return (entry.signing_key, entry.issuer_certificate) == (
            public_pem(self.signing),
            self.issuer.certificate_pem,
        )


class KeyFolder:
    """The files of one broker's own keys. Calls block; they may come from any thread."""

    def __init__(self, folder: Path, config: BrokerConfig) -> None:
        self._files = folder / config.signing_key, folder / config.issuer_key
        self._next = tuple(path.parent / "next" / path.name for path in self._files)
        self._folder = folder
        self._config = config

    def signing(self) -> tuple[Ed25519PrivateKey, ...]:
        """The signing key in use, and the next one if there is one. Raises UnusableKey."""
        return tuple(load_private_key(path) for path in (self._files[0], self._next[0]) if path.exists())

    def find(self, entry: BrokerEntry) -> OwnKeys:
        """The keys of a charter's entry. Raises Unusable or UnusableKey if they are not here."""
        signing = next((key for key in self.signing() if public_pem(key) == entry.signing_key), None)
        if signing is None:
            raise Unusable(
                f"the charter has no broker {entry.name} with this signing key",
                where=str(self._files[0]),
                do="Put this broker's entry.json into the charter, or its own keys here.",
            )
        if self._next[1].exists():
            try:
                return OwnKeys(signing, load_issuer(self._next[1], entry.issuer_certificate))
            except UnusableKey:
                pass  # not the charter's yet
        return OwnKeys(signing, load_issuer(self._files[1], entry.issuer_certificate))

    def make_next(self, entry: BrokerEntry, at: datetime) -> BrokerEntry:
        """Make the next keys and return the charter's entry with them; also as `next-entry.json`. Raises Unusable."""
        if any(path.exists() for path in self._next):
            do = "Put them into the charter, or remove keys/next if no charter will name them."
            raise Unusable("next keys are there already", where=str(self._next[0].parent), do=do)
        for path in self._next:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        issuer = create_issuer(self._next[1], entry.name, at)
        signing = generate_ed25519(self._next[0])
        found = entry.model_copy(update={"signing_key": public_pem(signing), "issuer_certificate": issuer})
        (self._folder / "next-entry.json").write_bytes(found.to_bytes())
        return found

    def promote(self, entry: BrokerEntry) -> bool:
        """Put the next keys that the charter's entry names in place of the old ones; return whether there were any."""
        done = False
        signing, issuer = self._next
        try:
            if signing.exists() and public_pem(load_private_key(signing)) == entry.signing_key:
                signing.replace(self._files[0])
                done = True
            if issuer.exists() and load_issuer(issuer, entry.issuer_certificate):
                issuer.replace(self._files[1])
                done = True
        except (SealwrightError, OSError):
            return done  # not the charter's, or not writable: they serve from where they are
        if done:
            (self._folder / "entry.json").write_bytes(entry.to_bytes())
        return done
