"""Every check of `seal image inspect` holds for a locked-down image, and fails for one that is broken in its way."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.evidence.cpio import Entry
from cvm_image.build.bill import bill_of_materials
from cvm_image.build.disk import Root
from cvm_image.build.entry import program, wrap_kernel
from cvm_image.build.image import command_line
from cvm_image.build.inspection import CHECKS
from cvm_image.build.lock import Lock, LockedPackage
from cvm_image.build.modules import MAGIC, put_signatures, sign_modules
from cvm_image.build.netfilter import RULES_FILE, packet_filter
from cvm_image.build.opening import Opened
from cvm_image.build.recipe import Network, Recipe
from cvm_image.build.workload import INIT, OURS, WORLD_FILE, File, collect, write_tree
from cvm_image.manifest import MANIFEST, ImageManifest, Measurement, sign_manifest

ROOT = Root(blocks=10, root_hash="ab" * 32, offset=72, length=8)
KERNEL = (b"MZ".ljust(0x202, b"\0") + b"HdrS").ljust(9000, b"\0")
GUEST = Path(__file__).resolve().parents[3] / "cvm_image" / "build" / "guest"
STATUS = "Package: python3\nStatus: install ok installed\nVersion: 3.13\nArchitecture: amd64\n\n"
BASE = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n",
    "etc/shadow": "root:*:1::::::\n",
    "usr/bin/python3": "#!x\n",
    "var/lib/dpkg/status": STATUS,
}


def put(root: Path, name: str, text: str, mode: int = 0o644) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def image(tmp_path: Path) -> Opened:
    """A locked-down hardware image, opened: made by the build's own parts, but for Debian's packages."""
    recipe = Recipe.model_validate(
        {"name": "tiny", "init": f"/{INIT}", "entry": "node", "workload": {"packages": True}}
    )
    files = collect(recipe, tmp_path / "tiny.toml")
    files[RULES_FILE] = File(packet_filter(Network(inbound=(8443,))).encode())
    write_tree(files, tmp_path / "workload")
    for name, text in BASE.items():
        put(tmp_path / "base", name, text)
    folder = tmp_path / "image"
    folder.mkdir()
    python = LockedPackage(
        name="python3",
        version="3.13",
        architecture="amd64",
        archive="debian",
        path="pool/main/p/python3/p.deb",
        size=1,
        sha256="0" * 64,
    )
    lock = Lock(recipe="tiny", suite="trixie", epoch=1, tools=[], firmware=[], kernel=[], base=[python], wheels=[])
    (folder / "sbom.cdx.json").write_bytes(bill_of_materials(lock, files, version="1"))
    (folder / "kernel").write_bytes(wrap_kernel(program(), KERNEL, None))
    manifest = ImageManifest(
        name="tiny",
        platform="hardware",
        entry="/init",
        svn=1,
        family_id="0" * 32,
        image_id="0" * 32,
        policy=0x30000,
        root_hash=ROOT.root_hash,
        lock_sha256="0" * 64,
        id_key_digest="0" * 96,
        author_key_digest=None,
        measurements=[Measurement(measurement="0" * 96, vcpu_model="EPYC-v4", vcpus=1, vmm="qemu", guest_features=1)],
        files={"kernel": "0" * 64},
    )
    (folder / MANIFEST).write_bytes(sign_manifest(manifest, Ed25519PrivateKey.generate()))
    initrd = (
        Entry("init", (GUEST / "initrd-init").read_bytes(), executable=True),
        Entry("modules/000-virtio_blk.ko", b"code" + MAGIC),
    )
    return Opened(folder, command_line(recipe, ROOT), ROOT, initrd, tmp_path / "base", tmp_path / "workload")


def failing(image: Opened) -> list[str]:
    return [check for check, look in CHECKS if not look(image)[0]]


def test_a_locked_down_image_passes_every_check(image: Opened) -> None:
    assert [(check, look(image)[1]) for check, look in CHECKS if not look(image)[0]] == []


def words(old: str, new: str) -> Callable[[Opened], Opened]:
    def change(image: Opened) -> Opened:
        assert old in image.cmdline
        return replace(image, cmdline=image.cmdline.replace(old, new))

    return change


def file(name: str, text: str = "x", mode: int = 0o644) -> Callable[[Opened], Opened]:
    def change(image: Opened) -> Opened:
        put(image.workload, name, text, mode)
        return image

    return change


def entry(changed: Entry) -> Callable[[Opened], Opened]:
    def change(image: Opened) -> Opened:
        return replace(image, initrd=(*(one for one in image.initrd if one.name != changed.name), changed))

    return change


def bare_kernel(image: Opened) -> Opened:
    (image.folder / "kernel").write_bytes(KERNEL)
    return image


def other_entry(image: Opened) -> Opened:
    (image.folder / "kernel").write_bytes(wrap_kernel(program()[:-1] + b"\x90", KERNEL, None))
    return image


def no_rules(image: Opened) -> Opened:
    (image.workload / RULES_FILE).unlink()
    return image


def device(image: Opened) -> Opened:
    os.mkfifo(image.base / "pipe")
    return image


def capability(image: Opened) -> Opened:
    path = image.base / "usr/bin/python3"
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    return image


def foreign_driver(image: Opened) -> Opened:
    certificate, modules = sign_modules({"evil": b"code"}, "tiny")
    signed = put_signatures({"evil": b"code"}, modules, base64.b64decode(certificate))["evil"]
    return replace(image, initrd=(*image.initrd, Entry("modules/001-evil.ko", signed)))


LOCKED = "the command line locks the kernel down"
BREAKAGES: list[tuple[str, Callable[[Opened], Opened]]] = [
    (LOCKED, words("lockdown=integrity", "lockdown=none")),
    (LOCKED, words("module.sig_enforce=1 ", "")),
    (LOCKED, words("random.trust_bootloader=0", "random.trust_bootloader=1")),
    (LOCKED, words("panic=-1", "panic=-1 lockdown=")),
    ("the kernel starts under our AML, never the host's", bare_kernel),
    ("the kernel starts under our AML, never the host's", other_entry),
    (
        "the initrd's program is this version's: drivers by list, then none, root by verity",
        entry(Entry("init", b"#!x")),
    ),
    (
        "every driver is signed, by the kernel's maker or the image's own key",
        entry(Entry("modules/001-evil.ko", b"code")),
    ),
    ("every driver is signed, by the kernel's maker or the image's own key", foreign_driver),
    ("the root holds no kernel module", file("usr/lib/modules/x.ko.xz")),
    (
        "the first program is this version's: memory-backed writes, packet filter, fewer rights",
        words(f"init=/{INIT}", "init=/usr/bin/python3"),
    ),
    (
        "the first program is this version's: memory-backed writes, packet filter, fewer rights",
        file("usr/lib/sealwright/guest/system.py"),
    ),
    ("there is no shell", file("usr/bin/dash", mode=0o755)),
    ("there is no shell", file("usr/local/bin/zsh")),
    ("there is no way to log in", file("usr/sbin/sshd")),
    ("there is no way to log in", file("usr/sbin/agetty")),
    ("nothing can be installed or loaded", file("usr/sbin/insmod")),
    ("no account has a password", file("etc/shadow", "root:$y$hash:1::::::\n")),
    ("no account has a password", file("etc/shadow", "root::1::::::\n")),
    ("no account has a password", file("etc/passwd", "root::0:0:root:/root:/bin/sh\n")),
    ("no key or secret is in it", file("etc/tls.pem", "-----BEGIN PRIVATE KEY-----\nx\n")),
    ("no key or secret is in it", file("root/.ssh/authorized_keys")),
    ("no program gains rights by being started", file("usr/bin/become", mode=0o4755)),
    ("no program gains rights by being started", capability),
    ("no file is writable by all", file("etc/open", mode=0o666)),
    ("no device node is in it", device),
    ("there is no service but the first program", file("etc/systemd/system/x.service")),
    ("there is no service but the first program", file("etc/crontab")),
    ("nothing is mounted from a table, no swap", file("etc/fstab", "/dev/vdz none swap sw 0 0\n")),
    ("the packet filter drops all but its ports", no_rules),
    ("the packet filter drops all but its ports", file(RULES_FILE, packet_filter(Network()).replace("drop", "accept"))),
    ("the attester is the manifest's, and no code of the other world is in it", file(WORLD_FILE, "virtual\n")),
    (
        "the attester is the manifest's, and no code of the other world is in it",
        file(f"{OURS}/attestation/attester/virtual_port.py"),
    ),
]


@pytest.mark.parametrize(("check", "breaking"), BREAKAGES)
def test_each_check_sees_what_it_is_for(image: Opened, check: str, breaking: Callable[[Opened], Opened]) -> None:
    if breaking is capability and os.geteuid() != 0:
        pytest.skip("giving a file capabilities needs root")
    assert failing(breaking(image)) == [check]


def test_a_package_that_the_bill_does_not_name_is_seen(image: Opened) -> None:
    put(image.base, "var/lib/dpkg/status", STATUS + STATUS.replace("python3", "netcat"))
    assert failing(image) == ["the packages are those of the bill of materials"]


def test_a_driver_by_the_key_that_the_kernel_names_is_told(image: Opened) -> None:
    text, modules = sign_modules({"ours": b"code"}, "tiny")
    certificate = base64.b64decode(text)
    (image.folder / "kernel").write_bytes(wrap_kernel(program(), KERNEL, certificate))
    signed = put_signatures({"ours": b"code"}, modules, certificate)["ours"]
    more = replace(image, initrd=(*image.initrd, Entry("modules/001-ours.ko", signed)))
    assert failing(more) == []
    told = {check: look(more)[1] for check, look in CHECKS}
    assert told["every driver is signed, by the kernel's maker or the image's own key"].endswith("modules/001-ours.ko")


def test_every_check_is_broken_by_some_test() -> None:
    broken = {check for check, _ in BREAKAGES} | {"the packages are those of the bill of materials"}
    assert broken == {check for check, _ in CHECKS}
