"""How devices' messages are sealed: requests to the gateways' group key, answers under a key of the request's own.

A request's body: key id (32 bytes), then HPKE (attestation.hybrid) of u32 length, words, tensors, signature (64 bytes).
An answer's body: nonce (12 bytes), then AES-256-GCM of the words, the request's id as associated data.
So whoever ends TLS between the two learns lengths and times, and a recorded request opens no second answer.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.canonical import canonical_bytes
from attestation.hybrid import PRIVATE_SIZE, HybridPrivateKey, seal
from fl.edge.messages import MAX_WORDS, Blob
from fl.edge.protocol import Message
from fl.errors import MalformedMessage
from policies.errors import Refused, Unusable

KEY_ID_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64
NONCE_SIZE: Final = 12
MAX_GROUP_KEYS: Final = 4
SEAL_OVERHEAD: Final = KEY_ID_SIZE + 1088 + 32 + 16
"""Bytes of a sealed request beyond its message: key id, encapsulated keys (ML-KEM-768, X25519), tag."""
_REQUEST: Final = b"sealwright-edge-request-v1\0"
_SIGNED: Final = b"sealwright-edge-signed-v1\0"
_ANSWER: Final = b"sealwright-edge-answer-v1\0"
_ZERO: Final = bytes(NONCE_SIZE)
_BY_DIGEST: Final = ECDSA(Prehashed(hashes.SHA256()))


def key_id(public: bytes) -> bytes:
    """The id of a group key: SHA-256 of its raw public key."""
    return sha256(public).digest()


def _info(charter: str, message: Message, identifier: bytes) -> bytes:
    return _REQUEST + bytes.fromhex(charter) + message.encode() + b"\0" + identifier


# --- at a device ------------------------------------------------------------------------------------------------------


def seal_request(
    message: Message, words: bytes, tensors: bytes, *, key: EllipticCurvePrivateKey, group_key: bytes, charter: str
) -> bytes:
    """The body of a request: signed by the device's P-256 `key`, sealed to the raw public `group_key`."""
    content = struct.pack(">I", len(words)) + words + tensors
    r, s = decode_dss_signature(key.sign(_purpose(charter, message) + content, ECDSA(hashes.SHA256())))
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    identifier = key_id(group_key)
    return identifier + seal(content + signature, group_key, info=_info(charter, message, identifier))


def open_answer(body: bytes, answer_key: bytes, request: str) -> bytes:
    """The words of an answer to the request with this id. Raises Refused."""
    try:
        if len(body) > MAX_WORDS + NONCE_SIZE + 16:
            raise ValueError("it is too long")
        return AESGCM(answer_key).decrypt(body[:NONCE_SIZE], body[NONCE_SIZE:], _ANSWER + bytes.fromhex(request))
    except (InvalidTag, ValueError) as error:
        raise Refused(
            "the answer is none to this request, or was changed on its way", where="answer", do="Ask again."
        ) from error


def open_blob(blob: Blob, sealed: bytes) -> bytes:
    """The content of a blob. Raises Refused if it is not what the gateway named."""
    try:
        if not hmac.compare_digest(sha256(sealed).hexdigest(), blob.id):
            raise ValueError("it has another id")
        content = AESGCM(bytes.fromhex(blob.key)).decrypt(_ZERO, sealed, b"")
        if len(content) != blob.size or not hmac.compare_digest(sha256(content).hexdigest(), blob.sha256):
            raise ValueError("it has another content")
    except (InvalidTag, ValueError) as error:
        raise Refused(
            "a blob is not what the gateway named", where=f"blob {blob.id[:16]}…", do="Fetch it again."
        ) from error
    return content


# --- at a gateway -----------------------------------------------------------------------------------------------------


class KeyGone(Exception):
    """A request is sealed to a key that this gateway does not have: the device asks for the gateway's proof again."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A request, opened. `digest` is the SHA-256 that `signature` is over; the words name whose it is."""

    words: bytes
    tensors: memoryview
    digest: bytes = field(repr=False)
    signature: bytes

    def is_signed_by(self, key: EllipticCurvePublicKey) -> bool:
        """Whether the holder of `key` made this request."""
        r, s = int.from_bytes(self.signature[:32], "big"), int.from_bytes(self.signature[32:], "big")
        try:
            key.verify(encode_dss_signature(r, s), self.digest, _BY_DIGEST)
        except InvalidSignature:
            return False
        return True


