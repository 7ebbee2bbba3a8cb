"""A control group of its own for each sandbox: its memory, its processes and its processor time, in sum.

The group is made below the group that this process is in, so that it can only narrow what holds already: cgroup v2
where the controllers are there, v1 for those that a host still has as v1 hierarchies. It needs to be writable: to root,
or, with v2, to a user to whom the group was delegated (systemd: `Delegate=yes`).
Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fl.guard.limits import Limits

CONTROLLERS: Final = ("memory", "pids", "cpu")
OWN_PROCESSES: Final = "sealwright-site"
"""The leaf into which this process moves when its v2 group hands controllers on: in v2, leaves alone have processes."""
GROUP: Final = re.compile(r"sealwright-sandbox-(\d+)-\d+")
PERIOD_MICROSECONDS: Final = 100_000
REMOVAL_SECONDS: Final = 5.0
_serials: Final = itertools.count(1)
BESIDES_THE_SCRIPT: Final = 2
"""Processes of a sandbox that are ours: bubblewrap, and the bootstrap that reaps."""


@dataclass(frozen=True)
class Enforcement:
    """What this host can hold a sandbox's sums to."""

    groups: Mapping[str, Literal["v1", "v2"]]
    """Controller → the version of the hierarchy that will hold it."""
    missing: tuple[str, ...]
    """What cannot be held, one sentence each; empty where everything can."""

    @property
    def complete(self) -> bool:
        """Whether memory, processes and processor time are all bounded in sum, and memory stays memory."""
        return not self.missing


@dataclass(frozen=True)
class Hierarchy:
    """Where one controller is, as seen from this process."""

    version: Literal["v1", "v2"]
    own: Path
    """The directory of the group that this process is in."""


