"""A minimal image is built twice, bit for bit the same; it boots, and boots no more once one measured byte is changed.

These need root, mmdebstrap and bubblewrap, and packages from the mirror that the host's apt has (or from the cache).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from building import build_or_skip, copy_recipe, say

from attestation.evidence.launch import measure_launch
from cvm_image.build.contents import diff_contents
from cvm_image.build.disk import SECTOR, read_argument
from cvm_image.build.entry import dsdt, read_kernel
from cvm_image.build.errors import BootFailed, MissingInput, NotReproduced, UnusableLock
from cvm_image.build.image import build_image
from cvm_image.build.inspection import inspect_image
from cvm_image.build.launching import boot_command, booted, find_tools
from cvm_image.build.lock import load_lock, lock_path
from cvm_image.build.locking import archive_inputs
from cvm_image.build.provenance import PROVENANCE, verify_provenance
from cvm_image.build.reproduction import COMPARED, reproduce
from cvm_image.build.store import Store, default_cache
from cvm_image.build.tools import Tools
from cvm_image.difference import diff_images
from cvm_image.errors import ImageRefused
from cvm_image.manifest import MANIFEST, verify_manifest
from cvm_image.qemu import Guest, running
from cvm_image.signing import SigningKeys, create_signing_keys
from cvm_image.verify import file_digest, load_image, verify_image

pytestmark = pytest.mark.long

RECIPES = Path(__file__).resolve().parents[3] / "cvm_image" / "recipes"
MARKER = "sealwright: minimal guest on virtual reached its verified root"
KERNEL_SPEAKS = "EFI stub"
BOOT_SECONDS = 120.0
SILENT_SECONDS = 15.0
_MEASURED = {"firmware": "firmware.fd", "kernel": "kernel", "initrd": "initrd", "cmdline": "cmdline"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SigningKeys:
    return create_signing_keys(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_recipe(RECIPES, "minimal", tmp_path_factory.mktemp("recipe") / "copy")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, recipe: Path, keys: SigningKeys) -> Path:
    return build_or_skip(recipe, tmp_path_factory.mktemp("image") / "first", keys)


@pytest.fixture(scope="module")
def tools(image: Path) -> Tools:
    store = Store(default_cache())
    return find_tools(store, log=store.logs / "tests.log")


@pytest.fixture
def changed(image: Path, tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """A copy of the image in which one byte of one file is another."""

    def change(name: str, position: int) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(image, copy)
        with (copy / name).open("r+b") as file:
            file.seek(position if position >= 0 else file.seek(0, 2) + position)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        return copy

    yield change
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)


def assert_silent(guest: Guest) -> None:
    """The guest hangs in its firmware: the kernel never says a word, in several times the time that a boot takes."""
    with pytest.raises(BootFailed):
        guest.wait(within=SILENT_SECONDS, until=lambda console: KERNEL_SPEAKS in console, what="starting nothing")
    assert KERNEL_SPEAKS not in guest.console()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_are_the_same_bit_for_bit(image: Path, recipe: Path, keys: SigningKeys, tmp_path: Path) -> None:
    fresh = Store(tmp_path / "cache", inputs=Store(default_cache()).inputs)
    output = tmp_path / "elsewhere" / "second"
    build_image(recipe, output, store=fresh, keys=keys, say=say, offline=True)
    first, second = files_of(image), files_of(output)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_the_manifest_is_signed_and_names_what_was_built(image: Path, keys: SigningKeys) -> None:
    manifest = verify_manifest((image / MANIFEST).read_bytes(), keys.builder.public_key())
    root = read_argument((image / "cmdline").read_text())
    assert root is not None
    assert manifest.platform == "virtual"
    assert manifest.root_hash == root.root_hash
    measured = {name: (image / file).read_bytes() for name, file in _MEASURED.items()}
    assert manifest.measurements[0].measurement == measure_launch(**measured, vcpus=1).hex()


def test_the_image_boots_to_its_verified_root(image: Path, tools: Tools, tmp_path: Path) -> None:
    with booted(tools, image, tmp_path / "run") as guest:
        console = guest.wait(within=BOOT_SECONDS, what="booting")
    assert MARKER in console
    assert "Power down" in console


@pytest.mark.parametrize(("name", "position"), [("kernel", -4096), ("initrd", -100), ("cmdline", 14)])
def test_the_firmware_starts_nothing_that_the_hash_table_does_not_name(
    image: Path, tools: Tools, changed: Callable[[str, int], Path], tmp_path: Path, name: str, position: int
) -> None:
    with booted(tools, changed(name, position), tmp_path / "run", table_of=image) as guest:
        assert_silent(guest)


def test_without_a_hash_table_nothing_starts(image: Path, tools: Tools, tmp_path: Path) -> None:
    with booted(tools, image, tmp_path / "run", table=False) as guest:
        assert_silent(guest)


@pytest.mark.parametrize("name", ["rootfs.erofs", "rootfs.verity"])
def test_a_changed_byte_of_the_root_stops_the_guest_before_its_init(
    image: Path, tools: Tools, changed: Callable[[str, int], Path], tmp_path: Path, name: str
) -> None:
    root = read_argument((image / "cmdline").read_text())
    assert root is not None
    position = root.offset * SECTOR + 1100 if name == "rootfs.erofs" else 4096 + 100
    with booted(tools, changed(name, position), tmp_path / "run") as guest:
        console = guest.wait(within=BOOT_SECONDS, what="refusing its root")
    assert MARKER not in console
    assert "corrupted" in console
    assert "verity" in console


def test_an_auditor_rebuilds_the_image_and_sees_a_change_of_the_lock(image: Path, recipe: Path, tmp_path: Path) -> None:
    store = Store(default_cache())
    assert "rootfs.erofs" in reproduce(image, recipe, store=store, say=say, offline=True)
    other = copy_recipe(recipe.parent, "minimal", tmp_path / "other")
    (other.parent / "minimal/usr/lib/sealwright/init").write_text("#!/usr/bin/busybox sh\necho another\n")
    with pytest.raises(NotReproduced) as differs:
        reproduce(image, other, store=store, say=say, offline=True)
    assert {reason.partition(":")[0] for reason in differs.value.reasons} == {
        "cmdline",
        "rootfs.erofs",
        "rootfs.verity",
        "sbom.cdx.json",
    }
    lock = lock_path(other)
    lock.write_text(lock.read_text().replace('"epoch": 1', '"epoch": 2', 1))
    with pytest.raises(UnusableLock, match="another lock"):
        reproduce(image, other, store=store, say=say, offline=True)


def test_an_archive_alone_reproduces_the_image_when_recipe_cache_and_mirrors_are_gone(
    image: Path, recipe: Path, tmp_path: Path
) -> None:
    lock = load_lock(recipe, "minimal", "trixie")
    archive = tmp_path / "archive"
    kept = archive_inputs(recipe, lock, store=Store(default_cache()), archive=archive)
    assert kept == len(set(lock.digests())) + 3  # recipe, lock and the one file of the recipe
    assert {file_digest(path) for path in archive.iterdir()} == {path.name for path in archive.iterdir()}
    empty = Store(tmp_path / "cache", archive=archive)
    assert reproduce(image, None, store=empty, say=say, offline=True).keys() == set(COMPARED)
    (archive / lock.base[0].sha256).write_bytes(b"damaged")
    with pytest.raises(MissingInput, match="not in the cache"):
        reproduce(image, None, store=Store(tmp_path / "other", archive=archive), say=say, offline=True)
    (archive / load_image(image).lock_sha256).unlink()
    with pytest.raises(MissingInput, match="has not the lock"):
        reproduce(image, None, store=Store(tmp_path / "third", archive=archive), say=say, offline=True)
    with pytest.raises(MissingInput, match="neither the recipe nor an archive"):
        reproduce(image, None, store=Store(tmp_path / "third"), say=say, offline=True)


def test_a_difference_is_named_down_to_file_word_and_measured_input(
    image: Path, recipe: Path, keys: SigningKeys, tools: Tools, tmp_path: Path
) -> None:
    other = copy_recipe(recipe.parent, "minimal", tmp_path / "other")
    (other.parent / "minimal/usr/lib/sealwright/init").write_text("#!/usr/bin/busybox sh\necho another\n")
    (other.parent / "minimal/etc").mkdir()
    (other.parent / "minimal/etc/added").write_text("new\n")
    other.write_text(
        other.read_text().replace("[base]", '[kernel]\narguments = ["quiet"]\nmodules = ["virtio_net"]\n[base]')
    )
    output = tmp_path / "changed"
    build_image(other, output, store=Store(default_cache()), keys=keys, say=say, offline=True)
    inside = {(it.kind, it.name): (it.before, it.after) for it in diff_contents(image, output, tools)}
    assert inside["word", "quiet"] == (None, "quiet")
    assert ("word", "roothash") in inside
    assert inside["root file", "etc/added"][0] is None
    assert ("root file", "usr/lib/sealwright/init") in inside
    assert {name for kind, name in inside if kind == "root file"} == {"etc/added", "usr/lib/sealwright/init"}
    assert any(kind == "initrd file" and "virtio_net" in name for kind, name in inside)
    assert ("measured file", "kernel") not in {(it.kind, it.name) for it in diff_images(image, output)}
    assert {("measured file", "initrd"), ("measured file", "cmdline"), ("component", "file etc/added")} <= {
        (it.kind, it.name) for it in diff_images(image, output)
    }


def test_offline_a_missing_input_is_named_and_nothing_is_left(recipe: Path, keys: SigningKeys, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="packages are not in the cache"):
        build_image(recipe, tmp_path / "out", store=Store(tmp_path / "cache"), keys=keys, say=say, offline=True)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_provenance_names_every_input_and_is_checked_with_the_image(
    image: Path, recipe: Path, keys: SigningKeys, tmp_path: Path
) -> None:
    lock = load_lock(recipe, "minimal", "trixie")
    others = {name: digest for name, digest in load_image(image).files.items() if name != PROVENANCE}
    raw = (image / PROVENANCE).read_bytes()
    definition = verify_provenance(raw, others, keys.builder.public_key())["buildDefinition"]
    assert definition["externalParameters"] == {"recipe": "minimal", "variant": "virtual"}
    named = {one["digest"]["sha256"] for one in definition["resolvedDependencies"]}
    assert set(lock.digests()) < named
    assert {file_digest(recipe), file_digest(lock_path(recipe))} < named
    assert verify_image(image, keys.builder.public_key()).files[PROVENANCE] == file_digest(image / PROVENANCE)
    with pytest.raises(ImageRefused, match="other files"):
        verify_provenance(raw, others | {"kernel": "0" * 64}, keys.builder.public_key())
    stranger = create_signing_keys(tmp_path / "stranger").builder.public_key()
    with pytest.raises(ImageRefused, match="not signed"):
        verify_provenance(raw, others, stranger)


TELLING = """#!/usr/bin/busybox sh
echo "tables: $(cd /sys/firmware/acpi/tables && echo [A-Z]*)"
echo "dsdt: $(/usr/bin/busybox sha256sum < /sys/firmware/acpi/tables/DSDT)"
exec /usr/bin/busybox poweroff -f
"""


def test_the_hosts_aml_reaches_a_bare_kernel_and_never_ours(
    image: Path, recipe: Path, keys: SigningKeys, tools: Tools, tmp_path: Path
) -> None:
    other = copy_recipe(recipe.parent, "minimal", tmp_path / "other")
    (other.parent / "minimal/usr/lib/sealwright/init").write_text(TELLING)
    telling = tmp_path / "telling"
    build_image(other, telling, store=Store(default_cache()), keys=keys, say=say, offline=True)

    def tables(run: Path) -> str:
        run.mkdir()
        (run / "aml").write_bytes(b"\x08EVIL\x01")  # Name (EVIL, 1): any AML may do anything
        words = [*boot_command(tools, telling, run), "-acpitable", "sig=SSDT,data=/build/run/aml"]
        with running(words, serial=run / "serial.log", words=run / "qemu.log") as guest:
            return guest.wait(within=BOOT_SECONDS, what="telling its tables")

    console = tables(tmp_path / "run")
    assert "tables: APIC DSDT FACP FACS MCFG WAET" in console, console
    assert f"dsdt: {hashlib.sha256(dsdt()).hexdigest()}" in console
    (telling / "kernel").write_bytes(read_kernel((telling / "kernel").read_bytes()).kernel)
    console = tables(tmp_path / "bare")
    assert "SSDT" in console.partition("tables: ")[2].partition("\n")[0], console


def test_inspection_sees_a_changed_root(tools: Tools, changed: Callable[[str, int], Path]) -> None:
    found = {finding.check: finding for finding in inspect_image(changed("rootfs.verity", 4096 + 100), tools)}
    assert not found["the command line's root hash is that of root and verity tree"].ok


def test_inspection_names_what_is_open_in_an_image_that_has_a_shell(image: Path, tools: Tools) -> None:
    found = {finding.check: finding for finding in inspect_image(image, tools)}
    open_checks = {check for check, finding in found.items() if not finding.ok}
    assert "there is no shell" in open_checks
    assert "there is no way to log in" in open_checks
    assert "bash" in found["there is no shell"].seen
    assert found["every driver is signed, by the kernel's maker or the image's own key"].ok
    assert found["the command line's root hash is that of root and verity tree"].ok
    assert found["the packages are those of the bill of materials"].ok
