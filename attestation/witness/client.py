"""Asking a witness for its cosignature: C2SP tlog-witness from the ledger's side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from attestation.connection import Connection
from attestation.errors import BrokerUnavailable
from attestation.jws import ed25519_public_key
from attestation.ledger.checkpoint import Checkpoint, NoteSignature
from attestation.ledger.cosignature import cosigned_at, cosigner_name
from attestation.ledger.witness import (
    MAX_ANSWER,
    PATH,
    AddCheckpoint,
    parse_cosignatures,
    parse_size,
)
from policies.documents import Witness
from policies.errors import SealwrightError

_SOON: Final = 1.0
"""Seconds within which a connection that was kept shows that it has died."""
_WORDS: Final = {
    403: "it does not know the key that signed this ledger",
    404: "it does not know this ledger",
    422: "this ledger does not extend the one that it cosigned before: it was forked",
}


@dataclass(frozen=True, slots=True)
class Behind:
    """The witness cosigned another size last than it was thought to."""

    size: int


@dataclass(frozen=True, slots=True)
class WitnessRefusal:
    """Why there is no cosignature: a sentence that names the witness."""

    reason: str


class WitnessClient:
    """One witness, known by its entry in a charter. For one thread at a time; its connection is kept."""

    def __init__(self, entry: Witness, trust_domain: str, *, timeout: float) -> None:
        self.entry = entry
        self.name = cosigner_name(trust_domain, entry.name)
        self.key = ed25519_public_key(entry.public_key)
        self._connection = Connection(entry.name, entry.url, entry.issuer_certificate, timeout=timeout, role="witness")

    def add(self, request: AddCheckpoint, checkpoint: Checkpoint) -> NoteSignature | Behind | WitnessRefusal:
        """Hand over a checkpoint; return its checked cosignature, where the witness is, or why there is neither."""
        try:
            status, raw = self._call(request.to_bytes())
            if status == 200:
                return self._cosignature(raw, checkpoint)
            if status == 409:
                return Behind(parse_size(raw))
        except BrokerUnavailable as error:
            return WitnessRefusal(error.what)
        except SealwrightError as error:
            return self._refusal(f"its answer is not good: {error.what}")
        return self._refusal(_WORDS.get(status, f"it answers HTTP {status}"))

    def close(self) -> None:
        """Close its connection."""
        self._connection.close()

    def _call(self, body: bytes) -> tuple[int, bytes]:
        start = time.monotonic()
        try:
            return self._post(body)
        except BrokerUnavailable:
            if time.monotonic() - start > _SOON:
                raise
            return self._post(body)  # a kept connection may have died of age: the next one is new

    def _post(self, body: bytes) -> tuple[int, bytes]:
        return self._connection.call("POST", PATH, body, limit=MAX_ANSWER, content_type="text/plain")

    def _cosignature(self, raw: bytes, checkpoint: Checkpoint) -> NoteSignature | WitnessRefusal:
        for one in parse_cosignatures(raw):
            if cosigned_at(checkpoint, one, self.name, self.key) is not None:
                return one
        return self._refusal("it cosigned with another key than the charter's")

    def _refusal(self, reason: str) -> WitnessRefusal:
        return WitnessRefusal(f"witness {self.entry.name}: {reason}")
