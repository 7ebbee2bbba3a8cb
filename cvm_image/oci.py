"""An image folder as an OCI artefact in an image layout on disk, which any OCI tool carries to and from a registry.

OCI image-spec 1.1: a layout is `oci-layout`, `index.json` and `blobs/sha256/`; an artefact is an image manifest with an
`artifactType`, the empty configuration, and one layer for each file of the image folder, named by its title annotation.
The same image gives the same layout, byte for byte. What comes out of a layout is believed only after `verify_image`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.files import read_file
from cvm_image.manifest import FILE_NAME, MANIFEST, ImageManifest
from cvm_image.verify import changed_files, file_digest, load_image, verify_image

ARTEFACT = "application/vnd.sealwright.image.v1"
FILE = "application/vnd.sealwright.image.file.v1"
TITLE = "org.opencontainers.image.title"
REFERENCE = "org.opencontainers.image.ref.name"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
EMPTY = b"{}"
MAX_DOCUMENT = 1 << 20
MAX_FILE = 32 << 30

_Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Descriptor(BaseModel):
    """A content descriptor (image-spec 1.1, descriptor.md). Fields that nobody here reads are let pass, as it asks."""

    model_config = ConfigDict(strict=True, frozen=True)
    mediaType: str
    digest: _Digest
    size: Annotated[int, Field(ge=0, le=MAX_FILE)]
    annotations: dict[str, str] = {}


class Manifest(BaseModel):
    """The artefact's manifest (image-spec 1.1, manifest.md)."""

    model_config = ConfigDict(strict=True, frozen=True)
    schemaVersion: Literal[2]
    mediaType: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifactType: Literal["application/vnd.sealwright.image.v1"]
    config: Descriptor
    layers: Annotated[list[Descriptor], Field(min_length=1, max_length=64)]


class _Index(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    schemaVersion: Literal[2]
    manifests: Annotated[list[Descriptor], Field(min_length=1, max_length=1)]


def export_image(folder: Path, layout: Path) -> str:
    """Write the image in `folder` as a new layout, and return the digest of its OCI manifest (`sha256:…`).

    Raises ImageRefused if a file is not what the manifest says, UnusableImage if the layout's folder is in use.
    """
    image = load_image(folder)
    if reasons := changed_files(folder, image):
        raise ImageRefused(
            "the image is not what its manifest says",
            where=str(folder),
            do="Get the image again from its builder.",
            reasons=tuple(reasons),
        )
    if layout.exists() and any(layout.iterdir()):
        raise UnusableImage("the layout's folder holds something already", where=str(layout), do="Name a new folder.")
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = []
    for name in sorted([*image.files, MANIFEST]):
        digest = file_digest(folder / name)
        shutil.copyfile(folder / name, blobs / digest)
        layers.append(_describe(FILE, digest, (folder / name).stat().st_size) | {"annotations": {TITLE: name}})
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTEFACT,
        "config": _put(blobs, "application/vnd.oci.empty.v1+json", EMPTY),
        "layers": layers,
    }
    return write_layout(layout, rfc8785.dumps(document), image.name)


def write_layout(layout: Path, manifest: bytes, name: str) -> str:
    """Put the manifest beside the blobs of a layout and name it in the index; return its digest."""
    described = _put(layout / "blobs" / "sha256", MANIFEST_TYPE, manifest)
    entry = described | {"artifactType": ARTEFACT, "annotations": {REFERENCE: name}}
    index: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}
    (layout / "index.json").write_bytes(rfc8785.dumps(index))
    (layout / "oci-layout").write_bytes(LAYOUT)
    return str(described["digest"])


def import_image(layout: Path, folder: Path, builder: Ed25519PublicKey) -> ImageManifest:
    """Take the image out of a layout into the new folder `folder`, if `builder` signed it; return its manifest.

    Raises UnusableImage for a layout that holds no such artefact, and ImageRefused for a blob that is not what its
    descriptor says or an image that does not verify; `folder` is then not made.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UnusableImage("the folder holds something already", where=str(folder), do="Name a new folder.")
    _, manifest = read_layout(layout)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        scratch = Path(name) / "image"
        scratch.mkdir()
        for layer in manifest.layers:
            title = layer.annotations.get(TITLE, "")
            if not re.fullmatch(FILE_NAME, title) or (scratch / title).exists():
                raise _unusable(layout, f"a file is named {title!r}, twice or not as an image's file is")
            _copy_blob(layout, layer, scratch / title)
        image = verify_image(scratch, builder)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    return image


def read_layout(layout: Path) -> tuple[Descriptor, Manifest]:
    """The one artefact of a layout. Raises UnusableImage for a layout that holds none of ours, or more."""
    try:
        version = json.loads(read_file(layout / "oci-layout", MAX_DOCUMENT))
        if not isinstance(version, dict) or version.get("imageLayoutVersion") != "1.0.0":
            raise ValueError("oci-layout does not say imageLayoutVersion 1.0.0")
        index = _Index.model_validate_json(read_file(layout / "index.json", MAX_DOCUMENT))
        found = index.manifests[0]
        raw = read_file(_blob(layout, found), MAX_DOCUMENT)
        _check(found, len(raw), hashlib.sha256(raw).hexdigest())
        return found, Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unusable(layout, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _unusable(layout, str(error)) from error


def _copy_blob(layout: Path, layer: Descriptor, target: Path) -> None:
    source = _blob(layout, layer)
    if source.is_symlink() or not source.is_file():
        raise _unusable(layout, f"the blob {layer.digest} is missing")
    _check(layer, source.stat().st_size, file_digest(source))
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _check(descriptor: Descriptor, size: int, digest: str) -> None:
    if (size, f"sha256:{digest}") != (descriptor.size, descriptor.digest):
        raise ImageRefused(
            "a blob is not what its descriptor says", where=descriptor.digest, do="Copy the artefact again."
        )


def _blob(layout: Path, descriptor: Descriptor) -> Path:
    return layout / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")


def _describe(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _put(blobs: Path, kind: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return _describe(kind, digest, len(data))


def _unusable(layout: Path, why: str) -> UnusableImage:
    return UnusableImage(f"this layout holds no image of ours: {why}", where=str(layout), do="Check the path.")
