"""Drivers that the build compiles: signed once, by a key that is gone; compiled again to the same bits, or not used."""

from __future__ import annotations

import base64
import io
import shutil
import tarfile
from functools import cache
from pathlib import Path

import pytest
from building import build_or_skip, copy_recipe, say
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.evidence.cpio import Entry, write_archive
from cvm_image.build import entry
from cvm_image.build.apt import fetch_packages, find_archives
from cvm_image.build.drivers import certificate_of, compiler_tree, kernel_release
from cvm_image.build.errors import BuildFailed, MissingInput, UnusableRecipe
from cvm_image.build.gpu import NVIDIA, put_into_root
from cvm_image.build.launching import booted, find_tools
from cvm_image.build.lock import Lock, LockedModule, load_lock, lock_path, write_lock
from cvm_image.build.modules import (
    MAGIC,
    Edit,
    ModuleSource,
    compile_modules,
    is_signed_by,
    needs_of,
    put_signatures,
    sign_modules,
)
from cvm_image.build.opening import opened
from cvm_image.build.recipe import HOST
from cvm_image.build.store import Store, default_cache
from cvm_image.build.tools import Tools
from cvm_image.signing import create_signing_keys

RECIPES = Path(__file__).resolve().parents[3] / "cvm_image" / "recipes"
TELLING = """#!/usr/bin/busybox sh
/usr/bin/busybox mount -t securityfs securityfs /sys/kernel/security
echo "modules: $(/usr/bin/busybox cut -d' ' -f1 /proc/modules | /usr/bin/busybox tr '\\n' ' ')"
echo "lockdown: $(cat /sys/kernel/security/lockdown)"
exec /usr/bin/busybox poweroff -f
"""
SOURCE = {
    "Makefile": "modules:\n\t$(MAKE) -C $(SYSOUT) M=$(CURDIR) modules\n",
    "Kbuild": "obj-m := sealprobe.o\n",
    "sealprobe.c": "#include <linux/module.h>\n"
    'static int __init start(void) { pr_warn("sealprobe: OLD\\n"); return 0; }\n'
    'module_init(start);\nMODULE_LICENSE("GPL");\nMODULE_DESCRIPTION("Says that it was loaded.");\n',
}
CODE = {"first": b"\x7fELF first", "second": b"\x7fELF second"}


@cache
def signed() -> tuple[bytes, list[LockedModule]]:
    certificate, modules = sign_modules(CODE, "tiny")
    lock = Lock(
        recipe="tiny", suite="trixie", epoch=1, tools=[], firmware=[], kernel=[], base=[], wheels=[],
        modules=modules, certificate=certificate,
    )  # fmt: skip
    raw = certificate_of(lock)
    assert raw is not None
    return raw, modules


def test_modules_get_their_signatures_back() -> None:
    certificate, modules = signed()
    whole = put_signatures(CODE, modules, certificate)
    for name, data in whole.items():
        assert data.startswith(CODE[name])
        assert data.endswith(MAGIC)
        assert is_signed_by(data, certificate)
    assert put_signatures(CODE, modules, certificate) == whole


def test_other_bits_another_key_or_another_module_are_refused() -> None:
    certificate, modules = signed()
    stranger, theirs = sign_modules(CODE, "tiny")
    with pytest.raises(BuildFailed, match="other bits"):
        put_signatures(CODE | {"first": b"\x7fELF other"}, modules, certificate)
    with pytest.raises(BuildFailed, match="not by the lock's certificate"):
        put_signatures(CODE, theirs, certificate)
    with pytest.raises(BuildFailed, match="other modules"):
        put_signatures({"first": CODE["first"]}, modules, certificate)
    swapped = [one.model_copy(update={"signature": modules[1 - at].signature}) for at, one in enumerate(modules)]
    with pytest.raises(BuildFailed, match="not by the lock's certificate"):
        put_signatures(CODE, swapped, certificate)
    assert stranger


@settings(max_examples=120)
@given(place=st.integers(0, 5000), bit=st.integers(0, 7))
def test_every_bit_of_a_signed_module_counts(place: int, bit: int) -> None:
    certificate, modules = signed()
    raw = bytearray(put_signatures(CODE, modules, certificate)["first"])
    at = place % len(raw)
    raw[at] ^= 1 << bit
    trailer = len(raw) - len(MAGIC) - 12
    if at >= len(CODE["first"]) and at < trailer:
        return  # inside the signature's own form: the kernel reads past names that nobody signs
    assert not is_signed_by(bytes(raw), certificate)


@given(st.binary(max_size=400))
def test_no_bytes_are_taken_for_a_signed_module(raw: bytes) -> None:
    certificate, _ = signed()
    for candidate in (
        raw,
        raw + MAGIC,
        CODE["first"] + raw + (0).to_bytes(8, "big") + len(raw).to_bytes(4, "big") + MAGIC,
    ):
        assert not is_signed_by(candidate, certificate)


def test_what_a_module_needs_is_read_from_it() -> None:
    assert needs_of(b"\0license=GPL\0depends=video,i2c-core\0name=x\0") == ("video", "i2c-core")
    assert needs_of(b"\0depends=\0") == ()
    assert needs_of(b"nothing") == ()


