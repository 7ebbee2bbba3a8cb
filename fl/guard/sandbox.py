"""A sandbox for one training script: no network, nothing of the host, and one socket as its only way out.

The script runs under bubblewrap in its own user, pid, network, ipc, uts, cgroup and mount namespaces, without
capabilities, without new privileges, with an empty environment, under two seccomp filters (`fl.guard.seccomp`),
resource limits and a control group (`fl.guard.limits`, `fl.guard.control_groups`). It sees:

======================  ================================================================================
`/bundle`               the bundle's files, read-only, as they were when the `Sandbox` was made, and large ones
`/data/NAME`            one read-only file for each entry of `data`; held in memory, never on a disk
`/user_data`            the folder of a `SiteData` that has one (a mounted data volume), read-only
`/scratch`              its working directory, bounded, in memory; `/tmp` and `/dev/shm` lead into it
`/packages`, `/site`    our packages and the interpreter's site-packages, read-only
Python and `/usr/lib`   what the interpreter and torch load, read-only; no program but the interpreter
`/proc`, `/dev`         its own processes; null, zero, full, random and urandom
======================  ================================================================================

Descriptors: 0 (null), 1 and 2 (a log of bounded size, never exported), and 3, the channel, whose number is also in the
environment variable `SEAL_CHANNEL`. The script runs as `__main__`; on `sys.path` are our packages, its own folder, the
standard library, and site-packages. It may fork and start threads, but no program can be executed. When it ends,
however it ends, everything that it started is dead and nothing is left on the host.

    ours, theirs = socket.socketpair()
    with Sandbox(files, "client.py", ["--epochs", "1"], {"train.csv": raw}).start(theirs) as process:
        theirs.close()
        ...                                  # talk over `ours`; end of file means that the script has ended
        outcome = process.wait(timeout=60)

Started as root, bubblewrap and the script run as a user that nobody else is; started by another user, as that user.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fl.errors import SandboxFailed, SandboxUnusable
from fl.guard import bootstrap, launcher
from fl.guard.control_groups import ControlGroup, Enforcement, enforcement
from fl.guard.limits import MAX_DATA_BYTES, Limits, process_limits
from fl.guard.mounts import DEVICES, MASKED, view
from fl.guard.sandboxed_process import Outcome, SandboxedProcess, Start
from fl.guard.sealed_data import NAME as DATA_NAME
from fl.guard.seccomp import launch_filter, script_filter
from fl.transport.memory import SealedMemory

__all__ = ["CHANNEL_VARIABLE", "USER_DATA", "Limits", "Outcome", "Sandbox", "SandboxedProcess", "SiteData"]

CHANNEL_VARIABLE: Final = "SEAL_CHANNEL"
MAX_BUNDLE_BYTES: Final = 256 << 20
MAX_FILES: Final = 1500
"""Of bundle and data together; bubblewrap takes no more arguments than 9,000."""
MAX_PATH: Final = 512
MAX_ARGUMENTS: Final = 64 << 10
FIRST_USER: Final = 1_900_000_000
"""Root's sandboxes run as users from here on, where no system has users (systemd's UIDS-GIDS)."""
DEFAULT_LIMITS: Final = Limits()

_INSIDE_USER: Final = "1000"
_PASSWD: Final = b"script:x:1000:1000::/scratch:/nonexistent\n"
_GROUP: Final = b"script:x:1000:\n"
_NSSWITCH: Final = b"passwd: files\ngroup: files\nhosts: files\n"
_ENVIRONMENT: Final = {"HOME": "/scratch", "LANG": "C.UTF-8", "TMPDIR": "/tmp", "TZ": "UTC", "USER": "script"}  # noqa: S108
_GPU_DEVICE: Final = re.compile(r"/dev/(nvidia(\d+|ctl|-uvm|-uvm-tools|-modeset)|nvidia-caps/nvidia-cap\d+)")
_serials: Final = itertools.count(1)
USER_DATA: Final = "/user_data"
"""Where a script finds the files of its site's data volume."""


class SiteData(dict[str, bytes]):
    """What a site's scripts get: its files by name, held in memory; and what its guest declares of two further kinds.

    `folder` is what its data volume shows, `devices` the nodes of its GPUs (`/dev/nvidia…` only); none unless said.
    """

    folder: Path | None = None
    devices: tuple[Path, ...] = ()


