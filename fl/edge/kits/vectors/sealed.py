"""Vectors of the seals: what a device signs, what it seals to, what it opens."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl.edge.sealing import GroupKeys, seal_answer

CHARTER: Final = "ab" * 32
REQUEST: Final = "0123456789abcdef" * 2
ANSWER_KEY: Final = "fedcba9876543210" * 4


def seed(name: str, size: int = 32) -> bytes:
    """Bytes that stand for randomness, the same for a name."""
    found = b"".join(sha256(f"sealwright vectors: {name} {part}".encode()).digest() for part in range(size // 32 + 1))
    return found[:size]


def ed25519(name: str) -> Ed25519PrivateKey:
    """The signing key of this name."""
    return Ed25519PrivateKey.from_private_bytes(seed(name))


def p256(name: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of this name."""
    return ec.derive_private_key(int.from_bytes(seed(name), "big"), ec.SECP256R1())


def group_keys(charter: str = CHARTER) -> GroupKeys:
    """The gateways' group key."""
    return GroupKeys.parse(seed("group key", 96), charter)


def sealing() -> dict[str, Any]:
    """The group's and a device's keys, an answer and a blob with all that is not one, and a request to seal."""
    keys, device = group_keys(), p256("device")
    words = b'{"message":"","retry_seconds":0,"status":"OK"}'
    answer = seal_answer(words, bytes.fromhex(ANSWER_KEY), REQUEST, lambda size: seed("nonce", size))
    content = b"a model's bytes" * 20
    blob, sealed = keys.seal_blob(content)
    named = blob.model_dump(mode="json")
    return {
        "charter": CHARTER,
        "group_key": keys.public.hex(),
        "key_id": keys.id.hex(),
        "device_key": seed("device").hex(),
        "device_public": _point(device).hex(),
        "request": {"message": "result", "words": words.hex(), "tensors": seed("tensors", 100).hex()},
        "answers": [
            {"answer_key": ANSWER_KEY, "request": REQUEST, "body": answer.hex(), "words": words.hex()},
            {"answer_key": ANSWER_KEY, "request": REQUEST[::-1], "body": answer.hex(), "words": None},
            {"answer_key": ANSWER_KEY[::-1], "request": REQUEST, "body": answer.hex(), "words": None},
            {"answer_key": ANSWER_KEY, "request": REQUEST, "body": _flipped(answer).hex(), "words": None},
            {"answer_key": ANSWER_KEY, "request": REQUEST, "body": answer[:20].hex(), "words": None},
            {"answer_key": ANSWER_KEY, "request": REQUEST, "body": "", "words": None},
        ],
        "blobs": [
            {"blob": named, "sealed": sealed.hex(), "content": content.hex()},
            {"blob": named, "sealed": _flipped(sealed).hex(), "content": None},
            {"blob": {**named, "key": "00" * 32}, "sealed": sealed.hex(), "content": None},
            {"blob": {**named, "sha256": "00" * 32}, "sealed": sealed.hex(), "content": None},
            {"blob": {**named, "size": len(content) - 1}, "sealed": sealed.hex(), "content": None},
            {"blob": {**named, "id": "00" * 32}, "sealed": sealed.hex(), "content": None},
        ],
    }


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])