def test_of_the_gpus_packages_only_named_files_come_in(tmp_path: Path) -> None:
    unpacked, root = tmp_path / "unpacked", tmp_path / "root"
    current = unpacked / "usr/lib/x86_64-linux-gnu/nvidia/current"
    files = [current / f"{name.removesuffix('.1')}.550.1" for name in NVIDIA.libraries]
    files += [unpacked / "usr/lib/firmware/nvidia/550.1/gsp_ga10x.bin", unpacked / "usr/bin/nvidia-persistenced"]
    files += [unpacked / "usr/lib/nvidia/current/nvidia-smi", unpacked / "etc/init.d/nvidia-persistenced"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (current / "libcuda.so.1").symlink_to("libcuda.so.550.1")
    taken = put_into_root(NVIDIA, unpacked, root)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == taken
    assert (root / "usr/lib/x86_64-linux-gnu/libcuda.so.1").read_text() == "libcuda.so.550.1"
    assert not (root / "etc").exists()
    (unpacked / "usr/lib/nvidia/current/nvidia-smi").unlink()
    with pytest.raises(UnusableRecipe, match="hold no nvidia-smi"):
        put_into_root(NVIDIA, unpacked, tmp_path / "other")


@pytest.fixture(scope="module")
def lock() -> Lock:
    return load_lock(RECIPES / "fl-gpu.toml", "fl-gpu", "trixie")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, lock: Lock) -> Path:
    """The minimal image with the kernel for which the drivers' lock has a compiler; its init tells what is loaded."""
    recipe = copy_recipe(RECIPES, "minimal", tmp_path_factory.mktemp("recipe") / "copy")
    own = load_lock(recipe, "minimal", "trixie").model_copy(update={"kernel": lock.kernel, "tools": lock.tools})
    lock_path(recipe).write_text(write_lock(own))
    (recipe.parent / "minimal/usr/lib/sealwright/init").write_text(TELLING)
    keys = create_signing_keys(tmp_path_factory.mktemp("keys") / "keys")
    folder = build_or_skip(recipe, tmp_path_factory.mktemp("image") / "image", keys)
    if load_lock(recipe, "minimal", "trixie") != own:
        pytest.skip("the locked kernel is not to be had any more")
    return folder


@pytest.fixture(scope="module")
def tools(image: Path) -> Tools:
    store = Store(default_cache())
    return find_tools(store, log=store.logs / "tests.log")


@pytest.fixture(scope="module")
def compiler(lock: Lock, tools: Tools) -> Tools:
    store = Store(default_cache())
    archives = find_archives({"debian": HOST, "debian-security": HOST}, HOST, log=tools.log)
    try:
        fetch_packages(lock.compiler, store, archives, folder=store.root / "apt" / "fetch", log=tools.log)
    except (BuildFailed, MissingInput) as error:
        pytest.skip(f"the locked compiler is not to be had: {error.what}")
    with store.alone(say):
        return compiler_tree(lock, store, tools, tools.log)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, lock: Lock, compiler: Tools) -> bytes:
    """A driver of the smallest kind, compiled twice for the locked kernel: the same bits."""
    folder = tmp_path_factory.mktemp("driver")
    with tarfile.open(folder / "source.tar.xz", "w:xz") as archive:
        for name, text in SOURCE.items():
            info = tarfile.TarInfo(f"probe/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    source = ModuleSource(folder / "source.tar.xz", "probe", ("sealprobe",), (Edit("sealprobe.c", "OLD", "new"),))
    made = []
    for name in ("one", "another"):
        (folder / name).mkdir()
        release = kernel_release(lock)
        made.append(compile_modules(compiler, source, folder / name, release=release, epoch=lock.epoch)["sealprobe"])
    assert made[0] == made[1]
    assert needs_of(made[0]) == ()
    (folder / "third").mkdir()
    wrong = ModuleSource(source.archive, "probe", ("sealprobe",), (Edit("sealprobe.c", "NONE", "x"),))
    with pytest.raises(BuildFailed, match="not the source that the edit is for"):
        compile_modules(compiler, wrong, folder / "third", release=kernel_release(lock), epoch=lock.epoch)
    return made[0]


@pytest.mark.long
def test_the_entry_is_what_its_source_gives(compiler: Tools, tmp_path: Path) -> None:
    assert entry.compile_entry(compiler, tmp_path) == entry.program()


@pytest.mark.long
def test_a_locked_down_kernel_takes_the_drivers_of_the_lock_and_no_others(
    image: Path, tools: Tools, driver: bytes, tmp_path: Path
) -> None:
    drivers = {"sealprobe": driver}
    lines = [sign_modules(drivers, name) for name in ("ours", "theirs")]
    keys = [base64.b64decode(text) for text, _ in lines]
    ours, theirs = (
        put_signatures(drivers, modules, key)["sealprobe"] for key, (_, modules) in zip(keys, lines, strict=True)
    )
    bare = entry.read_kernel((image / "kernel").read_bytes()).kernel

    def loaded(name: str, module: bytes, certificate: bytes | None) -> bool:
        copy = tmp_path / name
        shutil.copytree(image, copy)
        (copy / "kernel").write_bytes(entry.wrap_kernel(entry.program(), bare, certificate))
        with opened(image, tools) as inside:
            entries = {one.name: one for one in inside.initrd}
        order = (entries["modules/order"].data or b"") + b"optional 099-sealprobe.ko\n"
        entries["modules/order"] = Entry("modules/order", order)
        entries["modules/099-sealprobe.ko"] = Entry("modules/099-sealprobe.ko", module)
        (copy / "initrd").write_bytes(write_archive(list(entries.values())))
        with booted(tools, copy, tmp_path / f"run-{name}") as guest:
            console = guest.wait(within=240, what="telling its modules")
        shutil.rmtree(copy)
        told = console.partition("modules: ")[2].partition("\n")[0].split()
        assert "erofs" in told, console
        assert "[integrity]" in console
        return "sealprobe" in told

    assert loaded("signed", ours, keys[0])
    assert not loaded("unsigned", driver, keys[0])
    assert not loaded("foreign", theirs, keys[0])
    assert not loaded("unnamed", ours, None)
