"""From locked Debian packages to a directory tree, by mmdebstrap, with nothing in it that differs from run to run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cvm_image.build.commands import run
from cvm_image.build.errors import BuildFailed
from cvm_image.build.lock import LockedPackage
from cvm_image.build.store import Store, link_or_copy
from cvm_image.build.tools import Mount, Tools, need_root

EXCLUDED_PATHS = (
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
)
"""Never unpacked; the copyright files below /usr/share/doc are, since licences ask for it."""

_VARYING = (
    "etc/.pwd.lock",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/info/*.list.dpkg-tmp",
    "var/lib/dpkg/lock*",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/available",
    "var/lib/dpkg/triggers/Lock",
)
_EMPTIED = ("var/log", "var/cache", "var/lib/apt", "run", "tmp", "var/tmp", "boot", "dev", "proc", "sys")


def write_repository(packages: Sequence[LockedPackage], store: Store, folder: Path, *, suite: str, log: Path) -> None:
    """Make `folder` an archive of `suite` that apt reads and that holds exactly `packages`, which are in the store.

    The suite must be said, since mmdebstrap asks for the essential packages of that suite alone.
    """
    folder.mkdir(parents=True)
    stanzas = []
    for package in packages:
        file = folder / f"{package.sha256}.deb"
        link_or_copy(store.input(package.sha256), file)
        control = run(["dpkg-deb", "-f", str(file)], what=f"reading {package.name}", log=log, timeout=60, quiet=True)
        stanzas.append(
            f"{control.rstrip()}\nFilename: ./{file.name}\nSize: {package.size}\nSHA256: {package.sha256}\n\n"
        )
    index = "".join(stanzas).encode()
    (folder / "Packages").write_bytes(index)
    (folder / "Release").write_text(
        f"Suite: {suite}\nCodename: {suite}\nArchitectures: amd64\n"
        f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
    )


def lay_out_tree(
    packages: Sequence[LockedPackage],
    store: Store,
    *,
    suite: str,
    epoch: int,
    folder: Path,
    log: Path,
    tools: Tools | None,
) -> Path:
    """Lay the packages out and configured at `folder/result` and return that path.

    mmdebstrap runs in the tools tree, or is the host's if `tools` is None (which is how the tools tree itself is made).
    Raises BuildFailed if what came to be installed is not exactly `packages`.
    """
    need_root()
    write_repository(packages, store, folder / "repository", suite=suite, log=log)
    (folder / "out").mkdir()
    here = str(folder) if tools is None else "/build"
    argv = [
        "mmdebstrap",
        "--mode=root",
        "--variant=essential",
        "--architectures=amd64",
        "--format=directory",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=APT::Sandbox::User "root"',
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--include=" + ",".join(one.name for one in packages),
        suite,
        f"{here}/out/root",
        f"deb [trusted=yes] copy:{here}/repository ./",
    ]
    argv[-3:-3] = [f"--dpkgopt=path-exclude={path}" for path in EXCLUDED_PATHS]
    env = {"SOURCE_DATE_EPOCH": str(epoch), "DEBIAN_FRONTEND": "noninteractive"}
    what = f"laying out {len(packages)} packages"
    if tools is None:
        run(argv, what=what, log=log, timeout=1200, env=env)
    else:
        mounts = (Mount(folder / "repository", "/build/repository"), Mount(folder / "out", "/build/out", writable=True))
        tools.run(argv, what=what, mounts=mounts, timeout=1200, env=env)
    result = folder / "result"
    (folder / "out" / "root").rename(result)
    _check_installed(result, packages, log)
    return result


def _check_installed(root: Path, packages: Sequence[LockedPackage], log: Path) -> None:
    wanted = {(one.name, one.version, one.architecture) for one in packages}
    found = set(installed_packages(root))
    if wanted != found:
        raise BuildFailed(
            "the tree does not hold exactly the locked packages",
            where=str(log),
            do="Renew the lock with `seal image lock`.",
            reasons=tuple(
                [f"not installed: {' '.join(one)}" for one in sorted(wanted - found)]
                + [f"not locked: {' '.join(one)}" for one in sorted(found - wanted)]
            ),
        )


def installed_packages(root: Path) -> list[tuple[str, str, str]]:
    """Name, version and architecture of each package that the tree's dpkg has as installed."""
    found = []
    for stanza in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Status") == "install ok installed":
            found.append((fields["Package"], fields["Version"], fields["Architecture"]))
    return found


def settle(root: Path, *, remove: Sequence[str], programs: Sequence[str] = ()) -> None:
    """Take out what differs from run to run, what belongs to a running system, and `remove` (globs).

    If `programs` names any, every other file of the folders of programs goes too.
    """
    if programs:
        for path in sorted([*root.glob("usr/bin/*"), *root.glob("usr/sbin/*")]):
            if path.name not in programs:
                path.unlink()
    for pattern in (*_VARYING, *remove):
        for path in sorted(root.glob(pattern), reverse=True):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name in _EMPTIED:
        folder = root / name
        if folder.is_dir():
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    for name in ("dev", "proc", "sys", "run", "tmp"):
        (root / name).mkdir(exist_ok=True)
    each_file(root, _drop_set_id)


def _drop_set_id(_: str, path: Path) -> None:
    """No program of a guest gains rights by being started."""
    mode = path.stat().st_mode
    if mode & 0o6000:
        path.chmod(mode & 0o777)


def extract_packages(packages: Sequence[LockedPackage], store: Store, target: Path, *, tools: Tools) -> None:
    """Unpack packages at `target` without configuring them."""
    target.mkdir(parents=True, exist_ok=True)
    for package in packages:
        tools.run(
            ["dpkg-deb", "-x", "/build/package.deb", "/build/out"],
            what=f"unpacking {package.name}",
            mounts=(
                Mount(store.input(package.sha256), "/build/package.deb"),
                Mount(target, "/build/out", writable=True),
            ),
            timeout=300,
        )


def each_file(root: Path, visit: Callable[[str, Path], None]) -> None:
    """Call `visit(relative name, path)` for every regular file below `root`, in the order of their names."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                visit(str(path.relative_to(root)), path)
