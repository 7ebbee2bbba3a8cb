"""Hostile scripts: what they share, and what became of them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from fl.guard.limits import Limits, MiB
from fl.guard.sandbox import Outcome

SMALL = Limits(
    memory_bytes=256 * MiB, scratch_bytes=16 * MiB, processes=48, wall_seconds=20, start_seconds=20, log_bytes=8192
)

PRELUDE = '''
"""What the hostile scripts share: try a thing, and tell what came of it."""
import ctypes, errno, json, os, socket

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
numbers = json.load(open("/bundle/numbers.json"))
found = {}


def attempt(name, act):
    """Remember the name of the error with which `act` failed, or what it gave."""
    try:
        found[name] = act()
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, repr(error))


def call(name, *arguments):
    """A bare system call."""
    number = name if isinstance(name, int) else numbers[name]
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def tell(**more):
    """Say it all to the other end of the channel."""
    found.update(more)
    channel = socket.socket(fileno=os.dup(int(os.environ["SEAL_CHANNEL"])))
    channel.sendall(json.dumps(found).encode() + b"\\n")
    channel.close()
'''


@dataclass(frozen=True)
class Attack:
    """What became of a hostile script."""

    outcome: Outcome
    said: dict[str, Any]
    """The last thing it told; empty if it told nothing."""


Attacker = Callable[..., Attack]
"""The fixture `attack`."""

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="plays tricks with x86-64's other call tables")
