"""Who vouches for the keys of secure aggregation: the sites' attested signing keys, as their EARs name them."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from attestation.ears import MAX_EAR, MAX_EARS, verify_ears
from attestation.identity import enrolment_reasons
from attestation.jws import read_jws, sign_jws
from fl.errors import MaskingRefused
from fl.party import Party

MASKING_TYPE: Final = "sealwright-masking+jwt"


class Introduction(BaseModel):
    """A signed word with what a stranger needs to believe it: the signing key (SPKI in DER, base64), and its EARs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    word: Annotated[str, Field(max_length=4096)]
    sign_key: Annotated[str, Field(max_length=128)]
    ears: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_EAR)], ...], Field(min_length=1, max_length=MAX_EARS, strict=False)
    ]


class AttestedNotary:
    """The notary of a guest: of a site, which signs, or of a server, which checks only. For one thread."""

    def __init__(self, party: Party, roster: Sequence[str], record_sha256: str) -> None:
        self._party = party
        self._roster = tuple(roster)
        self.job = bytes.fromhex(record_sha256)
        self._keys: dict[str, Ed25519PublicKey] = {}

    def sites(self) -> Mapping[str, str]:
        """The roster with members. Raises MaskingRefused if a site has lost its place."""
        charter = self._party.charter()
        found = {}
        for name in self._roster:
            place = charter.enrolment("site", name)
            if place is None:
                raise MaskingRefused(f"{name} is not enrolled any more")
            found[name] = place.member
        return found

    def introduce(self, payload: Mapping[str, Any]) -> str:
        identity = self._party.identity()
        public = identity.sign_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Introduction(word=self.sign(payload), sign_key=b64(public), ears=identity.ears).model_dump_json()

    def introduced(self, site: str, token: str) -> dict[str, Any]:
        try:
            said = Introduction.model_validate_json(token)
            der = unb64(said.sign_key, where="introduction")
            key = load_der_public_key(der)
        except (ValidationError, ValueError, UnsupportedAlgorithm) as error:
            raise MaskingRefused(f"the introduction of {site} is malformed") from error
        charter = self._party.charter()
        ear = verify_ears(said.ears, charter, self._party.clock())[0]
        reasons = [*enrolment_reasons(ear, charter)]
        if (ear.subject.role, ear.subject.name) != ("site", site):
            reasons.append(f"its EARs are those of {ear.subject.role}/{ear.subject.name}")
        if not hmac.compare_digest(ear.keys.get("sign", ""), sha256(der).hexdigest()):
            reasons.append("its key is not the one that its EARs name")
        if reasons or not isinstance(key, Ed25519PublicKey):
            raise MaskingRefused(f"{site} is not who it says: {'; '.join(reasons) or 'its key is not Ed25519'}")
        self._keys[site] = key
        return self.signed(site, said.word)

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
