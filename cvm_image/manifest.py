"""The signed manifest of an image: an in-toto statement in a DSSE envelope.

The statement's subjects are the image's files with their digests; its predicate holds what a verifier expects of a
guest that was started from them. The envelope and the statement are canonical JSON (RFC 8785), so that one manifest
has one digest, by which a charter names it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cvm_image.statement import MAX_STATEMENT, BuilderKey, read_statement, sign_statement, unusable, verify_envelope

MANIFEST = "manifest.dsse.json"
MAX_MANIFEST = MAX_STATEMENT
WHAT = "image manifest"
PREDICATE_TYPE = "tag:sealwright,2026:image/v1"

Vmm = Literal["qemu", "ec2", "gce"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha384 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
FILE_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
FileName = Annotated[str, Field(pattern=FILE_NAME)]


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


def sign_manifest(manifest: ImageManifest, builder: BuilderKey) -> bytes:
    """Return the bytes of `manifest.dsse.json`, signed by the builder."""
    predicate = manifest.model_dump(mode="json")
    files = predicate.pop("files")
    return sign_statement(PREDICATE_TYPE, files, predicate, builder)


def read_manifest(raw: bytes) -> ImageManifest:
    """Return what a manifest says, without asking who signed it. Raises UnusableImage for any other form."""
    _, files, predicate = read_statement(raw, PREDICATE_TYPE, what=WHAT, where=MANIFEST)
    try:
        return ImageManifest.model_validate(predicate | {"files": files})
    except ValidationError as error:
        raise unusable(WHAT, MANIFEST, error) from error


def verify_manifest(raw: bytes, builder: Ed25519PublicKey) -> ImageManifest:
    """Return the manifest if `builder` signed it.

    Raises ImageRefused if not, and UnusableImage if it is no manifest.
    """
    envelope, _, _ = read_statement(raw, PREDICATE_TYPE, what=WHAT, where=MANIFEST)
    verify_envelope(envelope, builder, what="manifest", where=MANIFEST)
    return read_manifest(raw)
