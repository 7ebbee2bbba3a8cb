"""What a built image proves about itself: `seal image inspect` reads the image, never the recipe or a running guest.

Each check looks at the very bytes that the measurement covers: command line, initrd, and the root whose hash is in the
command line. A check that fails says what it saw.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.disk import SALT, Root
from cvm_image.build.entry import program, read_kernel
from cvm_image.build.errors import BuildFailed
from cvm_image.build.image import ARGUMENTS
from cvm_image.build.modules import MAGIC, is_signed_by, signer_of
from cvm_image.build.netfilter import RULES_FILE, packet_filter
from cvm_image.build.opening import Opened, opened
from cvm_image.build.recipe import Network
from cvm_image.build.tools import Mount, Tools
from cvm_image.build.trees import installed_packages
from cvm_image.build.workload import GUEST, INIT, OURS, WORLD_FILE
from cvm_image.verify import load_image

SHELLS = frozenset({"ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "mksh", "rbash", "sh", "tcsh", "zsh"})
LOGIN = frozenset(
    {
        "agetty",
        "chsh",
        "dropbear",
        "getty",
        "login",
        "newgrp",
        "passwd",
        "rlogind",
        "ssh",
        "sshd",
        "su",
        "sudo",
        "sulogin",
    }
)
INSTALLERS = frozenset(
    {"apt", "apt-get", "dpkg", "insmod", "kexec", "kmod", "make", "modprobe", "pip", "pip3", "swapon"}
)
_PROGRAM_FOLDERS = ("usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin", "bin", "sbin")
_OTHER_WORLD = re.compile(
    rf"({re.escape(GUEST)}|{re.escape(OURS)}/attestation/attester)/(__pycache__/)?(relay|virtual_port)\..+"
)
"""What a hardware image must not hold: the code that asks the virtual platform's processor."""
_HERE = Path(__file__).parent / "guest"
_MAX_LISTED = 5


@dataclass(frozen=True)
class Finding:
    """One check of an image: what it asks, whether it holds, what was seen."""

    check: str
    ok: bool
    seen: str


def inspect_image(folder: Path, tools: Tools) -> list[Finding]:
    """Open the image in `folder` and return what every check found.

    Raises UnusableRecipe if the folder holds no image of this kind, and BuildFailed if it cannot be opened.
    """
    with opened(folder, tools) as image:
        return [_verity(folder, image.root, tools), *(Finding(check, *look(image)) for check, look in CHECKS)]


def _verity(folder: Path, root: Root, tools: Tools) -> Finding:
    check = "the command line's root hash is that of root and verity tree"
    size = (folder / "rootfs.erofs").stat().st_size
    if size != root.blocks * 4096:
        return Finding(check, False, f"the root has {size} bytes, the command line says {root.blocks * 4096}")
    try:
        tools.run(
            ["veritysetup", "verify", "/build/image/rootfs.erofs", "/build/image/rootfs.verity", root.root_hash],
            what="verifying the root",
            mounts=(Mount(folder.resolve(), "/build/image"),),
        )
    except BuildFailed as error:
        return Finding(check, False, error.reasons[-1])
    return Finding(check, True, f"{root.root_hash} (salt {SALT[:8]}…)")


def _arguments(image: Opened) -> tuple[bool, str]:
    words = image.cmdline.split(" ")
    names = [word.partition("=")[0] for word in words]
    twice = sorted({name for name in names if names.count(name) > 1})
    missing = [word for word in ARGUMENTS if word not in words]
    if missing or twice:
        return False, "; ".join([f"missing {word}" for word in missing] + [f"twice: {name}" for name in twice])
    return True, " ".join(ARGUMENTS)


def _kernel(image: Opened) -> tuple[bool, str]:
    try:
        wrapped = read_kernel((image.folder / "kernel").read_bytes())
    except BuildFailed as error:
        return False, error.what
    same = wrapped.program == program()
    drivers = "no key of drivers" if wrapped.certificate is None else "the key of its own drivers"
    return same, f"this version's entry, {drivers}" if same else "another entry than this version's"


def _initrd_script(image: Opened) -> tuple[bool, str]:
    script = next((entry.data for entry in image.initrd if entry.name == "init"), None)
    same = script == (_HERE / "initrd-init").read_bytes()
    return same, "this version's script" if same else "another script than this version's"


