"""A built image is measured for every launch of its recipe, and each measurement has its ID block, signed."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE, key_digest, parse_id_block, verify_id_block
from attestation.evidence.launch import measure_launch
from cvm_image.build.disk import Root
from cvm_image.build.lock import Lock
from cvm_image.build.provenance import PROVENANCE, RecipeSource, verify_provenance
from cvm_image.build.recipe import Recipe
from cvm_image.build.signed import sign_image
from cvm_image.firmware import generate_firmware
from cvm_image.manifest import MANIFEST, verify_manifest
from cvm_image.signing import SigningKeys
from cvm_image.verify import changed_files

MEASURED = {"firmware": generate_firmware(), "kernel": b"kernel", "initrd": b"initrd", "cmdline": b"ro"}
LAUNCH = {
    "vcpu_models": ["EPYC-v4", "EPYC-Milan", "EPYC-Genoa"],
    "vcpus": [1, 4],
    "vmms": ["qemu", "ec2"],
    "guest_features": [0x1, 0x21],
    "svn": 7,
    "family": "tumour-atlas",
}


def test_every_launch_of_the_recipe_has_its_measurement_and_its_id_block(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"name": "tiny", "init": "/init", "launch": LAUNCH})
    for name, data in MEASURED.items():
        (tmp_path / ("firmware.fd" if name == "firmware" else name)).write_bytes(data)
    for name in ("rootfs.erofs", "rootfs.verity", "sbom.cdx.json"):
        (tmp_path / name).write_bytes(name.encode())
    keys = SigningKeys(
        Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    )
    lock = Lock(recipe="tiny", suite="trixie", epoch=1, tools=[], firmware=[], kernel=[], base=[], wheels=[])
    root = Root(blocks=1, root_hash="ab" * 32, offset=8, length=8)
    sign_image(tmp_path, recipe, RecipeSource(b"recipe", {}, {}), lock, root, keys)

    manifest = verify_manifest((tmp_path / MANIFEST).read_bytes(), keys.builder.public_key())
    assert changed_files(tmp_path, manifest) == []
    grid = set(itertools.product(*(LAUNCH[name] for name in ("vcpu_models", "vcpus", "vmms", "guest_features"))))  # type: ignore[call-overload]  # lists, all four
    assert {(one.vcpu_model, one.vcpus, one.vmm, one.guest_features) for one in manifest.measurements} == grid
    assert len(manifest.measurements) == 24
    blocks, auths = ((tmp_path / name).read_bytes() for name in ("id-block", "id-auth"))
    assert (len(blocks), len(auths)) == (24 * ID_BLOCK_SIZE, 24 * ID_AUTH_SIZE)
    for at, value in enumerate(manifest.measurements):
        raw = blocks[at * ID_BLOCK_SIZE :][:ID_BLOCK_SIZE]
        block, who = parse_id_block(raw), verify_id_block(raw, auths[at * ID_AUTH_SIZE :][:ID_AUTH_SIZE])
        measured = measure_launch(
            **MEASURED,
            vcpu_model=value.vcpu_model,
            vcpus=value.vcpus,
            vmm=value.vmm,
            guest_features=value.guest_features,
        )
        assert block.measurement == measured == bytes.fromhex(value.measurement)
        assert (block.guest_svn, block.family_id) == (7, b"tumour-atlas".ljust(16, b"\0"))
        assert block.image_id == hashlib.sha256(b"tiny").digest()[:16]
        assert who.id_key_digest == key_digest(keys.id_key.public_key())
    others = {name: digest for name, digest in manifest.files.items() if name != PROVENANCE}
    assert verify_provenance((tmp_path / PROVENANCE).read_bytes(), others, keys.builder.public_key())
