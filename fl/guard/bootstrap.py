"""The first process inside a sandbox: it takes its own powers away, runs the script in a child, and reaps.

Runs alone inside (`python -I -S -B /bootstrap.py`), with the standard library and nothing else. It is process 1 of its
pid namespace: when it ends, the kernel ends everything that the script has left running. Descriptors: 3 is the script's
channel, 4 reports to `fl.guard.sandbox` ("R" when the script begins; "En" or "Sn" when it ended with status or signal
n), 5 is the configuration.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
from typing import Any

CHANNEL, REPORT, CONFIGURATION = 3, 4, 5
PR_SET_DUMPABLE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 22, 2
MAX_CONFIGURATION = 1 << 20


class _Instruction(ctypes.Structure):
    """struct sock_filter (linux/filter.h)."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def main() -> None:
    """Set the stage; in the child, run the script as `__main__`; in the parent, wait and report."""
    with os.fdopen(CONFIGURATION, "rb") as file:
        configuration = json.loads(file.read(MAX_CONFIGURATION))
    os.closerange(CONFIGURATION, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for which, (soft, hard) in configuration["limits"]:
        # Without privileges a limit goes only down, so what was narrower already stays as narrow.
        above = resource.getrlimit(which)[1]
        held = (soft, hard) if above == resource.RLIM_INFINITY else (min(soft, above), min(hard, above))
        resource.setrlimit(which, held)
    # Nothing inside may read or write the memory of this process, which has no need of being honest otherwise.
    _prctl(PR_SET_DUMPABLE, 0)
    child = os.fork()
    if child:
        _forbid(configuration["filter"])
        _reap(child)
    _prctl(PR_SET_DUMPABLE, 1)
    _forbid(configuration["filter"])
    _run(configuration)


def _run(configuration: dict[str, Any]) -> None:
    script = configuration["script"]
    sys.argv = [script, *configuration["arguments"]]
    sys.path = [*configuration["packages"], script.rpartition("/")[0], *sys.path[:], *configuration["site"]]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.write(REPORT, b"R")
    os.close(REPORT)
    if configuration["channel"] is False:
        os.close(CHANNEL)
    runpy.run_path(script, run_name="__main__")


def _reap(child: int) -> None:
    """Wait for the script, and for whatever it leaves behind, until the script has ended; never returns."""
    # Process 1 gets from inside only what it has a handler for, and Python has one for this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2, CHANNEL):
        os.dup2(null, descriptor)
    os.close(null)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            break
    if os.WIFSIGNALED(status):
        os.write(REPORT, b"S%d" % os.WTERMSIG(status))
        os._exit(128 + os.WTERMSIG(status))
    os.write(REPORT, b"E%d" % os.WEXITSTATUS(status))
    os._exit(os.WEXITSTATUS(status))


def _forbid(program: str) -> None:
    """Load the second filter (hexadecimal `struct sock_filter`s) for this process and its children."""
    raw = bytes.fromhex(program)
    count = len(raw) // ctypes.sizeof(_Instruction)
    instructions = (_Instruction * count).from_buffer_copy(raw)
    filter_ = _Program(count, ctypes.cast(instructions, ctypes.POINTER(_Instruction)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *words) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    main()