def _modules(image: Opened) -> tuple[bool, str]:
    modules = [entry for entry in image.initrd if entry.name.startswith("modules/") and entry.name.endswith(".ko")]
    try:
        certificate = read_kernel((image.folder / "kernel").read_bytes()).certificate
    except BuildFailed:
        certificate = None  # another check says so
    ours = set() if certificate is None else {one.name for one in modules if is_signed_by(one.data or b"", certificate)}
    unsigned = [entry.name for entry in modules if not (entry.data or b"").endswith(MAGIC)]
    makers = {signer_of(one.data or b"") for one in modules if one.name not in ours}
    if len(makers) > 1:
        return False, f"signed by {len(makers)} keys besides the image's own, where the kernel's maker has one"
    names = [re.sub(r"^modules/\d+-|\.ko$", "", entry.name) for entry in modules]
    told = ", ".join(names) + (f"; by the image's own key: {_listed(sorted(ours))}" if ours else "")
    return not unsigned, f"unsigned: {_listed(unsigned)}" if unsigned else told


def _no_modules_in_root(image: Opened) -> tuple[bool, str]:
    found = [name for name, _ in image.walk() if re.search(r"\.ko(\.[a-z0-9]+)?$", name)]
    return not found, _listed(found)


def _set_id(image: Opened) -> tuple[bool, str]:
    found = []
    for name, path in image.walk():
        if path.is_symlink():
            continue
        if path.stat().st_mode & 0o6000 and path.is_file():
            found.append(name)
        elif "security.capability" in os.listxattr(path):
            found.append(f"{name} (capabilities)")
    return not found, _listed(found)


def _world_writable(image: Opened) -> tuple[bool, str]:
    found = []
    for name, path in image.walk():
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) or not mode & stat.S_IWOTH:
            continue
        if not (stat.S_ISDIR(mode) and name in {"tmp", "run", "var/tmp", "run/lock", "dev/shm"}):
            found.append(name)
    return not found, _listed(found)


def _devices(image: Opened) -> tuple[bool, str]:
    found = [
        name
        for name, path in image.walk()
        if not (stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode) or path.is_symlink())
    ]
    return not found, _listed(found)


def _programs(image: Opened) -> list[str]:
    found: set[str] = set()
    for layer in (image.base, image.workload):
        for folder in _PROGRAM_FOLDERS:
            if (layer / folder).is_dir() and not (layer / folder).is_symlink():
                found |= {path.name for path in (layer / folder).iterdir()}
    return sorted(found)


def _no_program_of(forbidden: frozenset[str]) -> Callable[[Opened], tuple[bool, str]]:
    def look(image: Opened) -> tuple[bool, str]:
        programs = _programs(image)
        found = [name for name in programs if name in forbidden]
        return not found, _listed(found) if found else f"{len(programs)} programs: {_listed(programs)}"

    return look


def _no_passwords(image: Opened) -> tuple[bool, str]:
    found = []
    for name, field in (("etc/shadow", 1), ("etc/passwd", 1)):
        path = image.find(name)
        for line in path.read_text().splitlines() if path is not None else ():
            parts = line.split(":")
            if len(parts) > field and not (
                parts[field][:1] in {"!", "*"} or (name == "etc/passwd" and parts[1] == "x")
            ):
                found.append(f"{name}: {parts[0]}")
    return not found, _listed(found)


