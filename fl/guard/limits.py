"""How much a sandboxed script may use.

Two mechanisms hold it to that: resource limits (setrlimit(2)), which bind each process alone, and a control group
(`fl.guard.control_groups`), which binds all of a sandbox's processes together.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

MiB: Final = 1 << 20
GiB: Final = 1 << 30

MAX_DATA_BYTES: Final = 64 * GiB
"""No more plaintext than this enters one sandbox."""

ADDRESS_SPACE_HEADROOM: Final = 24 * GiB
"""Addresses are not memory: torch maps libraries and reserves arenas that it never touches."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use. Sizes are bytes, times seconds; the defaults suit a small torch training on a CPU."""

    memory_bytes: int = 4 * GiB
    """All memory of all its processes, scratch included; the data handed in is counted on top of it."""
    scratch_bytes: int = 1 * GiB
    """Everything below /scratch (which /tmp and /dev/shm lead to). It is memory, never a disk."""
    processes: int = 256
    """Processes and threads together."""
    cpus: float | None = None
    """Processors' worth of time; None leaves it to the host's scheduler. Needs a control group."""
    cpu_seconds: int = 24 * 3600
    """Processor time of any one process."""
    wall_seconds: float = 24 * 3600.0
    """From start to end; what runs longer is killed."""
    start_seconds: float = 30.0
    """How long the sandbox may take until its script begins."""
    open_files: int = 1024
    """Descriptors of one process."""
    file_bytes: int = 4 * GiB
    """The size of any one file or memory file that it writes."""
    log_bytes: int = 64 * 1024
    """How much of its standard output and error, together, is kept; the rest is thrown away unread."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"a sandbox's {name} is at least {least}, not {value}")


_LEAST: Final[Mapping[str, float]] = {
    "memory_bytes": 64 * MiB,
    "scratch_bytes": 1 * MiB,
    "processes": 4,
    "cpus": 0.01,
    "cpu_seconds": 1,
    "wall_seconds": 0.1,
    "start_seconds": 0.1,
    "open_files": 32,
    "file_bytes": 4096,
    "log_bytes": 0,
}


def process_limits(limits: Limits, *, data_bytes: int, devices: bool) -> dict[int, tuple[int, int]]:
    """The resource limits (RLIMIT_* → soft and hard value) of every process in the sandbox.

    RLIMIT_CORE is 1, not 0: only 1 also stops a core handler behind a pipe, which the kernel runs for a limit of 0
    (Linux, fs/coredump.c). With `devices` (a GPU) the address space is unbounded, for CUDA reserves more than there is.
    """
    held = {
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_DATA: limits.memory_bytes + data_bytes,
        resource.RLIMIT_MEMLOCK: 8 * MiB,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    if not devices:
        held[resource.RLIMIT_AS] = limits.memory_bytes + data_bytes + ADDRESS_SPACE_HEADROOM
    # SIGXCPU first, which says what happened; SIGKILL for whoever catches it.
    return {which: (value, value) for which, value in held.items()} | {
        resource.RLIMIT_CPU: (limits.cpu_seconds, limits.cpu_seconds + 5)
    }
