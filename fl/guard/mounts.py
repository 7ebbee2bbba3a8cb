"""What of the host a sandbox sees: the interpreter, the libraries it loads, and our packages. All of it read-only.

Nothing is decided here by looking at a script; the view is the same for every job of a process.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fl.errors import SandboxUnusable

OWN_PACKAGES: Final = ("fl", "policies")
"""What a training script's `from fl import client` needs of us."""

SYSTEM_PREFIXES: Final = (Path("/usr"), Path("/usr/local"))
OURS: Final = ("bundle", "data", "user_data", "scratch", "packages", "libraries", "site", "proc", "dev", "tmp", "etc")
"""First parts of paths that mean something of ours inside."""

_MASKED: Final = """
    acpi asound buddyinfo bus config.gz crypto devices diskstats dma driver dynamic_debug execdomains fb fs interrupts
    iomem ioports irq kallsyms kcore key-users keys kmsg kpagecgroup kpagecount kpageflags latency_stats locks mdstat
    misc modules mtrr pagetypeinfo partitions pressure sched_debug schedstat scsi slabinfo softirqs swaps sysrq-trigger
    timer_list tty vmallocinfo zoneinfo
"""
MASKED: Final = tuple(Path("/proc") / name for name in _MASKED.split())
"""Files of /proc that tell of the whole machine, and that no training needs."""

ALTERNATIVES: Final = Path("/etc/alternatives")
"""Where Debian keeps which of several interchangeable files is used (update-alternatives(1))."""

DEVICES: Final = tuple(Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom"))


@dataclass(frozen=True)
class View:
    """The read-only part of a sandbox's file system."""

    interpreter: Path
    """Real path of the interpreter, the same inside and outside."""
    binds: tuple[tuple[Path, str], ...]
    """Host path → path inside, read-only, outermost first."""
    links: tuple[tuple[str, str], ...]
    """(target, path inside) of symbolic links."""
    package_paths: tuple[str, ...]
    """For the head of `sys.path`."""
    site_paths: tuple[str, ...]
    """For its end."""


def view(packages: Sequence[Path] | None) -> View:
    """The view for this process's own interpreter, with `packages` (None: our own, from where they were imported).

    Raises SandboxUnusable for a package that is none.
    """
    interpreter = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    binds: dict[Path, str] = {}
    links: list[tuple[str, str]] = []
    for name in ("lib", "lib32", "lib64"):
        system, short = Path("/usr") / name, Path("/") / name
        if system.is_symlink():
            links.append((str(system.readlink()), str(system)))
        elif system.is_dir():
            binds[system] = str(system)
        if short.is_symlink():
            links.append((str(short.readlink()), str(short)))
        elif short.is_dir():
            binds[short] = str(short)
    for path in (Path("/usr/local/lib"), Path("/usr/share/zoneinfo"), Path("/etc/ld.so.cache")):
        if path.exists():
            binds[path] = str(path)
    links += _chosen_libraries(binds)
    for prefix in {Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix).resolve()} - set(SYSTEM_PREFIXES):
        if prefix.parts[1:2] and prefix.parts[1] in OURS:
            raise SandboxUnusable(
                f"Python is installed below /{prefix.parts[1]}, which means something else in a sandbox",
                do="Use an interpreter that is installed elsewhere, such as /usr/bin/python3.",
            )
        for folder in (prefix / "lib", prefix / "lib64"):
            if folder.is_dir() and not folder.is_symlink():
                binds[folder] = str(folder)
    if not _covered(interpreter, binds):
        binds[interpreter] = str(interpreter)
    site_paths = []
    for number, folder in enumerate(_site_folders(dict(binds))):
        inside = f"/site/{number}"
        if _covered(folder, binds):
            inside = str(folder)
        else:
            binds[folder] = inside
        site_paths.append(inside)
    package_paths = _add_packages(own_packages() if packages is None else packages, binds)
    return View(interpreter, tuple(binds.items()), tuple(links), tuple(package_paths), tuple(site_paths))


def _chosen_libraries(binds: Mapping[Path, str]) -> Iterator[tuple[str, str]]:
    """Debian's choices among interchangeable libraries, as links: its NumPy and torch load BLAS and LAPACK by them.

    Choices of anything but a shared library that is visible anyway are left out.
    """
    for link in sorted(ALTERNATIVES.iterdir()) if ALTERNATIVES.is_dir() else ():
        target = Path(os.path.normpath(link.parent / link.readlink())) if link.is_symlink() else link
        if target != link and ".so" in target.suffixes and _covered(target, binds):
            yield str(target), str(link)


def own_packages() -> list[Path]:
    """The folders of our packages, from where this process imports them."""
    return [folder for name in OWN_PACKAGES for folder in _locations(name)]


def _locations(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SandboxUnusable(f"the package {name} is not importable", do="Install Sealwright whole.")
    return [Path(location).resolve() for location in spec.submodule_search_locations]


def _site_folders(binds: dict[Path, str]) -> Iterator[Path]:
    """The folders of installed packages on this process's own `sys.path`, in its order.

    They are those that are called so, and those in a part of the system that is shown anyway (a measured image has its
    wheels below /usr/lib). Any other entry, such as a checkout of the sources, may hold what no script should see.
    """
    library = Path(sysconfig.get_path("stdlib")).resolve()
    seen = {library, library / "lib-dynload"}
    for entry in sys.path:
        folder = Path(entry).resolve()
        if entry and folder.is_dir() and folder not in seen:
            seen.add(folder)
            if folder.name in {"site-packages", "dist-packages"} or _covered(folder, binds):
                yield folder


def _add_packages(packages: Sequence[Path], binds: dict[Path, str]) -> list[str]:
    paths: dict[str, None] = {}
    for number, given in enumerate(packages):
        folder = given.resolve()
        if not folder.is_dir():
            raise SandboxUnusable(f"{given} is not a folder of packages", do="Name package folders that exist.")
        if (folder / "__init__.py").is_file():
            inside = f"/packages/{folder.name}"
            paths["/packages"] = None
        else:
            inside = f"/libraries/{number}"
            paths[inside] = None
        if inside in binds.values():
            raise SandboxUnusable(f"two packages are called {folder.name}", do="Name each package once.")
        binds[folder] = inside
    return list(paths)


def _covered(path: Path, binds: Mapping[Path, str]) -> bool:
    """Whether the path is already visible inside, under its own name."""
    return any(path.is_relative_to(bound) and str(bound) == inside for bound, inside in binds.items())
