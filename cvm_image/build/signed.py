"""The last step: measure what was built, make its ID blocks, and sign the manifest over all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from attestation.evidence.id_block import IdBlock, encode_id_block, key_digest, sign_id_block
from cvm_image.build.disk import Root
from cvm_image.build.lock import Lock, write_lock
from cvm_image.build.provenance import PROVENANCE, RecipeSource, sign_provenance
from cvm_image.build.recipe import Recipe
from cvm_image.build.store import digest_file
from cvm_image.generate import FILES, POLICY, LaunchGrid, measure_grid
from cvm_image.manifest import MANIFEST, ImageManifest, sign_manifest
from cvm_image.signing import SigningKeys


def sign_image(
    folder: Path, recipe: Recipe, source: RecipeSource, lock: Lock, root: Root, keys: SigningKeys
) -> ImageManifest:
    """Write `id-block`, `id-auth`, provenance and manifest into the image `folder`, whose other files are there."""
    launch = recipe.launch
    grid = LaunchGrid(launch.vcpu_models, launch.vcpus, launch.vmms, launch.guest_features)
    names = ("firmware.fd", "kernel", "initrd", "cmdline")
    measurements = measure_grid({name: (folder / name).read_bytes() for name in names}, grid)
    image_id = hashlib.sha256(recipe.name.encode()).digest()[:16]
    family_id = launch.family.encode().ljust(16, b"\0")
    blocks = [
        encode_id_block(IdBlock(bytes.fromhex(value.measurement), family_id, image_id, launch.svn, POLICY))
        for value in measurements
    ]
    (folder / "id-block").write_bytes(b"".join(blocks))
    (folder / "id-auth").write_bytes(b"".join(sign_id_block(block, keys.id_key, keys.author_key) for block in blocks))
    files = {name: digest_file(folder / name) for name in FILES}
    (folder / PROVENANCE).write_bytes(sign_provenance(files, recipe, source, lock, keys.builder))
    manifest = ImageManifest(
        name=recipe.name,
        platform=recipe.variant,
        entry=recipe.init,
        svn=launch.svn,
        family_id=family_id.hex(),
        image_id=image_id.hex(),
        policy=POLICY,
        root_hash=root.root_hash,
        lock_sha256=hashlib.sha256(write_lock(lock).encode()).hexdigest(),
        id_key_digest=key_digest(keys.id_key.public_key()).hex(),
        author_key_digest=None if keys.author_key is None else key_digest(keys.author_key.public_key()).hex(),
        measurements=measurements,
        files=files | {PROVENANCE: digest_file(folder / PROVENANCE)},
    )
    (folder / MANIFEST).write_bytes(sign_manifest(manifest, keys.builder))
    for name in (*FILES, PROVENANCE, MANIFEST):
        (folder / name).chmod(0o644)
    return manifest
