"""The signed manifest of an image: an in-toto statement in a DSSE envelope.

The statement's subjects are the image's files with their digests; its predicate holds what a verifier expects of a
guest that was started from them. The envelope and the statement are canonical JSON (RFC 8785), so that one manifest
has one digest, by which a charter names it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from cvm_image.errors import ImageRefused, UnusableImage

MANIFEST = "manifest.dsse.json"
MAX_MANIFEST = 4 << 20
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "tag:sealwright,2026:image/v1"

Vmm = Literal["qemu", "ec2", "gce"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha384 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Measurement(_Document):
    """The launch measurement (hex) that a guest with these settings reports."""

    measurement: Sha384
    vcpu_model: Annotated[str, Field(pattern=r"^EPYC[A-Za-z0-9-]{0,32}$")]
    vcpus: Annotated[int, Field(ge=1, le=512)]
    vmm: Vmm
    guest_features: Annotated[int, Field(ge=0, lt=1 << 53)]


class ImageManifest(_Document):
    """What an image is, and what a guest started from it reports.

    `files` are the other files of the image folder with their SHA-256; `measurements` stand in the order of the blocks
    in `id-block` and `id-auth`. `policy` is the guest policy of the ID blocks; key digests are SHA-384 over AMD's
    structure of the public key (None: no author key).
    """

    name: Name
    platform: Literal["hardware", "virtual"]
    entry: str
    svn: Annotated[int, Field(ge=0, lt=1 << 32)]
    family_id: Identifier
    image_id: Identifier
    policy: Annotated[int, Field(ge=0, lt=1 << 53)]
    root_hash: Sha256
    lock_sha256: Sha256
    id_key_digest: Sha384
    author_key_digest: Sha384 | None
    measurements: Annotated[list[Measurement], Field(min_length=1, max_length=1024)]
    files: Annotated[dict[FileName, Sha256], Field(min_length=1, max_length=64)]

    def reference_values(self) -> frozenset[bytes]:
        """Return the measurements as a verifier expects them: 48 bytes each."""
        return frozenset(bytes.fromhex(value.measurement) for value in self.measurements)


def sign_manifest(manifest: ImageManifest, builder: Ed25519PrivateKey) -> bytes:
    """Return the bytes of `manifest.dsse.json`, signed by the builder."""
    predicate = manifest.model_dump(mode="json")
    files = predicate.pop("files")
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    envelope = Envelope(rfc8785.dumps(statement), PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(builder))
    signed: bytes = rfc8785.dumps(envelope.to_dict())
    return signed


def read_manifest(raw: bytes) -> ImageManifest:
    """Return what a manifest says, without asking who signed it. Raises UnusableImage for any other form."""
    return _statement(_envelope(raw))


def verify_manifest(raw: bytes, builder: Ed25519PublicKey) -> ImageManifest:
    """Return the manifest if `builder` signed it.

    Raises ImageRefused if not, and UnusableImage if it is no manifest.
    """
    envelope = _envelope(raw)
    try:
        envelope.verify([SSlibKey.from_crypto(builder)], 1)
    except VerificationError as error:
        raise ImageRefused(
            "the manifest is not signed by this builder",
            where=MANIFEST,
            do="Get the image, or the key, from its builder.",
        ) from error
    return _statement(envelope)


def _envelope(raw: bytes) -> Envelope:
    try:
        if len(raw) > MAX_MANIFEST:
            raise ValueError(f"larger than {MAX_MANIFEST} bytes")
        document = _canonical(raw)
        if set(document) != {"payload", "payloadType", "signatures"}:
            raise ValueError("not a DSSE envelope")
        if document["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("its payload is no in-toto statement")
        envelope = Envelope.from_dict(document)
        if rfc8785.dumps(envelope.to_dict()) != raw:
            raise ValueError("not the one form of its envelope")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(error) from error
    return envelope


def _statement(envelope: Envelope) -> ImageManifest:
    try:
        statement = _canonical(envelope.payload)
        if set(statement) != {"_type", "subject", "predicateType", "predicate"}:
            raise ValueError("not an in-toto statement")
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise ValueError("a statement about something else than an image")
        subjects = statement["subject"]
        files = {subject["name"]: subject["digest"]["sha256"] for subject in subjects}
        if [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)] != subjects:
            raise ValueError("subjects that are out of order, there twice, or hold something else")
        return ImageManifest.model_validate(statement["predicate"] | {"files": files})
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise _unusable(error) from error


def _canonical(raw: bytes) -> dict[str, Any]:
    document = json.loads(raw)
    if not isinstance(document, dict) or rfc8785.dumps(document) != raw:
        raise ValueError("not canonical JSON")
    return document


def _unusable(error: Exception) -> UnusableImage:
    detail = (
        "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        if isinstance(error, ValidationError)
        else str(error)
    )
    return UnusableImage(f"this is no image manifest ({detail})", where=MANIFEST, do="Make the image again.")