class GroupKeys:
    """The private keys that all gateways share, the newest first; what is derived from them is in here too.

    They come from a broker as one value (`parse`). It never prints them.
    """

    def __init__(self, keys: tuple[HybridPrivateKey, ...], charter: str) -> None:
        """`charter` is the charter's id, for which alone the keys are used."""
        self._charter = charter
        self.public = keys[0].public_bytes()
        """The public key to which devices seal now."""
        self.id = key_id(self.public)
        self._keys = {key_id(key.public_bytes()): key for key in keys}
        self._secret = keys[0].private_bytes()
        self._cookie_keys = tuple(self._derived(key.private_bytes(), b"cookie") for key in keys)

    @classmethod
    def parse(cls, value: bytes, charter: str) -> GroupKeys:
        """Read 1 to MAX_GROUP_KEYS keys of PRIVATE_SIZE bytes. Raises Unusable."""
        count, rest = divmod(len(value), PRIVATE_SIZE)
        parts = [value[at : at + PRIVATE_SIZE] for at in range(0, len(value), PRIVATE_SIZE)]
        if rest or not 1 <= count <= MAX_GROUP_KEYS or len(set(parts)) != count:
            raise Unusable(
                f"a gateway group key has 1 to {MAX_GROUP_KEYS} different keys of {PRIVATE_SIZE} bytes, "
                f"not {len(value)} bytes",
                where="gateway group key",
                do="Deposit what `seal site group-key` made.",
            )
        return cls(tuple(map(HybridPrivateKey.from_bytes, parts)), charter)

    def open(self, message: Message, body: bytes) -> Opened:
        """Open a request's body. Raises KeyGone, Refused (sealed to no key of ours, or changed), MalformedMessage."""
        key = self._keys.get(body[:KEY_ID_SIZE])
        if key is None:
            raise KeyGone
        content = key.open(body[KEY_ID_SIZE:], info=_info(self._charter, message, body[:KEY_ID_SIZE]))
        if len(content) < 4 + SIGNATURE_SIZE:
            raise MalformedMessage("a request ends before its signature", where=message)
        (length,) = struct.unpack_from(">I", content)
        if length > MAX_WORDS or length > len(content) - 4 - SIGNATURE_SIZE:
            raise MalformedMessage("a request's words are longer than it, or than they may be", where=message)
        signed = memoryview(content)[:-SIGNATURE_SIZE]
        digest = sha256(_purpose(self._charter, message))
        digest.update(signed)
        return Opened(content[4 : 4 + length], signed[4 + length :], digest.digest(), content[-SIGNATURE_SIZE:])

    def seal_blob(self, content: bytes) -> tuple[Blob, bytes]:
        """A blob of `content`: what names and opens it, and its bytes; the same at every gateway with these keys."""
        digest = sha256(content)
        key = self._derived(self._secret, b"blob", digest.digest())
        sealed = AESGCM(key).encrypt(_ZERO, content, b"")
        blob = Blob(id=sha256(sealed).hexdigest(), key=key.hex(), sha256=digest.hexdigest(), size=len(content))
        return blob, sealed

    def cookie(self, at: int, **claims: str | int) -> str:
        """A MAC over `claims` and the second `at`, in hex, for the device to bring back."""
        return f"{at:016x}{_mac(self._cookie_keys[0], at, claims)}"

    def cookie_time(self, cookie: str, **claims: str | int) -> int | None:
        """The second in which a gateway of this group gave `cookie` for these claims; None if none did."""
        if len(cookie) != 16 + 32:
            return None
        at = int(cookie[:16], 16)
        if any(hmac.compare_digest(_mac(key, at, claims), cookie[16:]) for key in self._cookie_keys):
            return at
        return None

    def _derived(self, secret: bytes, purpose: bytes, context: bytes = b"") -> bytes:
        info = b"sealwright-edge-" + purpose + b"-v1\0" + bytes.fromhex(self._charter) + context
        return HKDF(hashes.SHA256(), 32, None, info).derive(secret)


def _mac(key: bytes, at: int, claims: dict[str, str | int]) -> str:
    return hmac.digest(key, canonical_bytes({**claims, "at": at}), "sha256")[:16].hex()


def new_group_key(previous: bytes = b"") -> bytes:
    """A new value of the group key: a fresh key before the `previous` ones, the oldest of which may go."""
    return (HybridPrivateKey.generate().private_bytes() + previous)[: MAX_GROUP_KEYS * PRIVATE_SIZE]


def seal_answer(words: bytes, answer_key: bytes, request: str, randomness: Callable[[int], bytes]) -> bytes:
    """The body of an answer. The nonce is random: who sends a request again is answered again, maybe otherwise."""
    nonce = randomness(NONCE_SIZE)
    return nonce + AESGCM(answer_key).encrypt(nonce, words, _ANSWER + bytes.fromhex(request))


def _purpose(charter: str, message: Message) -> bytes:
    """What a device's signature is over, before the content."""
    return b"".join((_SIGNED, bytes.fromhex(charter), message.encode(), b"\0"))