def _no_secrets(image: Opened) -> tuple[bool, str]:
    found = []
    for name, path in image.walk():
        if path.is_symlink() or not path.is_file():
            continue
        named = path.name in {"authorized_keys", "known_hosts"} or path.name.startswith("ssh_host_")
        small = path.stat().st_size < 65536 and not name.endswith((".py", ".pyc", ".so"))
        if named or (small and re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\r?\n", path.read_bytes())):
            found.append(name)
    return not found, _listed(found)


def _no_services(image: Opened) -> tuple[bool, str]:
    folders = (
        "etc/systemd",
        "usr/lib/systemd",
        "etc/init.d",
        "etc/rc.local",
        "etc/cron.d",
        "etc/crontab",
        "etc/inittab",
    )
    found = [name for name in folders if image.find(name) is not None]
    return not found, _listed(found)


def _no_swap(image: Opened) -> tuple[bool, str]:
    path = image.find("etc/fstab")
    lines = path.read_text().splitlines() if path is not None else []
    found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return not found, _listed(found) if found else "no fstab entry at all"


def _filter(image: Opened) -> tuple[bool, str]:
    path = image.find(RULES_FILE)
    if path is None:
        return False, "there are no rules"
    text = path.read_text()
    inbound, outbound = (_ports_of(text, chain) for chain in ("input", "output"))
    nfs = "nfs_server" in text
    same = text == packet_filter(Network(inbound=inbound, outbound=outbound, nfs=nfs))
    open_ports = f"TCP in {list(inbound) or 'none'}, TCP out {list(outbound) or 'none'}, DHCP"
    open_ports += ", one NFS server" if nfs else ""
    return same, open_ports if same else "other rules than this version writes"


def _ports_of(text: str, chain: str) -> tuple[int, ...]:
    body = text.partition(f"chain {chain} {{")[2].partition("  }\n")[0]
    match = re.search(r"tcp dport \{ ([0-9, ]{1,400}) \} ct state new accept", body)
    return tuple(int(port) for port in match.group(1).split(", ")) if match else ()


def _world(image: Opened) -> tuple[bool, str]:
    path = image.find(WORLD_FILE)
    world = path.read_text().strip() if path is not None else "none"
    named = load_image(image.folder).platform
    foreign = []
    if world == "hardware":
        foreign = [name for name, _ in image.walk() if _OTHER_WORLD.fullmatch(name)]
    return (
        world == named and not foreign,
        f"{world}; the manifest says {named}{'; ' + _listed(foreign) if foreign else ''}",
    )


def _first_program(image: Opened) -> tuple[bool, str]:
    words = image.cmdline.split(" ")
    if f"init=/{INIT}" not in words:
        return False, next((word for word in words if word.startswith("init=")), "no init")
    other = []
    for path in [_HERE / "init", *sorted(_HERE.glob("*.py"))]:
        name = INIT if path.name == "init" else f"{GUEST}/{path.name}"
        found = image.find(name)
        if found is None and path.name == "relay.py":
            continue
        if found is None or found.read_bytes() != path.read_bytes():
            other.append(name)
    return not other, _listed(other) if other else f"/{INIT}, this version's"


def _packages(image: Opened) -> tuple[bool, str]:
    bill = json.loads((image.folder / "sbom.cdx.json").read_bytes())
    named = {
        (part["name"], part["version"]) for part in bill["components"] if part["bom-ref"].startswith("root:pkg:deb/")
    }
    found = {(name, version) for name, version, _ in installed_packages(image.base)}
    if named == found:
        return True, f"{len(found)} packages"
    return False, _listed(sorted(" ".join(one) for one in named ^ found))


CHECKS: tuple[tuple[str, Callable[[Opened], tuple[bool, str]]], ...] = (
    ("the command line locks the kernel down", _arguments),
    ("the kernel starts under our AML, never the host's", _kernel),
    ("the initrd's program is this version's: drivers by list, then none, root by verity", _initrd_script),
    ("every driver is signed, by the kernel's maker or the image's own key", _modules),
    ("the root holds no kernel module", _no_modules_in_root),
    ("the first program is this version's: memory-backed writes, packet filter, fewer rights", _first_program),
    ("there is no shell", _no_program_of(SHELLS)),
    ("there is no way to log in", _no_program_of(LOGIN)),
    ("nothing can be installed or loaded", _no_program_of(INSTALLERS)),
    ("no account has a password", _no_passwords),
    ("no key or secret is in it", _no_secrets),
    ("no program gains rights by being started", _set_id),
    ("no file is writable by all", _world_writable),
    ("no device node is in it", _devices),
    ("there is no service but the first program", _no_services),
    ("nothing is mounted from a table, no swap", _no_swap),
    ("the packet filter drops all but its ports", _filter),
    ("the attester is the manifest's, and no code of the other world is in it", _world),
    ("the packages are those of the bill of materials", _packages),
)


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
