"""The ID block and its authentication: who says which measurement a guest must have, and under which names.

Layout: AMD publication 56860, SNP_LAUNCH_FINISH, tables "ID Block" (96 bytes) and "ID Authentication Information"
(4096 bytes). The secure processor refuses to start a guest whose measurement or policy differs from the block's, and
reports FAMILY_ID, IMAGE_ID, GUEST_SVN and the digests of the keys. sev-snp-measure makes such blocks too, with the
policy, the SVN and both ids fixed; here they are arguments, and signatures are deterministic (RFC 6979), so that an
image can be rebuilt bit for bit.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from attestation.errors import MalformedEvidence

ID_BLOCK_SIZE = 96
ID_AUTH_SIZE = 4096
PUBLIC_KEY_SIZE = 0x404
SIGNATURE_SIZE = 0x200

_BLOCK = struct.Struct("<48s16s16sIIQ")
_AUTH = struct.Struct(f"<II56x{SIGNATURE_SIZE}s{PUBLIC_KEY_SIZE}s60x{SIGNATURE_SIZE}s{PUBLIC_KEY_SIZE}s892x")
_KEY = struct.Struct("<I72s72s880x")
_SIGNATURE = struct.Struct("<72s72s368x")
_VERSION = 1
_ECDSA_P384_SHA384 = 1
_CURVE_P384 = 2


class IdKey(Protocol):
    """A P-384 private key wherever it lives: in memory (`EllipticCurvePrivateKey`) or in a token."""

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Return the public half."""

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA) -> bytes:
        """Return the signature over `data` in DER. A token may sign with a random nonce instead of RFC 6979's."""


@dataclass(frozen=True, slots=True)
class IdBlock:
    """What the block binds: launch measurement (48 bytes), two ids (16 bytes each), a version number, the policy."""

    measurement: bytes
    family_id: bytes
    image_id: bytes
    guest_svn: int
    policy: int


@dataclass(frozen=True, slots=True)
class IdAuth:
    """Who vouches for a block: SHA-384 digests of the ID key and, if there is one, of the author key (else None)."""

    id_key_digest: bytes
    author_key_digest: bytes | None


def encode_id_block(block: IdBlock) -> bytes:
    """Return the 96 bytes of `block`. Raises MalformedEvidence if a field has the wrong size or range."""
    for name, value, size in (
        ("measurement", block.measurement, 48),
        ("family id", block.family_id, 16),
        ("image id", block.image_id, 16),
    ):
        if len(value) != size:
            raise _malformed(f"its {name} has {len(value)} bytes, not {size}")
    try:
        return _BLOCK.pack(block.measurement, block.family_id, block.image_id, _VERSION, block.guest_svn, block.policy)
    except struct.error as error:
        raise _malformed(f"a number in it is out of range ({error})") from error


def parse_id_block(raw: bytes) -> IdBlock:
    """Read 96 bytes. Raises MalformedEvidence for another size or version."""
    if len(raw) != ID_BLOCK_SIZE:
        raise _malformed(f"it has {len(raw)} bytes, not {ID_BLOCK_SIZE}")
    measurement, family_id, image_id, version, guest_svn, policy = _BLOCK.unpack(raw)
    if version != _VERSION:
        raise _malformed(f"its version is {version}, not {_VERSION}")
    return IdBlock(measurement, family_id, image_id, guest_svn, policy)


def sign_id_block(block: bytes, id_key: IdKey, author_key: IdKey | None) -> bytes:
    """Return the 4096 bytes that authenticate `block`: `id_key` signs it, and `author_key` (if any) signs that key."""
    public = encode_public_key(id_key.public_key())
    if author_key is None:
        return _AUTH.pack(
            _ECDSA_P384_SHA384, 0, _sign(id_key, block), public, bytes(SIGNATURE_SIZE), bytes(PUBLIC_KEY_SIZE)
        )
    return _AUTH.pack(
        _ECDSA_P384_SHA384,
        _ECDSA_P384_SHA384,
        _sign(id_key, block),
        public,
        _sign(author_key, public),
        encode_public_key(author_key.public_key()),
    )


def verify_id_block(block: bytes, auth: bytes) -> IdAuth:
    """Check both signatures, as the secure processor does, and return the digests that it will report.

    Raises MalformedEvidence for another size, algorithm or reserved byte, and for a signature that does not verify.
    """
    parse_id_block(block)
    if len(auth) != ID_AUTH_SIZE:
        raise _malformed(f"its authentication has {len(auth)} bytes, not {ID_AUTH_SIZE}")
    id_algorithm, author_algorithm, block_signature, id_key, id_key_signature, author_key = _AUTH.unpack(auth)
    if _AUTH.pack(id_algorithm, author_algorithm, block_signature, id_key, id_key_signature, author_key) != auth:
        raise _malformed("reserved bytes of its authentication are not zero")
    if id_algorithm != _ECDSA_P384_SHA384 or author_algorithm not in {0, _ECDSA_P384_SHA384}:
        raise _malformed("it is signed by an unknown algorithm")
    _verify(id_key, block, block_signature, "ID key")
    if not author_algorithm:
        if any(id_key_signature) or any(author_key):
            raise _malformed("it has an author key but no algorithm for it")
        return IdAuth(hashlib.sha384(id_key).digest(), None)
    _verify(author_key, id_key, id_key_signature, "author key")
    return IdAuth(hashlib.sha384(id_key).digest(), hashlib.sha384(author_key).digest())


def encode_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return AMD's structure of a P-384 public key (0x404 bytes), whose SHA-384 is the digest in reports."""
    if not isinstance(key.curve, ec.SECP384R1):
        raise _malformed(f"its key is on {key.curve.name}, not on P-384")
    numbers = key.public_numbers()
    return _KEY.pack(_CURVE_P384, numbers.x.to_bytes(72, "little"), numbers.y.to_bytes(72, "little"))


def key_digest(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return ID_KEY_DIGEST or AUTHOR_KEY_DIGEST for a key: 48 bytes."""
    return hashlib.sha384(encode_public_key(key)).digest()


def _sign(key: IdKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    return _SIGNATURE.pack(r.to_bytes(72, "little"), s.to_bytes(72, "little"))


def _verify(key: bytes, data: bytes, signature: bytes, whose: str) -> None:
    curve, x, y = _KEY.unpack(key)
    r, s = _SIGNATURE.unpack(signature)
    try:
        if curve != _CURVE_P384 or _KEY.pack(curve, x, y) != key or _SIGNATURE.pack(r, s) != signature:
            raise ValueError("reserved bytes")
        public = ec.EllipticCurvePublicNumbers(
            int.from_bytes(x, "little"), int.from_bytes(y, "little"), ec.SECP384R1()
        ).public_key()
        public.verify(
            encode_dss_signature(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
            data,
            ec.ECDSA(hashes.SHA384()),
        )
    except (ValueError, InvalidSignature) as error:
        raise _malformed(f"the signature by its {whose} does not verify") from error


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(f"the ID block cannot be used: {what}", where="ID block", do="Make the image again.")
