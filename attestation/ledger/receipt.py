"""Receipts: that an entry is in a ledger whose head a broker signed and its witnesses cosigned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from attestation.canonical import b64, canonical_bytes, unb64
from attestation.errors import LedgerRefused
from attestation.ledger.checkpoint import MAX_CHECKPOINT, Checkpoint
from attestation.ledger.cosignature import Ledger, open_cosigned
from attestation.ledger.tree import HASH_SIZE, leaf_hash, verify_inclusion
from policies.errors import Unusable

MAX_PATH: Final = 64


@dataclass(frozen=True, slots=True)
class Receipt:
    """Entry number `index` is in the tree that `checkpoint` (a signed note) heads: `proof` is its inclusion proof."""

    index: int
    checkpoint: str
    proof: tuple[bytes, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"checkpoint": self.checkpoint, "index": self.index, "proof": [b64(step) for step in self.proof]}

    def to_bytes(self) -> bytes:
        """As canonical JSON."""
        return canonical_bytes(self.to_json())


def parse_receipt(value: Mapping[str, Any]) -> Receipt:
    """Read what `Receipt.to_json` makes. Raises Unusable."""
    index, checkpoint, proof = value.get("index"), value.get("checkpoint"), value.get("proof")
    if (
        set(value) != {"index", "checkpoint", "proof"}
        or type(index) is not int
        or not isinstance(checkpoint, str)
        or len(checkpoint) > MAX_CHECKPOINT
        or not isinstance(proof, list)
        or len(proof) > MAX_PATH
        or not all(isinstance(step, str) and len(step) <= 2 * HASH_SIZE for step in proof)
    ):
        raise Unusable("this is no receipt", where="receipt", do="Take receipts as the broker made them.")
    return Receipt(index, checkpoint, tuple(unb64(step, where="receipt") for step in proof))


def check_receipt(receipt: Receipt, entry: bytes, ledger: Ledger) -> Checkpoint:
    """Check that the receipt shows `entry` (its bytes) in this ledger, cosigned by as many witnesses as it demands.

    Raises LedgerRefused or Unusable.
    """
    checkpoint = open_cosigned(receipt.checkpoint, ledger)
    if not verify_inclusion(receipt.index, checkpoint.size, leaf_hash(entry), receipt.proof, checkpoint.root):
        raise LedgerRefused(
            (f"the proof does not show this entry at {receipt.index} of {checkpoint.size}",), where="receipt"
        )
    return checkpoint
