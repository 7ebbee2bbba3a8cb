"""Signed checkpoints: C2SP tlog-checkpoint in a C2SP signed-note, Ed25519.

    <origin>
    <size in decimal>
    <base64 of the root hash>

    — <origin> <base64 of key id (4 bytes) and signature (64 bytes)>

The origin is also the signer's key name. A checkpoint of ours has exactly this form: no extension lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from attestation.canonical import b64, unb64
from attestation.errors import LedgerRefused
from attestation.ledger.tree import HASH_SIZE
from policies.errors import Unusable

MAX_CHECKPOINT: Final = 4096
_ED25519: Final = b"\x01"
_ORIGIN: Final = re.compile(r"[a-z0-9][a-z0-9./_-]{0,254}")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,15}")


def ledger_origin(trust_domain: str, broker: str) -> str:
    """The origin of a broker's ledger: `<trust domain>/broker/<name>/ledger`."""
    return f"{trust_domain}/broker/{broker}/ledger"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree head: whose ledger, how many entries, which root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The note's text: three lines."""
        return f"{self.origin}\n{self.size}\n{b64(self.root)}\n"


def key_id(name: str, key: Ed25519PublicKey) -> bytes:
    """C2SP signed-note key id: the first four bytes of SHA-256(name || 0x0A || 0x01 || key)."""
    return sha256(name.encode() + b"\n" + _ED25519 + key.public_bytes_raw()).digest()[:4]


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """The checkpoint as a signed note."""
    text = checkpoint.text()
    signature = key_id(checkpoint.origin, key.public_key()) + key.sign(text.encode())
    return f"{text}\n— {checkpoint.origin} {b64(signature)}\n"


def parse_checkpoint(note: str) -> Checkpoint:
    """Read a checkpoint without checking who signed it. Raises Unusable."""
    return _parse(note)[0]


def open_checkpoint(note: str, origin: str, key: Ed25519PublicKey) -> Checkpoint:
    """Read a checkpoint of the ledger `origin` signed by `key`. Raises Unusable (form) or LedgerRefused."""
    checkpoint, signer, signature = _parse(note)
    if checkpoint.origin != origin:
        raise LedgerRefused((f"the checkpoint is of the ledger {checkpoint.origin}, not {origin}",), where="checkpoint")
    if signer != origin or signature[:4] != key_id(origin, key):
        raise LedgerRefused((f"the checkpoint is not signed by the key of {origin}",), where="checkpoint")
    try:
        key.verify(signature[4:], checkpoint.text().encode())
    except InvalidSignature as error:
        raise LedgerRefused(("the checkpoint's signature does not verify",), where="checkpoint") from error
    return checkpoint


def _parse(note: str) -> tuple[Checkpoint, str, bytes]:
    lines = note.split("\n")
    malformed = Unusable(
        "this is no signed checkpoint", where="checkpoint", do="Take it as the broker made it (C2SP tlog-checkpoint)."
    )
    if len(note) > MAX_CHECKPOINT or len(lines) != 6 or lines[3] or lines[5]:
        raise malformed
    origin, size, root, _, signed, _ = lines
    words = signed.split(" ")
    if not _ORIGIN.fullmatch(origin) or not _SIZE.fullmatch(size) or len(words) != 3 or words[0] != "—":
        raise malformed
    digest, signature = unb64(root, where="checkpoint"), unb64(words[2], where="checkpoint")
    if len(digest) != HASH_SIZE or len(signature) != 4 + 64:
        raise malformed
    return Checkpoint(origin, int(size), digest), words[1], signature
