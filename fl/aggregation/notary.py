"""Who vouches for the keys of secure aggregation: the sites' attested signing keys, as their EARs name them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.errors import PeerRefused
from attestation.introduction import introduce, read_introduction
from attestation.jws import read_jws, sign_jws
from fl.errors import MaskingRefused
from fl.party import Party

if TYPE_CHECKING:
    from policies.charter import Charter

MASKING_TYPE: Final = "sealwright-masking+jwt"


class AttestedNotary:
    """The notary of a guest: of a site, which signs, or of a server, which checks only. For one thread."""

    def __init__(self, party: Party, roster: Sequence[str], record_sha256: str) -> None:
        self._party = party
        self._roster = tuple(roster)
        self.job = bytes.fromhex(record_sha256)
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._members: tuple[Charter | None, Mapping[str, str]] = None, {}

    def sites(self) -> Mapping[str, str]:
        """The roster with members. Raises MaskingRefused if a site has lost its place."""
        charter = self._party.charter()
        if self._members[0] is charter:
            return self._members[1]
        found = {}
        for name in self._roster:
            place = charter.enrolment("site", name)
            if place is None:
                raise MaskingRefused(f"{name} is not enrolled any more")
            found[name] = place.member
        self._members = charter, found
        return found

    def introduce(self, payload: Mapping[str, Any]) -> str:
        return introduce(self._party.identity(), dict(payload), typ=MASKING_TYPE)

    def introduced(self, site: str, token: str) -> dict[str, Any]:
        charter, at = self._party.charter(), self._party.clock()
        try:
            found = read_introduction(token, charter, at, role="site", name=site, typ=MASKING_TYPE)
        except PeerRefused as error:
            raise MaskingRefused(f"{site} is not who it says: {'; '.join(error.reasons)}") from error
        self._keys[site] = found.key
        return dict(found.word)

    def sign(self, payload: Mapping[str, Any]) -> str:
        identity = self._party.identity()
        return sign_jws(dict(payload), identity.sign_key, kid=f"site/{identity.name}", typ=MASKING_TYPE)

    def signed(self, site: str, token: str) -> dict[str, Any]:
        key = self._keys.get(site)
        if key is None:
            raise MaskingRefused(f"{site} has not introduced itself")
        return read_jws(token, key, typ=MASKING_TYPE)


class SimulatedNotary:
    """The notary of a simulation, where nobody is attested: each client is a member of its own, words are unsigned."""

    def __init__(self, job: str, clients: Sequence[str]) -> None:
        self.job = sha256(job.encode()).digest()
        self._clients = tuple(clients)

    def sites(self) -> Mapping[str, str]:
        return {name: name for name in self._clients}

    def introduce(self, payload: Mapping[str, Any]) -> str:
        return self.sign(payload)

    def introduced(self, site: str, token: str) -> dict[str, Any]:
        return self.signed(site, token)

    def sign(self, payload: Mapping[str, Any]) -> str:
        return json.dumps(dict(payload))

    def signed(self, site: str, token: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(token)
        return found
