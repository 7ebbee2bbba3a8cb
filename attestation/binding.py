"""What a report's REPORT_DATA stands for: one nonce, one broker, one charter version and the guest's keys.

Because the broker's name and the charter version are in the digest, evidence made for one broker or for an older
charter is worth nothing to another. Because each key is in it with its purpose, no key can be swapped, nor used as
another.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256, sha384, sha512
from typing import Any, Final

from attestation.canonical import b64, canonical_bytes, digests
from policies.errors import Unusable

CONTEXT: Final = b"sealwright-report-data-v1\0"
PURPOSES: Final = ("kem", "sign", "tls")
"""A guest's keys: `kem` (raw hybrid public key), `sign` (Ed25519 SPKI DER), `tls` (P-256 SPKI DER)."""
NONCE_SIZE: Final = 32


def report_data(broker: str, charter_id: str, charter_version: int, nonce: bytes, keys: Mapping[str, bytes]) -> bytes:
    """The 64 bytes of REPORT_DATA: SHA-512 over a context string and the canonical JSON of everything bound.

    `nonce` is the broker's, NONCE_SIZE bytes; `keys` holds exactly PURPOSES. Raises Unusable.
    """
    return bound_report_data(broker, charter_id, charter_version, nonce, digests(keys))


def bound_report_data(
    broker: str, charter_id: str, charter_version: int, nonce: bytes, key_digests: Mapping[str, str]
) -> bytes:
    """The same from the keys' SHA-256 (hex) by purpose: what an auditor has of them. Raises Unusable."""
    if sorted(key_digests) != list(PURPOSES):
        raise Unusable(
            f"a guest binds the keys {', '.join(PURPOSES)}, not {', '.join(sorted(key_digests)) or 'none'}",
            where="keys",
            do="Send exactly these keys.",
        )
    if len(nonce) != NONCE_SIZE:
        raise Unusable(
            f"a nonce has {NONCE_SIZE} bytes, not {len(nonce)}", where="nonce", do="Take it from the broker."
        )
    document = {
        "broker": broker,
        "charter": {"id": charter_id, "version": charter_version},
        "keys": dict(key_digests),
        "nonce": b64(nonce),
    }
    return sha512(CONTEXT + canonical_bytes(document)).digest()


def kbs_report_data(nonce: str, tee_pubkey: Mapping[str, Any], additional_evidence: str) -> bytes:
    """REPORT_DATA of a KBS 0.4.0 attester: SHA-384 over the canonical runtime data, zero-padded to 64 bytes."""
    document = {"additional-evidence": additional_evidence, "nonce": nonce, "tee-pubkey": dict(tee_pubkey)}
    return sha384(canonical_bytes(document)).digest().ljust(64, b"\0")


def tee_key_digest(jwk: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a KBS guest's key as canonical JSON: `keys.tee` of its EAR."""
    return sha256(canonical_bytes(dict(jwk))).hexdigest()