class Sandbox:
    """What is to run, with what, and within which limits. Holds nothing but memory; may be started several times."""

    def __init__(
        self,
        bundle: Path | Mapping[str, bytes],
        script: str,
        arguments: Sequence[str] = (),
        data: Mapping[str, bytes] | None = None,
        *,
        large: Mapping[str, SealedMemory] | None = None,
        packages: Sequence[Path] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        require_cgroup: bool = False,
    ) -> None:
        """Take a copy of the bundle and check everything that can be checked before it runs.

        - `bundle`: its files by relative path, or the folder that holds them (regular files only, read here and never
          again, so that nothing changes after a check; best is to hand in the very bytes that were checked).
        - `script`: relative path in the bundle. `arguments`: its `sys.argv[1:]`.
        - `data`: plaintext by name (`sealed_data.NAME`) → `/data/NAME`; a `SiteData` may have a folder → `/user_data`,
          and devices, which are shown where they are.
        - `large`: further files of the bundle by path, in sealed memory, the caller's, who keeps them until `start`.
        - `packages`: importable package folders (with `__init__.py`), or folders that hold packages, such as a guest's
          unpacked `lib`; None: fl and policies, from where this process has them.
        - `require_cgroup`: refuse where only per-process limits can be had (production).

        Raises SandboxUnusable for arguments that make no sandbox, SandboxFailed for a host that cannot make one (no
        bubblewrap, no libseccomp, no control group though required); whether the host lets bubblewrap do its work is
        seen by `start`.
        """
        self._bundle = _read_folder(bundle) if isinstance(bundle, Path) else dict(bundle)
        self._data = dict(data or {})
        self._folder, self._devices = (data.folder, data.devices) if isinstance(data, SiteData) else (None, ())
        self._large = dict(large or {})
        _check_files(self._bundle, self._data, script, self._large)
        if sum(len(a.encode(errors="surrogateescape")) + 1 for a in arguments) > MAX_ARGUMENTS or any(
            "\0" in a for a in arguments
        ):
            raise SandboxUnusable(f"the script's arguments have a NUL or more than {MAX_ARGUMENTS} bytes")
        for device in self._devices:
            if not _GPU_DEVICE.fullmatch(str(device)) or not device.is_char_device():
                raise SandboxUnusable(f"{device} is no NVIDIA device node", do="Declare /dev/nvidia… nodes that exist.")
        self._script, self._arguments, self._limits = script, list(arguments), limits
        self._view = view(packages)
        self._bubblewrap = _bubblewrap()
        self._filters = launch_filter(devices=bool(self._devices)), script_filter()
        self.enforcement: Enforcement = enforcement()
        """What this host can hold the sandbox's sums to."""
        if require_cgroup and not self.enforcement.complete:
            raise SandboxFailed("; ".join(self.enforcement.missing))

    def start(self, channel: socket.socket | None = None) -> SandboxedProcess:
        """Start it with `channel` as descriptor 3, and return when its script is about to run.

        The caller keeps its own `channel` object, and closes it after. Raises SandboxFailed with bubblewrap's own words
        if the sandbox did not come up within `limits.start_seconds`.
        """
        held_bytes = sum(map(len, self._bundle.values())) + sum(map(len, self._data.values()))
        held_bytes += sum(one.size for one in self._large.values())
        group = self._group(held_bytes)
        user = _unprivileged_user() if os.geteuid() == 0 else None
        large: list[int] = []
        try:
            for one in self._large.values():
                large.append(_opened_anew(one.descriptor))  # noqa: PERF401 - what is open is closed if the next is not
            plan, blobs = self._plan(held_bytes, group, user, has_channel=channel is not None)
            archive = _archive(
                {**plan, "large": list(zip(map("/bundle/{}".format, self._large), large, strict=True))}, blobs
            )
        except OSError as error:
            for descriptor in large:
                os.close(descriptor)
            if group is not None:
                group.remove()
            raise SandboxFailed(f"the sandbox's files could not be held in memory: {error.strerror}") from error
        shared = -1 if channel is None else channel.fileno()
        parent = os.getpid()

        def command(report: int, info: int) -> list[str]:
            words = [str(number) for number in (archive, shared, report, info, parent)]
            return [str(self._view.interpreter), "-I", "-S", "-B", launcher.__file__, *words]

        passed = (archive, *large) if channel is None else (archive, shared, *large)
        process = SandboxedProcess(Start(command, passed, (archive, *large), group, self._limits))
        process.await_beginning()
        return process

    def _group(self, held_bytes: int) -> ControlGroup | None:
        if not self.enforcement.groups:
            return None
        try:
            return ControlGroup(self._limits, self.enforcement.groups, data_bytes=held_bytes)
        except OSError as error:
            raise SandboxFailed(f"the sandbox's control group could not be made: {error}") from error

    def _plan(
        self, held_bytes: int, group: ControlGroup | None, user: int | None, *, has_channel: bool
    ) -> tuple[dict[str, Any], list[bytes]]:
        """What the launcher has to do, and the blobs that go with it."""
        limits = self._limits
        configuration = {
            "arguments": self._arguments,
            "channel": has_channel,
            "filter": self._filters[1].hex(),
            "limits": sorted(process_limits(limits, data_bytes=held_bytes, devices=bool(self._devices)).items()),
            "packages": self._view.package_paths,
            "script": f"/bundle/{self._script}",
            "site": self._view.site_paths,
        }
        files = {
            "/bootstrap.py": Path(bootstrap.__file__).read_bytes(),
            "/etc/passwd": _PASSWD,
            "/etc/group": _GROUP,
            "/etc/nsswitch.conf": _NSSWITCH,
            **{f"/bundle/{path}": raw for path, raw in sorted(self._bundle.items())},
            **{f"/data/{name}": raw for name, raw in sorted(self._data.items())},
        }
        blobs = [json.dumps(configuration).encode(), self._filters[0], *files.values()]
        plan = {
            "after": self._arguments_after(),
            "before": self._arguments_before(has_channel=has_channel),
            "binds": [[str(source), inside] for source, inside in self._binds()],
            "bubblewrap": self._bubblewrap,
            "command": [str(self._view.interpreter), "-I", "-S", "-B", "-X", "utf8", "/bootstrap.py"],
            "configuration": 0,
            "entrances": [str(entrance) for entrance in group.entrances] if group is not None else [],
            "files": [[inside, number] for number, inside in enumerate(files, start=2)],
            "filter": 1,
            "user": user,
        }
        return plan, blobs

    def _binds(self) -> list[tuple[Path, str]]:
        return [*self._view.binds, *([] if self._folder is None else [(self._folder, USER_DATA)])]

    def _arguments_before(self, *, has_channel: bool) -> list[str]:
        """bubblewrap's arguments before the read-only binds: namespaces, environment, links."""
        environment = dict(_ENVIRONMENT)
        if has_channel:
            environment[CHANNEL_VARIABLE] = str(bootstrap.CHANNEL)
        if self._limits.cpus is not None:
            environment["OMP_NUM_THREADS"] = str(max(1, int(self._limits.cpus)))
        arguments = [
            "--unshare-user",
            "--unshare-all",
            "--disable-userns",
            "--uid",
            _INSIDE_USER,
            "--gid",
            _INSIDE_USER,
        ]
        arguments += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
        arguments.append("--clearenv")
        for name, value in environment.items():
            arguments += ["--setenv", name, value]
        for folder in ("/etc", "/usr", "/bundle", "/data"):
            arguments += ["--dir", folder]
        for target, inside in self._view.links:
            arguments += ["--symlink", target, inside]
        return arguments

    def _arguments_after(self) -> list[str]:
        """bubblewrap's arguments after the files: what the kernel provides, scratch, and then nothing more to write."""
        arguments = ["--proc", "/proc"]
        for path in MASKED:
            if path.is_dir():
                arguments += ["--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path)]
            elif path.exists():
                arguments += ["--ro-bind", "/dev/null", str(path)]
        arguments += ["--dir", "/dev"]
        for device in (*DEVICES, *self._devices):
            arguments += ["--dev-bind", str(device), str(device)]
        arguments += ["--symlink", "/proc/self/fd", "/dev/fd"]
        arguments += ["--perms", "0700", "--size", str(self._limits.scratch_bytes), "--tmpfs", "/scratch"]
        for link, folder in (("/tmp", "/scratch/tmp"), ("/dev/shm", "/scratch/shm")):  # noqa: S108  # inside
            arguments += ["--perms", "0700", "--dir", folder, "--symlink", folder, link]
        return [*arguments, "--remount-ro", "/", "--chdir", "/scratch"]


def _opened_anew(descriptor: int) -> int:
    """The same file with a place of its own from which it is read."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _bubblewrap() -> str:
    path = shutil.which("bwrap", path=os.defpath)
    if path is None:
        raise SandboxFailed("bubblewrap is not installed (sudo apt-get install -y bubblewrap)")
    return path


def _check_files(
    bundle: Mapping[str, bytes], data: Mapping[str, bytes], script: str, large: Mapping[str, SealedMemory]
) -> None:
    if len(bundle) + len(data) + len(large) > MAX_FILES:
        raise SandboxUnusable(f"bundle and data have more than {MAX_FILES} files", do="Put small files into archives.")
    if sum(map(len, bundle.values())) > MAX_BUNDLE_BYTES:
        raise SandboxUnusable(f"the bundle has more than {MAX_BUNDLE_BYTES} bytes", do="Bundle code, not data.")
    if sum(map(len, data.values())) + sum(one.size for one in large.values()) > MAX_DATA_BYTES:
        raise SandboxUnusable(f"the data has more than {MAX_DATA_BYTES} bytes", do="Hand in less.")
    paths = bundle.keys() | large.keys()
    for path in paths:
        parts = path.split("/")
        folders = {"/".join(parts[:end]) for end in range(1, len(parts))}
        if "\0" in path or len(path) > MAX_PATH or {"", ".", ".."} & set(parts) or folders & paths:
            raise SandboxUnusable(f"{path!r} is no path of a file in a bundle", do="Use plain relative paths.")
    for name in data:
        if not DATA_NAME.fullmatch(name):
            raise SandboxUnusable(f"{name!r} is no name for data", do="Use letters, digits, dots, dashes, underscores.")
    if bundle.keys() & large.keys():
        raise SandboxUnusable("a file is in the bundle and beside it", do="Give each path one file.")
    if script not in bundle:
        raise SandboxUnusable(f"the script {script!r} is not in the bundle", do="Name a file of the bundle.")


def _read_folder(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    left = MAX_BUNDLE_BYTES
    for path in _walk(folder):
        if len(files) >= MAX_FILES:
            raise SandboxUnusable(f"the bundle has more than {MAX_FILES} files", do="Put small files into archives.")
        with path.open("rb") as file:
            raw = file.read(left + 1)
        left -= len(raw)
        if left < 0:
            raise SandboxUnusable(f"the bundle has more than {MAX_BUNDLE_BYTES} bytes", do="Bundle code, not data.")
        files[path.relative_to(folder).as_posix()] = raw
    return files


def _walk(folder: Path) -> Iterator[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise SandboxUnusable(f"the bundle {folder} cannot be read: {error.strerror}", do="Name a folder.") from error
    for path in found:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(path)
        elif stat.S_ISREG(mode):
            yield path
        else:
            raise SandboxUnusable(f"{path} is neither a file nor a folder", do="A bundle has no links and no devices.")


def _archive(plan: dict[str, Any], blobs: list[bytes]) -> int:
    """A memory file with the plan and, after it, the blobs, for the launcher alone."""
    offset, places = 0, []
    for blob in blobs:
        places.append((offset, len(blob)))
        offset += len(blob)
    head = json.dumps({**plan, "blobs": places}).encode()
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(len(head).to_bytes(4, "big") + head)
            for blob in blobs:
                file.write(blob)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unprivileged_user() -> int | None:
    """A user that nobody else is; None where this process's own user namespace has only one."""
    wanted = FIRST_USER + (os.getpid() * 64 + next(_serials)) % 100_000_000
    return unprivileged_user(Path("/proc/self/uid_map").read_text(), Path("/proc/self/gid_map").read_text(), wanted)


def unprivileged_user(uid_map: str, gid_map: str, wanted: int) -> int | None:
    """`wanted`, if both maps (user_namespaces(7)) have it, else the highest number but 0 that both have, else None."""
    both = [[(int(line.split()[0]), int(line.split()[2])) for line in text.splitlines()] for text in (uid_map, gid_map)]
    tops = sorted({start + count - 1 for part in both for start, count in part}, reverse=True)
    for candidate in (wanted, *tops):
        if 0 < candidate < 0xFFFFFFFF and all(
            any(start <= candidate < start + count for start, count in part) for part in both
        ):
            return candidate
    return None
