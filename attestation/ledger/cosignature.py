"""Cosignatures: C2SP tlog-cosignature, `cosignature/v1` by Ed25519; and how one ledger is known to its readers.

A witness signs that at a time the largest tree which it has seen of a ledger has this root, and that it extends every
tree which it has cosigned before:

    cosignature/v1
    time <seconds since 1970 in decimal>
    <the checkpoint's three lines>

Its key name is `<trust domain>/witness/<name>`, its key id has the kind 0x04. A reader who demands w of n witnesses of
members other than the ledger's own, with 2w > n, sees no ledger of which another reader sees a fork, unless a witness
lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from attestation.errors import LedgerRefused
from attestation.jws import ed25519_public_key
from attestation.ledger.checkpoint import (
    SIGNATURE_SIZE,
    Checkpoint,
    Note,
    NoteSignature,
    key_id,
    ledger_origin,
    open_note,
)
from policies.documents import BrokerEntry, Consortium

_COSIGNATURE_V1: Final = b"\x04"
_TIME_SIZE: Final = 8
_LAST_TIME: Final = 2**63 - 1


def cosigner_name(trust_domain: str, witness: str) -> str:
    """The key name of a witness: `<trust domain>/witness/<name>`."""
    return f"{trust_domain}/witness/{witness}"


@dataclass(frozen=True, slots=True)
class Ledger:
    """How a charter makes one ledger known: its origin and key, the witnesses by key name, how many must cosign."""

    origin: str
    key: Ed25519PublicKey
    witnesses: Mapping[str, Ed25519PublicKey]
    threshold: int


def ledger_of(consortium: Consortium, broker: BrokerEntry) -> Ledger:
    """The ledger of one of the consortium's brokers."""
    return Ledger(
        ledger_origin(consortium.trust_domain, broker.name),
        ed25519_public_key(broker.signing_key),
        {
            cosigner_name(consortium.trust_domain, witness.name): ed25519_public_key(witness.public_key)
            for witness in consortium.witnesses_of(broker)
        },
        consortium.witness_threshold,
    )


def cosign(checkpoint: Checkpoint, name: str, key: Ed25519PrivateKey, at: datetime) -> NoteSignature:
    """Cosign a checkpoint as the witness with this key name."""
    seconds = int(at.timestamp())
    signature = seconds.to_bytes(_TIME_SIZE, "big") + key.sign(_message(checkpoint, seconds))
    return NoteSignature(name, key_id(name, key.public_key(), _COSIGNATURE_V1), signature)


def cosigned_at(checkpoint: Checkpoint, one: NoteSignature, name: str, key: Ed25519PublicKey) -> int | None:
    """When (seconds since 1970) this witness made the cosignature; None if it is another key's.

    Raises LedgerRefused if it says that it is this key's and is not.
    """
    if one.name != name or one.key_id != key_id(name, key, _COSIGNATURE_V1):
        return None
    seconds = int.from_bytes(one.signature[:_TIME_SIZE], "big")
    try:
        if len(one.signature) != _TIME_SIZE + SIGNATURE_SIZE or seconds > _LAST_TIME:
            raise InvalidSignature
        key.verify(one.signature[_TIME_SIZE:], _message(checkpoint, seconds))
    except InvalidSignature as error:
        raise LedgerRefused((f"the cosignature of {name} does not verify",), where="checkpoint") from error
    return seconds


def cosigners(note: Note, witnesses: Mapping[str, Ed25519PublicKey]) -> dict[str, int]:
    """Which of these witnesses (by key name) cosigned, and when. Raises LedgerRefused for one that does not verify."""
    found: dict[str, int] = {}
    for one in note.signatures:
        key = witnesses.get(one.name)
        at = None if key is None else cosigned_at(note.checkpoint, one, one.name, key)
        if at is not None:
            found[one.name] = at
    return found


def open_cosigned(note: str, ledger: Ledger) -> Checkpoint:
    """Read a checkpoint that the ledger's key and as many witnesses as are demanded have signed.

    Raises Unusable (form), or LedgerRefused, naming the witnesses that did not sign.
    """
    opened = open_note(note, ledger.origin, ledger.key)
    found = cosigners(opened, ledger.witnesses) if ledger.threshold else {}
    if len(found) < ledger.threshold:
        raise LedgerRefused((lacking(found, ledger),), where="checkpoint")
    return opened.checkpoint


def lacking(found: Mapping[str, int], ledger: Ledger) -> str:
    """The sentence for a checkpoint that too few witnesses have cosigned."""
    missing = ", ".join(name for name in ledger.witnesses if name not in found)
    return f"{len(found)} of the {ledger.threshold} witnesses that are needed cosigned the checkpoint; not {missing}"


def _message(checkpoint: Checkpoint, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{checkpoint.text()}".encode()
