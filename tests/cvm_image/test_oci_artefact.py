"""An image travels as an OCI artefact: by the specification on the way out, believed only by proof on the way in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cvm_image.errors import ImageRefused, UnusableImage
from cvm_image.generate import generate_image
from cvm_image.oci import export_image, import_image
from cvm_image.signing import SigningKeys

KEYS = SigningKeys(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))
BUILDER = KEYS.builder.public_key()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("source") / "probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text("def main(guest):\n    return 0\n")
    folder = tmp_path_factory.mktemp("made") / "image"
    generate_image(folder, name="probe", keys=KEYS, packages=[package], entry="probe.entry")
    return folder


@pytest.fixture
def layout(image: Path, tmp_path: Path) -> Path:
    export_image(image, tmp_path / "layout")
    return tmp_path / "layout"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(layout: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Index and manifest of a layout, read by the specification's words alone."""
    index = json.loads((layout / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    return index, json.loads((layout / "blobs/sha256" / digest).read_bytes())


def rewrite(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and name the changed one in the index, as whoever holds the layout can."""
    index, manifest = read(layout)
    change(manifest)
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(raw)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(raw)}
    (layout / "index.json").write_text(json.dumps(index))


def test_the_layout_is_an_artefact_by_the_specification(image: Path, layout: Path) -> None:
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index, manifest = read(layout)
    assert index["schemaVersion"] == 2
    assert manifest["mediaType"] == index["manifests"][0]["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.sealwright.image.v1"
    assert manifest["config"] == {  # image-spec 1.1, "Guidance for an Empty Descriptor"
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    named = {index["manifests"][0]["digest"]}
    files = {}
    for descriptor in [manifest["config"], *manifest["layers"]]:
        raw = (layout / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
        assert (f"sha256:{hashlib.sha256(raw).hexdigest()}", len(raw)) == (descriptor["digest"], descriptor["size"])
        named.add(descriptor["digest"])
        if "annotations" in descriptor:
            files[descriptor["annotations"]["org.opencontainers.image.title"]] = raw
    assert files == contents(image)
    assert {f"sha256:{path.name}" for path in (layout / "blobs/sha256").iterdir()} == named


def test_an_image_comes_back_as_it_went_and_the_layout_is_always_the_same(
    image: Path, layout: Path, tmp_path: Path
) -> None:
    assert import_image(layout, tmp_path / "back", BUILDER).name == "probe"
    assert contents(tmp_path / "back") == contents(image)
    export_image(tmp_path / "back", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(layout)


def test_a_changed_blob_is_refused_and_nothing_is_left(layout: Path, tmp_path: Path) -> None:
    _, manifest = read(layout)
    for descriptor in manifest["layers"]:
        blob = layout / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")
        genuine = blob.read_bytes()
        blob.write_bytes(bytes([genuine[0] ^ 1]) + genuine[1:])
        with pytest.raises(ImageRefused, match="not what its descriptor says"):
            import_image(layout, tmp_path / "back", BUILDER)
        blob.write_bytes(genuine)
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]


def test_a_changed_blob_with_its_descriptor_is_refused_by_the_builders_signature(layout: Path, tmp_path: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        raw = b"another kernel"
        digest = hashlib.sha256(raw).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(raw)
        kernel = next(one for one in manifest["layers"] if "kernel" in one["annotations"].values())
        kernel |= {"digest": f"sha256:{digest}", "size": len(raw)}

    rewrite(layout, swap)
    with pytest.raises(ImageRefused) as refused:
        import_image(layout, tmp_path / "back", BUILDER)
    assert "kernel: the file was changed" in refused.value.reasons
    with pytest.raises(ImageRefused, match="not signed by this builder"):
        import_image(layout, tmp_path / "back", Ed25519PrivateKey.generate().public_key())
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("title", ["../kernel", "/etc/passwd", "a/b", "", "..", "initrd", "Kernel", "kernel\n"])
def test_a_title_that_is_no_file_of_an_image_or_there_twice_is_refused(
    layout: Path, tmp_path: Path, title: str
) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        kernel = next(one for one in manifest["layers"] if "kernel" in one["annotations"].values())
        kernel["annotations"] = {"org.opencontainers.image.title": title}

    rewrite(layout, rename)
    with pytest.raises(UnusableImage, match="a file is named"):
        import_image(layout, tmp_path / "back", BUILDER)
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("oci-layout", b"{}"),
        ("oci-layout", b"[" * 100_000),
        ("index.json", b""),
        ("index.json", b'{"schemaVersion":2,"manifests":[]}'),
        ("index.json", b'{"schemaVersion":2,"manifests":[{"mediaType":"x","digest":"sha256:../../x","size":1}]}'),
        ("index.json", b" " * (2 << 20)),
    ],
)
def test_what_is_no_layout_is_refused(layout: Path, tmp_path: Path, name: str, raw: bytes) -> None:
    (layout / name).write_bytes(raw)
    with pytest.raises(UnusableImage):
        import_image(layout, tmp_path / "back", BUILDER)


def test_another_kind_of_artefact_or_a_missing_blob_is_refused(layout: Path, tmp_path: Path) -> None:
    other = shutil.copytree(layout, tmp_path / "other")
    rewrite(other, lambda manifest: manifest.update(artifactType="application/vnd.example"))
    with pytest.raises(UnusableImage, match="artifactType"):
        import_image(other, tmp_path / "back", BUILDER)
    _, manifest = read(layout)
    (layout / "blobs/sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")).unlink()
    with pytest.raises(UnusableImage, match="is missing"):
        import_image(layout, tmp_path / "back", BUILDER)


def test_a_folder_in_use_is_left_alone(image: Path, layout: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableImage, match="already"):
        export_image(image, layout)
    with pytest.raises(UnusableImage, match="already"):
        import_image(layout, layout, BUILDER)
    changed = shutil.copytree(image, tmp_path / "changed")
    (changed / "cmdline").write_text("changed")
    with pytest.raises(ImageRefused):
        export_image(changed, tmp_path / "none")
