"""Verifying an image folder: signed by its builder, every file as signed, and every derived value derived again."""

from __future__ import annotations

import hashlib
import struct
import uuid
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE, parse_id_block, verify_id_block
from attestation.evidence.launch import measure_launch
from cvm_image.build.provenance import PROVENANCE, read_provenance_file, verify_provenance
from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.guest.init import verity_tree
from cvm_image.manifest import MANIFEST, MAX_MANIFEST, ImageManifest, read_manifest, verify_manifest
from policies.errors import SealwrightError

_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s")


def verify_image(folder: Path, builder: Ed25519PublicKey) -> ImageManifest:
    """Return the manifest of the image in `folder` if `builder` signed it and all of the folder is what it says.

    Beside the digest of each file, the launch measurements, the ID blocks with their signatures and the dm-verity root
    hash are derived again, so that a builder's mistake shows as well as a change. Raises ImageRefused with every
    reason, and UnusableImage if there is no manifest.
    """
    manifest = verify_manifest(read_manifest_file(folder), builder)
    reasons = changed_files(folder, manifest)
    if not reasons:
        reasons = [*_measurement_reasons(folder, manifest), *_root_reasons(folder, manifest)]
        reasons += _provenance_reasons(folder, manifest, builder)
    if reasons:
        raise ImageRefused(
            "the image is not what its manifest says",
            where=str(folder),
            do="Get the image again from its builder.",
            reasons=tuple(reasons),
        )
    return manifest


def load_image(folder: Path) -> ImageManifest:
    """Return what the manifest in `folder` says, unverified."""
    return read_manifest(read_manifest_file(folder))


def read_manifest_file(folder: Path) -> bytes:
    """Return the bytes of the manifest in `folder`. Raises UnusableImage if there is none."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise UnusableImage("this folder holds no image manifest", where=str(path), do="Check the path.") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path, manifest: ImageManifest) -> list[str]:
    """Return which files of the folder are missing, changed, or not in the manifest (whose signer is not asked)."""
    reasons: list[str] = []
    for name, digest in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            reasons.append(f"{name}: the file is missing")
        elif file_digest(path) != digest:
            reasons.append(f"{name}: the file was changed")
    strangers = sorted({path.name for path in folder.iterdir()} - set(manifest.files) - {MANIFEST})
    reasons += [f"{name}: the file is not in the manifest" for name in strangers]
    return reasons


def _measurement_reasons(folder: Path, manifest: ImageManifest) -> list[str]:
    """Compare every measurement and ID block with what the files give."""
    reasons: list[str] = []
    firmware, kernel, initrd, cmdline, blocks, auths = (
        (folder / name).read_bytes() for name in ("firmware.fd", "kernel", "initrd", "cmdline", "id-block", "id-auth")
    )
    count = len(manifest.measurements)
    if (len(blocks), len(auths)) != (count * ID_BLOCK_SIZE, count * ID_AUTH_SIZE):
        return [f"id-block, id-auth: not one for each of the {count} measurements"]
    for index, value in enumerate(manifest.measurements):
        settings = f"{value.vcpu_model}, {value.vcpus} vCPUs, {value.vmm}, features {value.guest_features:#x}"
        try:
            measured = measure_launch(
                firmware=firmware,
                kernel=kernel,
                initrd=initrd,
                cmdline=cmdline,
                vcpu_model=value.vcpu_model,
                vcpus=value.vcpus,
                vmm=value.vmm,
                guest_features=value.guest_features,
            ).hex()
            if measured != value.measurement:
                reasons.append(f"the measurement for {settings} is {measured}")
            raw = blocks[index * ID_BLOCK_SIZE :][:ID_BLOCK_SIZE]
            block, who = parse_id_block(raw), verify_id_block(raw, auths[index * ID_AUTH_SIZE :][:ID_AUTH_SIZE])
        except SealwrightError as error:
            reasons.append(f"{settings}: {error.what}")
            continue
        said = (block.measurement.hex(), block.family_id.hex(), block.image_id.hex(), block.guest_svn, block.policy)
        if said != (value.measurement, manifest.family_id, manifest.image_id, manifest.svn, manifest.policy):
            reasons.append(f"the ID block for {settings} says something else than the manifest")
        author = who.author_key_digest.hex() if who.author_key_digest else None
        if (who.id_key_digest.hex(), author) != (manifest.id_key_digest, manifest.author_key_digest):
            reasons.append(f"the ID block for {settings} is signed by other keys than the manifest names")
    return reasons


def _provenance_reasons(folder: Path, manifest: ImageManifest, builder: Ed25519PublicKey) -> list[str]:
    """Compare what the provenance of a built image speaks of with the manifest; a generated image has none."""
    if PROVENANCE not in manifest.files:
        return []
    others = {name: digest for name, digest in manifest.files.items() if name != PROVENANCE}
    try:
        verify_provenance(read_provenance_file(folder), others, builder)
    except SealwrightError as error:
        return [f"{PROVENANCE}: {error.what}"]
    return []


def _root_reasons(folder: Path, manifest: ImageManifest) -> list[str]:
    """Compare the verity tree with the root file system, and the command line with both."""
    tree = (folder / "rootfs.verity").read_bytes()
    reasons: list[str] = []
    try:
        _, _, _, identity, _, _, _, _, salt_size, salt = _SUPERBLOCK.unpack_from(tree)
        with (folder / "rootfs.erofs").open("rb") as file:
            expected, root_hash = verity_tree(file, salt[:salt_size], uuid.UUID(bytes=identity))
    except (struct.error, ValueError) as error:
        return [f"rootfs.erofs, rootfs.verity: no dm-verity pair ({error})"]
    if tree != expected:
        reasons.append("rootfs.verity: not the tree over rootfs.erofs")
    if root_hash != manifest.root_hash:
        reasons.append(f"the root hash is {root_hash}")
    if manifest.root_hash not in (folder / "cmdline").read_text("ascii"):
        reasons.append("cmdline: it does not name the root hash")
    return reasons
