"""A generated image: the same bits each time, a manifest that binds every file, and an archive with nothing foreign."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from sevsnpmeasure import id_block as reference
from virtual_guests import KEYS, make_image

from attestation.errors import MalformedEvidence
from attestation.evidence.cpio import read_archive
from attestation.evidence.id_block import (
    IdBlock,
    encode_id_block,
    encode_public_key,
    key_digest,
    parse_id_block,
    sign_id_block,
    verify_id_block,
)
from cvm_image.build.bill import bill_of_materials
from cvm_image.build.lock import load_lock
from cvm_image.build.workload import File
from cvm_image.errors import ImageRefused, ToolFailed, UnusableImage
from cvm_image.generate import FILES, LaunchGrid, generate_image
from cvm_image.manifest import MANIFEST, read_manifest, sign_manifest, verify_manifest
from cvm_image.packages import SourceTree, collect, guest_packages
from cvm_image.sbom import make_sbom, read_lock, runtime_closure
from cvm_image.signing import create_signing_keys, load_signing_keys
from cvm_image.tools import run_tool

RECIPES = Path(__file__).resolve().parents[2] / "cvm_image/recipes"
LOCK = b"# pinned\nnumpy==1.26.4\npydantic==2.14.3\n"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "image"
    make_image(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_are_the_same_bits(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    before = os.umask(0o077)
    try:
        make_image(tmp_path / "somewhere/else/image")
    finally:
        os.umask(before)
    assert contents(tmp_path / "somewhere/else/image") == contents(image)
    assert {path.name for path in image.iterdir()} == {*FILES, MANIFEST}


def test_the_manifest_binds_every_file_and_is_signed(image: Path) -> None:
    raw = (image / MANIFEST).read_bytes()
    manifest = verify_manifest(raw, KEYS.builder.public_key())
    assert set(manifest.files) == set(FILES)
    for name, digest in manifest.files.items():
        assert hashlib.sha256((image / name).read_bytes()).hexdigest() == digest
    statement = json.loads(base64.b64decode(json.loads(raw)["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [subject["name"] for subject in statement["subject"]] == sorted(FILES)
    assert manifest.root_hash in (image / "cmdline").read_text()
    with pytest.raises(ImageRefused, match="not signed by this builder"):
        verify_manifest(raw, Ed25519PrivateKey.generate().public_key())


def test_any_changed_byte_of_a_manifest_is_refused(image: Path) -> None:
    raw = (image / MANIFEST).read_bytes()
    for position in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[position] ^= 1
        with pytest.raises((UnusableImage, ImageRefused)):
            verify_manifest(bytes(changed), KEYS.builder.public_key())


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"\xff", b'{"payload":"","payloadType":"x","signatures":[]}', b'{"payload": ""}']
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(UnusableImage, match="no image manifest"):
        read_manifest(raw)


def test_a_manifest_in_another_form_is_refused(image: Path) -> None:
    raw = (image / MANIFEST).read_bytes()
    document = json.loads(raw)
    for changed in (
        json.dumps(document).encode(),
        raw + b"\n",
        json.dumps(document | {"more": 1}, separators=(",", ":")).encode(),
    ):
        with pytest.raises(UnusableImage):
            verify_manifest(changed, KEYS.builder.public_key())


def test_a_signature_of_somebody_else_neither_helps_nor_hurts(image: Path) -> None:
    raw = (image / MANIFEST).read_bytes()
    twice = raw.replace(b'"signatures":[', b'"signatures":[{"keyid":"00","sig":"AA=="},')
    assert verify_manifest(twice, KEYS.builder.public_key()) == verify_manifest(raw, KEYS.builder.public_key())
    with pytest.raises(ImageRefused):
        verify_manifest(twice, Ed25519PrivateKey.generate().public_key())


def test_a_manifest_that_was_not_made_by_the_model_is_refused(image: Path) -> None:
    manifest = read_manifest((image / MANIFEST).read_bytes())
    for change in (
        {"measurements": []},
        {"name": "../x"},
        {"platform": "sample"},
        {"svn": -1},
        {"files": manifest.files | {"../x": "0" * 64}},
        {"root_hash": "00"},
    ):
        wrong = manifest.model_copy(update=change)
        with pytest.raises(UnusableImage):
            read_manifest(sign_manifest(wrong, KEYS.builder))


def test_the_archive_holds_our_sources_and_nothing_of_the_hosts_side(image: Path) -> None:
    names = {entry.name for entry in read_archive((image / "initrd").read_bytes())}
    assert {"init", "etc/sealwright/attester", "lib/probe/entry.py", "lib/attestation/attester/world.py"} <= names
    assert not [name for name in names if "/virtual/" in name or "/broker/" in name or "__pycache__" in name]


def test_guest_packages_are_those_that_a_guest_needs() -> None:
    virtual, hardware = collect(guest_packages("virtual")), collect(guest_packages("hardware"))
    assert "attestation/attester/virtual_port.py" in virtual
    assert set(virtual) - set(hardware) == {"attestation/attester/virtual_port.py"}
    assert {name.split("/")[0] for name in virtual} == {"policies", "attestation", "fl", "appliance"}
    ours = {"__init__", "data_volume", "luks_header", "node", "sealed_volume", "user_data", "user_data_export", "vault"}
    assert {name for name in virtual if name.startswith("appliance/")} == {f"appliance/{name}.py" for name in ours}


def test_every_combination_of_the_grid_is_measured_and_has_its_id_block(tmp_path: Path) -> None:
    package = tmp_path / "probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    grid = LaunchGrid(("EPYC-v4", "EPYC-Genoa"), (1, 2), ("qemu", "gce"), (0x1, 0x21))
    manifest = generate_image(
        tmp_path / "image", name="grid", keys=KEYS, packages=[package], entry="probe", svn=7, grid=grid
    )
    assert len(manifest.measurements) == 16
    assert len({value.measurement for value in manifest.measurements}) >= 12
    blocks, auths = ((tmp_path / "image" / name).read_bytes() for name in ("id-block", "id-auth"))
    assert (len(blocks), len(auths)) == (16 * 96, 16 * 4096)
    for index, value in enumerate(manifest.measurements):
        raw = blocks[96 * index :][:96]
        block = parse_id_block(raw)
        assert block.measurement.hex() == value.measurement
        assert (block.guest_svn, block.image_id.hex(), block.policy) == (7, manifest.image_id, 0x30000)
        who = verify_id_block(raw, auths[4096 * index :][:4096])
        assert who.id_key_digest.hex() == manifest.id_key_digest


def test_id_blocks_are_laid_out_as_the_reference_does(tmp_path: Path) -> None:
    keys = create_signing_keys(tmp_path / "keys")
    assert keys.author_key is not None
    made = reference.snp_calc_id_block(b"m" * 48, tmp_path / "keys/id.key.pem", tmp_path / "keys/author.key.pem")
    fields = dict(field.split("=", 1) for field in made.splitlines()[0].split(","))
    block, auth = (base64.b64decode(fields[name]) for name in ("id-block", "id-auth"))
    assert encode_id_block(IdBlock(b"m" * 48, bytes(16), bytes(16), 0, 0x30000)) == block
    ours = sign_id_block(block, keys.id_key, keys.author_key)
    zeroed = [bytearray(ours), bytearray(auth)]
    for one in zeroed:
        for start in (0x40, 0x680):  # signatures differ: the reference draws its nonces at random
            one[start : start + 144] = bytes(144)
    assert zeroed[0] == zeroed[1]
    assert verify_id_block(block, auth) == verify_id_block(block, ours)
    assert encode_public_key(keys.id_key.public_key()) == reference.marshal_ec_public_key(keys.id_key)
    assert key_digest(keys.id_key.public_key()) == reference.pub_to_digest(keys.id_key)


def test_every_bit_of_an_id_block_and_its_authentication_counts() -> None:
    block = encode_id_block(IdBlock(b"m" * 48, b"f" * 16, b"i" * 16, 3, 0x30000))
    auth = sign_id_block(block, KEYS.id_key, KEYS.author_key)
    verify_id_block(block, auth)
    for position in range(96):
        with pytest.raises(MalformedEvidence):
            verify_id_block(block[:position] + bytes((block[position] ^ 1,)) + block[position + 1 :], auth)
    for position in range(0, 4096, 31):
        with pytest.raises(MalformedEvidence):
            verify_id_block(block, auth[:position] + bytes((auth[position] ^ 1,)) + auth[position + 1 :])
    for wrong in (auth[:-1], auth + b"\0"):
        with pytest.raises(MalformedEvidence):
            verify_id_block(block, wrong)


def test_an_id_block_without_an_author_key_has_no_author() -> None:
    block = encode_id_block(IdBlock(bytes(48), bytes(16), bytes(16), 0, 0x30000))
    assert verify_id_block(block, sign_id_block(block, KEYS.id_key, None)).author_key_digest is None


def test_the_bill_of_materials_names_the_locked_dependencies_and_the_sources(image: Path) -> None:
    document = json.loads((image / "sbom.cdx.json").read_bytes())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    components = {component["name"]: component for component in document["components"]}
    assert components["cryptography"]["purl"].startswith("pkg:pypi/cryptography@")
    assert components["probe/entry.py"]["hashes"][0]["alg"] == "SHA-256"
    assert "pytest" not in components
    assert set(document["metadata"]) == {"component"}  # no timestamp, no tools


def test_bills_of_materials_are_what_cyclonedx_s_schema_asks_for(image: Path) -> None:
    """Of a generated image, and of each recipe that is locked here."""
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    bills = {"generated": (image / "sbom.cdx.json").read_text()}
    for recipe in sorted(RECIPES.glob("*.toml")):
        lock = load_lock(recipe, recipe.stem, "trixie")
        files = {"usr/lib/one": File(b"1"), "usr/bin/two": File(b"2", executable=True)}
        bills[recipe.stem] = bill_of_materials(lock, files, version="1").decode()
    assert {"generated", "fl", "fl-gpu", "minimal"} <= set(bills)
    for name, bill in bills.items():
        wrong = validator.validate_str(bill)
        assert wrong is None, f"{name}: {str(wrong)[:300]}"
    assert validator.validate_str(bills["generated"].replace('"components"', '"compnents"')) is not None


def test_the_lock_is_read_strictly() -> None:
    assert read_lock(LOCK) == {"numpy": "1.26.4", "pydantic": "2.14.3"}
    assert read_lock(b"Foo_Bar.baz==1 ; python_version > '3'  # why\n") == {"foo-bar-baz": "1"}
    for line in (b"numpy>=1\n", b"numpy\n", b"-r other.txt\n", b"numpy @ https://example.org/x\n"):
        with pytest.raises(UnusableImage, match="line 1 is no pin"):
            read_lock(line)
    closure = runtime_closure({"pydantic": "2", "pydantic-core": "2", "pytest": "8"}, ("pydantic",))
    assert set(closure) == {"pydantic", "pydantic-core"}
    assert make_sbom("a", "1", closure, {}) == make_sbom("a", "1", dict(reversed(closure.items())), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entry": "probe.none"}, "entry"),
        ({"packages": [Path("/nonexistent/probe")]}, "no Python package"),
        ({"lock": Path("/nonexistent/lock")}, "cannot be read"),
    ],
)
def test_unfit_arguments_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    package = tmp_path / "probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    arguments = {"name": "demo", "keys": KEYS, "packages": [package], "entry": "probe"} | change
    with pytest.raises(UnusableImage, match=words):
        generate_image(tmp_path / "image", **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert not list((tmp_path / "image").glob("*"))


def test_a_link_among_the_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/__init__.py").write_text("")
    (tmp_path / "probe/link.py").symlink_to("/etc/hostname")
    with pytest.raises(UnusableImage, match="regular files"):
        collect([tmp_path / "probe"])
    (tmp_path / "probe/link.py").unlink()
    with pytest.raises(UnusableImage, match="two folders"):
        collect([tmp_path / "probe", SourceTree(tmp_path / "probe")])


def test_keys_are_kept_closed_and_read_back(tmp_path: Path) -> None:
    made = create_signing_keys(tmp_path / "keys")
    read = load_signing_keys(tmp_path / "keys")
    assert made.id_key.private_numbers() == read.id_key.private_numbers()
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").glob("*.key.pem")} == dict.fromkeys(
        ("builder.key.pem", "id.key.pem", "author.key.pem"), 0o600
    )
    (tmp_path / "keys/id.key.pem").write_bytes((tmp_path / "keys/builder.key.pem").read_bytes())
    with pytest.raises(UnusableImage, match="P-384"):
        load_signing_keys(tmp_path / "keys")


def test_a_failing_tool_is_shown_with_its_command() -> None:
    with pytest.raises(ToolFailed, match="ended with status") as failed:
        run_tool(["mkfs.erofs", "--quiet", "/nonexistent/a", "/nonexistent/b"], seconds=10)
    assert failed.value.where == "mkfs.erofs --quiet /nonexistent/a /nonexistent/b"
    with pytest.raises(ToolFailed, match="not installed"):
        run_tool(["no-such-tool"], seconds=1)
    with pytest.raises(ToolFailed, match="longer than"):
        run_tool(["sleep", "5"], seconds=0.05)


def test_a_reproduction_in_a_fresh_process_has_the_same_measurement(image: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from virtual_guests import make_image\n"
        "print(make_image(Path(sys.argv[1])).measurements[0].measurement)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "image")],
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONHASHSEED": "7", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout.strip() == read_manifest((image / MANIFEST).read_bytes()).measurements[0].measurement