class ControlGroup:
    """One sandbox's group, in as many hierarchies as it takes."""

    def __init__(self, limits: Limits, controllers: Iterable[str], *, data_bytes: int) -> None:
        """Make it with those of `CONTROLLERS` that can be had; raises OSError if it cannot be made."""
        self._directories: dict[Path, None] = {}
        self._memory: tuple[Path, str] | None = None
        name = _fresh_name()
        places, _ = _usable()
        try:
            for controller in controllers:
                version, parent = places[controller]
                directory = parent / name
                if directory not in self._directories:
                    _sweep(parent)
                    directory.mkdir(mode=0o755)
                    self._directories[directory] = None
                _set(directory, controller, version, limits, data_bytes)
                if controller == "memory":
                    self._memory = (directory, version)
        except OSError:
            self.remove()
            raise

    @property
    def entrances(self) -> tuple[Path, ...]:
        """The files into which a process writes "0" to join."""
        return tuple(directory / "cgroup.procs" for directory in self._directories)

    def killed_for_memory(self) -> bool:
        """Whether the kernel has ended anything in it for want of memory."""
        if self._memory is None:
            return False
        directory, version = self._memory
        file = directory / ("memory.events" if version == "v2" else "memory.oom_control")
        counts = dict(line.split(" ", 1) for line in file.read_text().splitlines() if " " in line)
        return int(counts.get("oom_kill", "0")) > 0

    def remove(self) -> bool:
        """End what is left in it and remove it; whether it is gone."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        gone = True
        for directory in self._directories:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for pid in _words(directory / "cgroup.procs"):
                    os.kill(int(pid), signal.SIGKILL)
            gone = _remove_directory(directory, deadline) and gone
        return gone


def enforcement() -> Enforcement:
    """What this host can hold a sandbox to, found by making and removing an empty group.

    One thing lasts: in a v2 group that was delegated to it, this process moves into a leaf.
    """
    places, missing = _usable()
    groups: dict[str, Literal["v1", "v2"]] = {}
    for controller, (version, parent) in places.items():
        probe = parent / _fresh_name()
        try:
            probe.mkdir(mode=0o755)
            probe.rmdir()
        except OSError as error:
            missing.append(_sentence(controller, f"{parent} is not writable ({error.strerror})"))
        else:
            groups[controller] = version
    if swaps := Path("/proc/swaps").read_text().splitlines()[1:]:
        missing.append(f"memory is not kept off disks: {swaps[0].split()[0]} is used for swapping (swapoff -a)")
    return Enforcement(groups, tuple(missing))


def hierarchies(mountinfo: str, membership: str) -> dict[str, Hierarchy]:
    """Controller → hierarchy, from the text of /proc/self/mountinfo and /proc/self/cgroup; "" is the v2 hierarchy."""
    own = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ", 2)
        if kind == "cgroup2":
            names: list[str] = [""]
        elif kind == "cgroup":
            names = [name for name in CONTROLLERS if name in options.split(",")]
        else:
            continue
        for name in names:
            directory = _below(Path(_unescape(fields[4])), _unescape(fields[3]), own.get(name))
            if directory is not None and name not in found:
                found[name] = Hierarchy("v2" if name == "" else "v1", directory)
    return found


def _fresh_name() -> str:
    """The name of a group that this process has not used; GROUP reads it."""
    return f"sealwright-sandbox-{os.getpid()}-{next(_serials)}"


def _usable() -> tuple[dict[str, tuple[Literal["v1", "v2"], Path]], list[str]]:
    """Controller → (version, the directory in which groups may be made), and what is missing."""
    found = hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    places: dict[str, tuple[Literal["v1", "v2"], Path]] = {}
    missing: list[str] = []
    unified = found.get("")
    parent, offered, why = _delegate(unified.own) if unified else (None, frozenset[str](), "cgroup v2 is not mounted")
    for controller in CONTROLLERS:
        if controller in found:
            places[controller] = ("v1", found[controller].own)
        elif parent is not None and controller in offered:
            places[controller] = ("v2", parent)
        else:
            missing.append(_sentence(controller, why or "no hierarchy has this controller"))
    return places, missing


def _sentence(controller: str, why: str) -> str:
    subject = {"memory": "memory", "pids": "the number of processes", "cpu": "processor time"}[controller]
    return f"{subject} is bounded for each process alone, not in sum: {why}"


def _delegate(own: Path) -> tuple[Path | None, frozenset[str], str]:
    """The v2 directory in which groups may be made, the controllers that they will have, and why not, if not."""
    parent = own.parent if own.name == OWN_PROCESSES else own
    wanted = set(CONTROLLERS) & set(_words(parent / "cgroup.controllers"))
    control = parent / "cgroup.subtree_control"
    if not wanted <= set(_words(control)):
        try:
            if (parent / "cgroup.type").exists():  # every group but the hierarchy's root
                _move_into_leaf(parent)
            control.write_text(" ".join(f"+{name}" for name in sorted(wanted)))
        except OSError as error:
            return None, frozenset(), f"{control} cannot be written ({error.strerror}); run it with Delegate=yes"
    return parent, frozenset(wanted & set(_words(control))), ""


def _move_into_leaf(parent: Path) -> None:
    """Move this process, and its children, out of `parent`; raises OSError if it is not alone there."""
    members = [int(word) for word in _words(parent / "cgroup.procs")]
    ours = {os.getpid(), *_descendants(os.getpid())}
    if not set(members) <= ours:
        raise OSError(None, "other processes are in this group", str(parent))
    leaf = parent / OWN_PROCESSES
    leaf.mkdir(mode=0o755, exist_ok=True)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            (leaf / "cgroup.procs").write_text(str(pid))


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in _words(task / "children"):
                yield int(child)
                yield from _descendants(int(child))


def _set(directory: Path, controller: str, version: Literal["v1", "v2"], limits: Limits, data_bytes: int) -> None:
    memory = limits.memory_bytes + data_bytes
    if controller == "memory" and version == "v2":
        (directory / "memory.max").write_text(str(memory))
        (directory / "memory.oom.group").write_text("1")
        _set_if_there(directory / "memory.swap.max", "0")
    elif controller == "memory":
        (directory / "memory.limit_in_bytes").write_text(str(memory))
        _set_if_there(directory / "memory.memsw.limit_in_bytes", str(memory))
        _set_if_there(directory / "memory.swappiness", "0")
    elif controller == "pids":
        (directory / "pids.max").write_text(str(limits.processes + BESIDES_THE_SCRIPT))
    elif limits.cpus is not None:
        quota = math.ceil(limits.cpus * PERIOD_MICROSECONDS)
        if version == "v2":
            (directory / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        else:
            (directory / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (directory / "cpu.cfs_quota_us").write_text(str(quota))


def _set_if_there(file: Path, value: str) -> None:
    """For what kernels built without swap accounting do not have."""
    if file.exists():
        file.write_text(value)


def _sweep(parent: Path) -> None:
    """Remove the groups of processes that were killed before they could."""
    for directory in parent.glob("sealwright-sandbox-*"):
        match = GROUP.fullmatch(directory.name)
        if match and int(match[1]) != os.getpid() and not Path(f"/proc/{match[1]}").exists():
            _remove_directory(directory, deadline=0.0)


def _remove_directory(directory: Path, deadline: float) -> bool:
    """Remove an empty group; a process that has just died keeps it busy for a moment."""
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        else:
            return True


def _below(mount_point: Path, mount_root: str, path: str | None) -> Path | None:
    """Where the group `path` is, in a mount of the hierarchy that shows it from `mount_root` on."""
    if path is None or ".." in path.split("/"):
        return None
    try:
        return mount_point / Path(path).relative_to(mount_root)
    except ValueError:
        return None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _words(file: Path) -> list[str]:
    return file.read_text().split()
