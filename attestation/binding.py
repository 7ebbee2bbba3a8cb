"""What a report's REPORT_DATA stands for: one nonce, one broker, one charter version, the guest's keys and its devices.

Because the broker's name and the charter version are in the digest, evidence made for one broker or for an older
charter is worth nothing to another. Because each key is in it with its purpose, no key can be swapped, nor used as
another. Further devices (GPUs, switches) are asked first, with a nonce that is made from the same session and keys;
their evidence, as the text that is sent, is then in the CPU's REPORT_DATA. So the CPU vouches for exactly these devices
in this order, and each device for this session.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256, sha384, sha512
from typing import Any, Final

from attestation.canonical import b64, canonical_bytes, digests
from policies.errors import Unusable

CONTEXT: Final = b"sealwright-report-data-v1\0"
DEVICE_CONTEXT: Final = b"sealwright-device-nonce-v1\0"
PURPOSES: Final = ("kem", "sign", "tls")
"""A guest's keys: `kem` (raw hybrid public key), `sign` (Ed25519 SPKI DER), `tls` (P-256 SPKI DER)."""
NONCE_SIZE: Final = 32


DEVICE_NONCE_SIZE: Final = 32
"""Bytes of an SPDM nonce."""


def report_data(
    broker: str, charter_id: str, charter_version: int, nonce: bytes, keys: Mapping[str, bytes], devices: str = ""
) -> bytes:
    """The 64 bytes of REPORT_DATA: SHA-512 over a context string and the canonical JSON of everything bound.

    `nonce` is the broker's, NONCE_SIZE bytes; `keys` holds exactly PURPOSES; `devices` is the additional evidence as it
    is sent, empty if there is none. Raises Unusable.
    """
    return bound_report_data(broker, charter_id, charter_version, nonce, digests(keys), devices)


def bound_report_data(
    broker: str,
    charter_id: str,
    charter_version: int,
    nonce: bytes,
    key_digests: Mapping[str, str],
    devices: str = "",
) -> bytes:
    """The same from the keys' SHA-256 (hex) by purpose: what an auditor has of them. Raises Unusable."""
    document = _session(broker, charter_id, charter_version, nonce, key_digests)
    if devices:
        document["devices"] = sha256(devices.encode("utf-8", "surrogatepass")).hexdigest()
    return sha512(CONTEXT + canonical_bytes(document)).digest()


def device_nonce(
    broker: str, charter_id: str, charter_version: int, nonce: bytes, key_digests: Mapping[str, str]
) -> bytes:
    """The 32 bytes with which this session's further devices must have been asked. Raises Unusable."""
    document = _session(broker, charter_id, charter_version, nonce, key_digests)
    return sha384(DEVICE_CONTEXT + canonical_bytes(document)).digest()[:DEVICE_NONCE_SIZE]


def _session(
    broker: str, charter_id: str, charter_version: int, nonce: bytes, key_digests: Mapping[str, str]
) -> dict[str, Any]:
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
    return {
        "broker": broker,
        "charter": {"id": charter_id, "version": charter_version},
        "keys": dict(key_digests),
        "nonce": b64(nonce),
    }


def kbs_report_data(nonce: str, tee_pubkey: Mapping[str, Any], additional_evidence: str) -> bytes:
    """REPORT_DATA of a KBS 0.4.0 attester: SHA-384 over the canonical runtime data, zero-padded to 64 bytes."""
    document = {"additional-evidence": additional_evidence, "nonce": nonce, "tee-pubkey": dict(tee_pubkey)}
    return sha384(canonical_bytes(document)).digest().ljust(64, b"\0")


def kbs_device_nonce(nonce: str, tee_pubkey: Mapping[str, Any]) -> bytes:
    """The 32 bytes with which a KBS 0.4.0 attester asks its further devices."""
    document = {"nonce": nonce, "tee-pubkey": dict(tee_pubkey)}
    return sha384(canonical_bytes(document)).digest()[:DEVICE_NONCE_SIZE]


def tee_key_digest(jwk: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a KBS guest's key as canonical JSON: `keys.tee` of its EAR."""
    return sha256(canonical_bytes(dict(jwk))).hexdigest()
