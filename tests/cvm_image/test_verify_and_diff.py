"""`seal image verify` and `diff`: each change of an image is found and named, a builder's mistake included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from virtual_guests import KEYS, flip, make_image

from attestation.evidence.id_block import IdBlock, encode_id_block, sign_id_block
from cvm_image.difference import diff_images
from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.generate import FILES
from cvm_image.manifest import MANIFEST, ImageManifest, sign_manifest
from cvm_image.rootfs import make_verity
from cvm_image.verify import file_digest, load_image, verify_image

BUILDER = KEYS.builder.public_key()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "image"
    make_image(folder)
    return folder


@pytest.fixture
def copy(image: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image, tmp_path / "image"))


def resign(folder: Path, **change: object) -> None:
    """Sign the folder as it is now, as a builder who made a mistake would: digests are right, `change` is not."""
    manifest = load_image(folder).model_dump() | change
    manifest["files"] = {name: file_digest(folder / name) for name in FILES}
    (folder / MANIFEST).write_bytes(sign_manifest(ImageManifest.model_validate(manifest), KEYS.builder))


def test_a_genuine_image_is_verified(image: Path) -> None:
    assert verify_image(image, BUILDER).name == "probe"


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_of_any_file_is_named(copy: Path, name: str) -> None:
    flip(copy / name, (copy / name).stat().st_size // 3)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert refused.value.reasons == (f"{name}: the file was changed",)


def test_every_reason_is_listed(copy: Path) -> None:
    (copy / "initrd").unlink()
    flip(copy / "kernel", 0)
    (copy / "extra").write_text("x")
    (copy / "cmdline").unlink()
    (copy / "cmdline").symlink_to("/proc/cmdline")
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert set(refused.value.reasons) == {
        "initrd: the file is missing",
        "kernel: the file was changed",
        "cmdline: the file is missing",
        "extra: the file is not in the manifest",
    }


def test_another_builder_is_refused(image: Path) -> None:
    with pytest.raises(ImageRefused, match="not signed by this builder"):
        verify_image(image, Ed25519PrivateKey.generate().public_key())


def test_a_folder_without_a_manifest_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(UnusableImage, match="holds no image manifest"):
        verify_image(tmp_path, BUILDER)


def test_a_kernel_that_was_swapped_before_signing_shows_in_the_measurement(copy: Path) -> None:
    (copy / "kernel").write_bytes((copy / "kernel").read_bytes() + b"\n")
    resign(copy)
    with pytest.raises(ImageRefused, match="not what its manifest says") as refused:
        verify_image(copy, BUILDER)
    assert refused.value.reasons[0].startswith("the measurement for EPYC-v4, 2 vCPUs, qemu, features 0x1 is ")


def test_a_root_that_was_swapped_before_signing_shows_in_the_root_hash(copy: Path) -> None:
    (copy / "rootfs.erofs").write_bytes(bytes(8192))
    resign(copy)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert "rootfs.verity: not the tree over rootfs.erofs" in refused.value.reasons
    root = make_verity(copy / "rootfs.erofs", copy / "rootfs.verity")
    resign(copy)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert refused.value.reasons == (f"the root hash is {root.root_hash}",)
    resign(copy, root_hash=root.root_hash)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert refused.value.reasons == ("cmdline: it does not name the root hash",)


def test_an_id_block_that_says_something_else_is_found(copy: Path) -> None:
    manifest = load_image(copy)
    block = encode_id_block(
        IdBlock(bytes.fromhex(manifest.measurements[0].measurement), bytes(16), bytes(16), 9, 0x30000)
    )
    (copy / "id-block").write_bytes(block)
    (copy / "id-auth").write_bytes(sign_id_block(block, KEYS.id_key, None))
    resign(copy)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert len(refused.value.reasons) == 2
    (copy / "id-auth").write_bytes(bytes(4096))
    resign(copy)
    with pytest.raises(ImageRefused, match="manifest") as refused:
        verify_image(copy, BUILDER)
    assert "unknown algorithm" in refused.value.reasons[0]
    (copy / "id-block").write_bytes(block * 2)
    resign(copy)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert "not one for each" in refused.value.reasons[0]


def test_a_verity_file_that_is_none_is_refused(copy: Path) -> None:
    (copy / "rootfs.verity").write_bytes(b"")
    resign(copy)
    with pytest.raises(ImageRefused) as refused:
        verify_image(copy, BUILDER)
    assert "no dm-verity pair" in refused.value.reasons[0]


def test_the_same_image_has_no_differences(image: Path, copy: Path) -> None:
    assert diff_images(image, copy) == ()


def test_a_changed_source_is_named_down_to_the_measurement(image: Path, tmp_path: Path) -> None:
    make_image(tmp_path / "image", "def main(guest):\n    return 0\n")
    changes = {(change.kind, change.name) for change in diff_images(image, tmp_path / "image")}
    assert changes == {
        ("measured file", "initrd"),
        ("file", "id-auth"),
        ("file", "id-block"),
        ("file", "sbom.cdx.json"),
        ("archive", "lib/probe/entry.py"),
        ("component", "file probe/entry.py"),
        ("measurement", "EPYC-v4 2 qemu 0x1"),
    }


def test_a_hardware_image_differs_in_its_attester(image: Path, tmp_path: Path) -> None:
    make_image(tmp_path / "image", platform="hardware")
    changes = {(change.kind, change.name): change for change in diff_images(image, tmp_path / "image")}
    assert changes[("setting", "platform")].after == "hardware"
    assert changes[("archive", "lib/attestation/attester/virtual_port.py")].after is None


def test_a_file_that_was_changed_after_signing_is_a_difference(image: Path, copy: Path) -> None:
    flip(copy / "firmware.fd", 100)
    (copy / "sbom.cdx.json").write_text("{")
    kinds = {(change.kind, change.name) for change in diff_images(image, copy)}
    assert ("measured file", "firmware.fd") in kinds
    assert ("file", "sbom.cdx.json") in kinds
