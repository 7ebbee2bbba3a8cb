"""The process that becomes bubblewrap: it joins the control group, gives up root, and hands the files over.

Runs alone (`python -I -S -B launcher.py`), single-threaded, between a site's many threads and bubblewrap, so that
nothing has to happen between fork and exec in a process with locks. Standard library only. Its plan is the first
descriptor that it is given: `plan size (u32, big-endian) | plan (JSON) | blobs`.

As root it first makes a mount namespace with the host's read-only parts at places that anybody can reach, and becomes a
user that nobody else is: bubblewrap and everything in the sandbox run as that user even if every namespace failed.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import stat
import sys
from pathlib import Path
from typing import Any

CHANNEL, REPORT, CONFIGURATION = 3, 4, 5
FIRST_FREE = 10
PR_SET_PDEATHSIG, SIGKILL = 1, 9
CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_SLAVE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x80000, 0x2, 0x4
FALLOC_PUNCH_HOLE = 0x3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
STAGE = "/tmp"  # noqa: S108  # in a mount namespace of our own, under a tmpfs of our own

_libc = ctypes.CDLL(None, use_errno=True)


def main(archive: int, channel: int, report: int, info: int, parent: int) -> None:
    """Become bubblewrap; never returns. `channel` is -1 for none."""
    _die_with(parent)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    plan, start = _read_plan(archive)
    sources = [source for source, _ in plan["binds"]]
    user = plan["user"]
    if user is not None:
        sources = _stage(sources)
    descriptors = [_memory_file(archive, start + offset, size) for offset, size in plan["blobs"]]
    os.close(archive)
    for entrance in plan["entrances"]:
        Path(entrance).write_text("0")
    if user is not None:
        _become(user)
        _die_with(parent)
    for one in plan["large"]:  # never one of the low numbers that the sandbox's own descriptors will have
        given, one[1] = one[1], _above(one[1])
        os.close(given)
    arguments = _arguments(plan, sources, descriptors, info)
    inherited = {REPORT: report, CONFIGURATION: descriptors[plan["configuration"]]}
    inherited[CHANNEL] = os.open("/dev/null", os.O_RDWR) if channel < 0 else channel
    _place(inherited)
    passed = _memory_file_of(b"".join(os.fsencode(argument) + b"\0" for argument in arguments))
    for descriptor in (*descriptors, *(large for _, large in plan["large"]), info, passed):
        os.set_inheritable(descriptor, True)
    os.execve(plan["bubblewrap"], ["bwrap", "--args", str(passed), "--", *plan["command"]], {})  # noqa: S606


def _read_plan(archive: int) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(os.pread(archive, 4, 0), "big")
    raw = os.pread(archive, size, 4)
    return json.loads(raw), 4 + size


def _arguments(plan: dict[str, Any], sources: list[str], descriptors: list[int], info: int) -> list[str]:
    arguments = list(plan["before"])
    arguments += ["--info-fd", str(info), "--seccomp", str(descriptors[plan["filter"]])]
    for source, (_, inside) in zip(sources, plan["binds"], strict=True):
        arguments += ["--ro-bind", source, inside]
    for inside, blob in plan["files"]:
        arguments += ["--perms", "0444", "--file", str(descriptors[blob]), inside]
    for inside, descriptor in plan["large"]:
        arguments += ["--perms", "0444", "--file", str(descriptor), inside]
    return [*arguments, *plan["after"]]


def _memory_file(archive: int, offset: int, size: int) -> int:
    """A memory file of one blob; its pages in the archive are given back at once, so that data is held once only."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    # Never one of the low numbers that the sandbox's own descriptors will have.
    if descriptor < FIRST_FREE:
        low, descriptor = descriptor, _above(descriptor)
        os.close(low)
    position, end = offset, offset + size
    while position < end:
        sent = os.sendfile(descriptor, archive, position, end - position)
        if sent == 0:
            raise OSError("the archive is shorter than its plan says")
        position += sent
    if size:
        _check(_libc.fallocate(archive, FALLOC_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(size)), "fallocate")
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _memory_file_of(raw: bytes) -> int:
    descriptor = os.memfd_create("arguments", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(raw)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _above(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)


def _place(wanted: dict[int, int]) -> None:
    """Put each descriptor at its number, whatever numbers they have now."""
    moved = {number: _above(descriptor) for number, descriptor in wanted.items()}
    for number, descriptor in moved.items():
        os.dup2(descriptor, number, inheritable=True)
        os.close(descriptor)


def _stage(sources: list[str]) -> list[str]:
    """Bind each source below STAGE in a mount namespace of our own; their places there."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount(None, "/", None, MS_REC | MS_SLAVE)
    # Opened before STAGE is covered, and after the namespace is made: a bind needs a mount of this very namespace.
    opened = [os.open(source, os.O_PATH | os.O_CLOEXEC) for source in sources]
    _mount("stage", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755,size=1m")
    places = []
    for number, descriptor in enumerate(opened):
        place = f"{STAGE}/{number}"
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            Path(place).mkdir(mode=0o755)
        else:
            Path(place).touch(mode=0o644)
        _mount(f"/proc/self/fd/{descriptor}", place, None, MS_BIND | MS_REC)
        os.close(descriptor)
        places.append(place)
    return places


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _die_with(parent: int) -> None:
    """Be killed when the thread that started this process ends; a change of user undoes it, so it is said twice."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL), 0, 0, 0), "prctl")
    if os.getppid() != parent:
        sys.exit("the process that started this sandbox has gone")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: bytes | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    try:
        main(*(int(word) for word in sys.argv[1:]))
    except OSError as failure:
        sys.exit(f"the sandbox cannot be prepared: {failure}")
