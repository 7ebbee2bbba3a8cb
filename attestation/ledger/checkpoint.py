"""Signed checkpoints: C2SP tlog-checkpoint in a C2SP signed-note, Ed25519.

    <origin>
    <size in decimal>
    <base64 of the root hash>

    — <origin> <base64 of key id (4 bytes) and signature (64 bytes)>
    — <witness> <base64 of key id (4 bytes), time (8 bytes) and signature (64 bytes)>

The origin is also the signer's key name. A checkpoint of ours has exactly this form: no extension lines. Further lines
are cosignatures (attestation.ledger.cosignature); those of keys that nobody here knows are passed over.
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

MAX_CHECKPOINT: Final = 8192
"""Bytes of the largest checkpoint: 16 cosignatures beside the ledger's own signature."""
MAX_SIGNATURES: Final = 32
KEY_ID_SIZE: Final = 4
SIGNATURE_SIZE: Final = 64
_ED25519: Final = b"\x01"
_ORIGIN: Final = re.compile(r"[a-z0-9][a-z0-9./_-]{0,254}")
_KEY_NAME: Final = re.compile(r"[!-*,-~]{1,255}")  # printable ASCII without blank and plus (C2SP signed-note)
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


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """One signature line of a note: by whom it says it is, the key's id, and what follows it."""

    name: str
    key_id: bytes
    signature: bytes

    def line(self) -> str:
        """The line, with its newline."""
        return f"— {self.name} {b64(self.key_id + self.signature)}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A checkpoint and its signatures, none of which is checked yet."""

    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...]

    def by(self, name: str, identifier: bytes) -> tuple[NoteSignature, ...]:
        """The signatures that say they are by this key."""
        return tuple(one for one in self.signatures if one.name == name and one.key_id == identifier)


def key_id(name: str, key: Ed25519PublicKey, kind: bytes = _ED25519) -> bytes:
    """C2SP signed-note key id: the first four bytes of SHA-256(name || 0x0A || kind || key)."""
    return sha256(name.encode() + b"\n" + kind + key.public_bytes_raw()).digest()[:KEY_ID_SIZE]


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """The checkpoint as a signed note."""
    text = checkpoint.text()
    name = checkpoint.origin
    return f"{text}\n{NoteSignature(name, key_id(name, key.public_key()), key.sign(text.encode())).line()}"


def parse_note(note: str) -> Note:
    """Read a checkpoint and its signatures without checking any. Raises Unusable."""
    malformed = Unusable(
        "this is no signed checkpoint", where="checkpoint", do="Take it as the broker made it (C2SP tlog-checkpoint)."
    )
    if len(note) > MAX_CHECKPOINT:
        raise malformed
    lines = note.split("\n")
    if not 6 <= len(lines) <= 5 + MAX_SIGNATURES or lines[3] or lines[-1]:
        raise malformed
    origin, size, root = lines[:3]
    if not _ORIGIN.fullmatch(origin) or not _SIZE.fullmatch(size):
        raise malformed
    digest = unb64(root, where="checkpoint")
    signatures = tuple(parse_signature(line) for line in lines[4:-1])
    if len(digest) != HASH_SIZE:
        raise malformed
    return Note(Checkpoint(origin, int(size), digest), signatures)


def parse_signature(line: str) -> NoteSignature:
    """Read one signature line, without its newline. Raises Unusable."""
    words = line.split(" ")
    if len(words) == 3 and words[0] == "—" and _KEY_NAME.fullmatch(words[1]):
        raw = unb64(words[2], where="signature line")
        if len(raw) > KEY_ID_SIZE:
            return NoteSignature(words[1], raw[:KEY_ID_SIZE], raw[KEY_ID_SIZE:])
    raise Unusable(
        "this is no signature line of a note", where="signature line", do="Take it as its signer made it (signed-note)."
    )


def parse_checkpoint(note: str) -> Checkpoint:
    """Read a checkpoint without checking who signed it. Raises Unusable."""
    return parse_note(note).checkpoint


def open_checkpoint(note: str, origin: str, key: Ed25519PublicKey) -> Checkpoint:
    """Read a checkpoint of the ledger `origin` signed by `key`. Raises Unusable (form) or LedgerRefused."""
    return open_note(note, origin, key).checkpoint


def open_note(note: str, origin: str, key: Ed25519PublicKey) -> Note:
    """Like `open_checkpoint`, with all signatures; no other than the ledger's own is checked."""
    found = parse_note(note)
    if found.checkpoint.origin != origin:
        reason = f"the checkpoint is of the ledger {found.checkpoint.origin}, not {origin}"
        raise LedgerRefused((reason,), where="checkpoint")
    own = found.by(origin, key_id(origin, key))
    if not own:
        raise LedgerRefused((f"the checkpoint is not signed by the key of {origin}",), where="checkpoint")
    for one in own:
        try:
            key.verify(one.signature, found.checkpoint.text().encode())
        except InvalidSignature as error:
            raise LedgerRefused(("the checkpoint's signature does not verify",), where="checkpoint") from error
    return found
