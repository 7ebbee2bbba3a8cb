"""Signed statements about an image's files: in-toto statements in DSSE envelopes.

The manifest is one, the provenance another; they differ in their predicate. Envelope and statement are canonical JSON
(RFC 8785), so that one statement has one digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signature, SSlibKey

from cvm_image.errors import ImageRefused, UnusableImage

MAX_STATEMENT = 4 << 20
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


class BuilderKey(Protocol):
    """The builder's Ed25519 key wherever it lives: in memory (`Ed25519PrivateKey`) or in a token."""

    def public_key(self) -> Ed25519PublicKey:
        """Return the public half."""

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes of the signature over `data`."""


def sign_statement(
    predicate_type: str, files: Mapping[str, str], predicate: Mapping[str, Any], builder: BuilderKey
) -> bytes:
    """Return the bytes of a statement about `files` (name → SHA-256 in hex), signed by the builder."""
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }
    envelope = Envelope(rfc8785.dumps(statement), PAYLOAD_TYPE, {})
    key_id = SSlibKey.from_crypto(builder.public_key()).keyid
    envelope.signatures[key_id] = Signature(key_id, builder.sign(envelope.pae()).hex())
    signed: bytes = rfc8785.dumps(envelope.to_dict())
    return signed


def read_statement(
    raw: bytes, predicate_type: str, *, what: str, where: str
) -> tuple[Envelope, dict[str, str], dict[str, Any]]:
    """Return the envelope, the files with their digests, and the predicate, without asking who signed it.

    `what` is what it should be (for the sentence). Raises UnusableImage for any other form.
    """
    try:
        if len(raw) > MAX_STATEMENT:
            raise ValueError(f"larger than {MAX_STATEMENT} bytes")
        envelope = _envelope(raw)
        statement = _canonical(envelope.payload)
        if set(statement) != {"_type", "subject", "predicateType", "predicate"}:
            raise ValueError("not an in-toto statement")
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, predicate_type):
            raise ValueError("a statement about something else")
        subjects = statement["subject"]
        files = {subject["name"]: subject["digest"]["sha256"] for subject in subjects}
        if [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)] != subjects:
            raise ValueError("subjects that are out of order, there twice, or hold something else")
        if not isinstance(statement["predicate"], dict):
            raise ValueError("its predicate is no object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unusable(what, where, error) from error
    return envelope, files, statement["predicate"]


def verify_envelope(envelope: Envelope, builder: Ed25519PublicKey, *, what: str, where: str) -> None:
    """Return if `builder` signed the envelope. Raises ImageRefused if not."""
    try:
        envelope.verify([SSlibKey.from_crypto(builder)], 1)
    except VerificationError as error:
        raise ImageRefused(
            f"the {what} is not signed by this builder",
            where=where,
            do="Get the image, or the key, from its builder.",
        ) from error


def unusable(what: str, where: str, error: Exception) -> UnusableImage:
    """The refusal of something that should be an image's `what`."""
    detail = (
        "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        if isinstance(error, ValidationError)
        else str(error)
    )
    return UnusableImage(f"this is no {what} ({detail})", where=where, do="Make the image again.")


def _envelope(raw: bytes) -> Envelope:
    document = _canonical(raw)
    if set(document) != {"payload", "payloadType", "signatures"}:
        raise ValueError("not a DSSE envelope")
    if document["payloadType"] != PAYLOAD_TYPE:
        raise ValueError("its payload is no in-toto statement")
    envelope = Envelope.from_dict(document)
    if rfc8785.dumps(envelope.to_dict()) != raw:
        raise ValueError("not the one form of its envelope")
    return envelope


def _canonical(raw: bytes) -> dict[str, Any]:
    document = json.loads(raw)
    if not isinstance(document, dict) or rfc8785.dumps(document) != raw:
        raise ValueError("not canonical JSON")
    return document
