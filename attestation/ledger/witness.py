"""A witness's rules: C2SP tlog-witness `add-checkpoint`, as functions of a request and of what was seen before.

A request is

    old <size of the tree that the witness cosigned last>
    <base64 of a hash of the consistency proof>   (at most 63 such lines)

    <the new checkpoint, signed by its ledger>

and is answered with 200 and cosignature lines, or with

    400 for what is no such request, or an old size beyond the checkpoint's
    403 if the checkpoint is not signed by the ledger's key
    404 if the ledger is none that this witness knows
    409 and the size last cosigned, if that is not the old size; or if the same size has two roots
    422 if the proof does not show that the new tree extends the old one

A witness keeps, for each ledger, the newest tree that it has cosigned, and never cosigns one that does not extend it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.canonical import b64, unb64
from attestation.errors import LedgerRefused
from attestation.jws import ed25519_public_key
from attestation.ledger.checkpoint import (
    MAX_CHECKPOINT,
    Checkpoint,
    NoteSignature,
    ledger_origin,
    open_note,
    parse_note,
    parse_signature,
)
from attestation.ledger.cosignature import cosigner_name
from attestation.ledger.tree import EMPTY_ROOT, HASH_SIZE, verify_consistency
from policies.documents import Consortium
from policies.errors import Unusable

PATH: Final = "/add-checkpoint"
"""Appended to a witness's URL (its submission prefix)."""
SIZE_TYPE: Final = "text/x.tlog.size"
MAX_PROOF: Final = 63
MAX_REQUEST: Final = 32 + MAX_PROOF * 48 + MAX_CHECKPOINT
"""Bytes of the largest request."""
MAX_ANSWER: Final = 4096
MAX_LINES: Final = 16
_OLD: Final = re.compile(r"old (0|[1-9][0-9]{0,15})")
_SIZE: Final = re.compile(r"(0|[1-9][0-9]{0,15})\n")


@dataclass(frozen=True, slots=True)
class AddCheckpoint:
    """A request: the size that the witness is thought to have cosigned last, the proof from there, the signed note."""

    old: int
    proof: tuple[bytes, ...]
    note: str

    def to_bytes(self) -> bytes:
        """As it is sent."""
        lines = (f"old {self.old}\n", *(f"{b64(step)}\n" for step in self.proof), "\n", self.note)
        return "".join(lines).encode()


@dataclass(frozen=True, slots=True)
class Denied:
    """A request that is not cosigned: the HTTP status, why, and for 409 the size last cosigned."""

    status: int
    reason: str
    size: int | None = None


@dataclass(frozen=True, slots=True)
class KnownLogs:
    """What a charter says to one witness: its key name, and the keys of the ledgers that it cosigns, by origin."""

    name: str
    keys: Mapping[str, Ed25519PublicKey]


def known_logs(consortium: Consortium, public_key: str) -> KnownLogs | None:
    """What the witness with this key (PEM) is and cosigns in a consortium: the ledgers of other members' brokers.

    None if the consortium has no such witness.
    """
    own = next((witness for witness in consortium.witnesses if witness.public_key == public_key), None)
    if own is None:
        return None
    domain = consortium.trust_domain
    keys = {
        ledger_origin(domain, broker.name): ed25519_public_key(broker.signing_key)
        for broker in consortium.brokers
        if own in consortium.witnesses_of(broker)
    }
    return KnownLogs(cosigner_name(domain, own.name), keys)


def parse_add_checkpoint(raw: bytes) -> AddCheckpoint:
    """Read a request. Raises Unusable."""
    malformed = Unusable(
        "this is no add-checkpoint request", where="witness", do="Send what C2SP tlog-witness describes."
    )
    if len(raw) > MAX_REQUEST:
        raise malformed
    try:
        head, blank, note = raw.decode("utf-8").partition("\n\n")
    except UnicodeDecodeError as error:
        raise malformed from error
    first, *steps = head.split("\n")
    old = _OLD.fullmatch(first)
    if old is None or not blank or len(steps) > MAX_PROOF:
        raise malformed
    proof = tuple(unb64(step, where="consistency proof") for step in steps)
    if any(len(step) != HASH_SIZE for step in proof):
        raise malformed
    parse_note(note)
    return AddCheckpoint(int(old[1]), proof, note)


def judge(request: AddCheckpoint, logs: Mapping[str, Ed25519PublicKey], seen: Checkpoint | None) -> Checkpoint | Denied:
    """The checkpoint that may be cosigned in place of `seen`, the last one of its ledger; or why none may be."""
    opened = authentic(request, logs)
    return opened if isinstance(opened, Denied) else extends(request, opened, seen)


def authentic(request: AddCheckpoint, logs: Mapping[str, Ed25519PublicKey]) -> Checkpoint | Denied:
    """The checkpoint of a request if a ledger among `logs` signed it: what is checked before anything is looked up."""
    origin = parse_note(request.note).checkpoint.origin
    key = logs.get(origin)
    if key is None:
        return Denied(404, f"the ledger {origin} is none that this witness cosigns")
    try:
        return open_note(request.note, origin, key).checkpoint
    except LedgerRefused as error:
        return Denied(403, error.what)


def extends(request: AddCheckpoint, new: Checkpoint, seen: Checkpoint | None) -> Checkpoint | Denied:
    """`new`, the authentic checkpoint of a request, if it is shown to extend `seen`; or why not."""
    size = 0 if seen is None else seen.size
    if request.old > new.size:
        return Denied(400, f"the old size {request.old} is beyond the checkpoint's, {new.size}")
    if request.old != size:
        return Denied(409, f"the checkpoint cosigned last has {size} entries, not {request.old}", size)
    if seen is not None and new.size == size and new.root != seen.root:
        return Denied(409, f"another tree of {size} entries was cosigned before: this ledger was forked", size)
    if new.size == 0 and new.root != EMPTY_ROOT:
        return Denied(422, "a tree without entries has another root")
    if request.old == 0:
        proven = not request.proof
    else:
        proven = seen is not None and verify_consistency(size, new.size, seen.root, new.root, request.proof)
    if not proven:
        return Denied(422, f"the proof does not show that this tree extends the one of {size} entries cosigned before")
    return new


def parse_size(raw: bytes) -> int:
    """Read the body of a 409 answer: the size that the witness cosigned last. Raises Unusable."""
    found = _SIZE.fullmatch(raw.decode("utf-8", errors="replace"))
    if found is None:
        raise Unusable("the witness names no size", where="witness", do="Check that it speaks C2SP tlog-witness.")
    return int(found[1])


def parse_cosignatures(raw: bytes) -> Sequence[NoteSignature]:
    """Read the body of a 200 answer: at least one signature line. Raises Unusable."""
    text = raw.decode("utf-8", errors="replace")
    lines = text.split("\n")
    if len(raw) > MAX_ANSWER or lines[-1] or not 2 <= len(lines) <= 1 + MAX_LINES:
        raise Unusable(
            "the witness gives no cosignature", where="witness", do="Check that it speaks C2SP tlog-witness."
        )
    return [parse_signature(line) for line in lines[:-1]]
