"""The few functions of libseccomp (seccomp(3)) that the sandbox's filters are made with, by ctypes.

By its soname: the packaged bindings look it up by running ldconfig or a compiler, which a measured image does not have.
libseccomp is LGPL-2.1 and is used as the shared library that every Debian and Ubuntu has.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Final

from fl.errors import SandboxFailed

SONAME: Final = "libseccomp.so.2"

ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000

NE: Final = 1
MASKED_EQ: Final = 7

ATTRIBUTE_BAD_ARCHITECTURE: Final = 2
LOW: Final = 0xFFFFFFFF
"""Arguments that the kernel takes as 32 bits are compared as such; their upper halves are the caller's to fill."""


def error(number: int) -> int:
    """The action "fail with this errno"."""
    return 0x00050000 | number


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp: a condition on one argument of a call."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def equals(argument: int, value: int) -> Comparison:
    """The lower half of the argument is `value`."""
    return Comparison(argument, MASKED_EQ, LOW, value)


def has_none_of(argument: int, bits: int) -> Comparison:
    """None of `bits` is set in the argument."""
    return Comparison(argument, MASKED_EQ, bits, 0)


def is_not(argument: int, value: int) -> Comparison:
    """The argument, whole, is not `value`."""
    return Comparison(argument, NE, value, 0)


class Filter:
    """A seccomp filter in the making, for the machine's own architecture; calls by other numbers kill the process."""

    def __init__(self, default: int) -> None:
        """`default` is the action for every call that no rule speaks of. Raises SandboxFailed without libseccomp."""
        self._library = _library()
        self._context = self._library.seccomp_init(default)
        if not self._context:
            raise SandboxFailed("libseccomp could not make a filter")
        _check(self._library.seccomp_attr_set(self._context, ATTRIBUTE_BAD_ARCHITECTURE, KILL_PROCESS))

    def add(self, action: int, call: str, *conditions: Comparison) -> None:
        """Take `action` on `call` if all conditions hold.

        A call that this architecture does not have, or that is newer than this libseccomp, is left to the default.
        """
        number = call_number(call)
        if number is not None:
            array = (Comparison * len(conditions))(*conditions)
            _check(self._library.seccomp_rule_add_array(self._context, action, number, len(conditions), array))

    def export(self) -> bytes:
        """The filter as an array of `struct sock_filter`; it cannot be used after."""
        with os.fdopen(os.memfd_create("filter", os.MFD_CLOEXEC), "rb") as file:
            _check(self._library.seccomp_export_bpf(self._context, file.fileno()))
            self._library.seccomp_release(self._context)
            self._context = None
            file.seek(0)
            return file.read()


def call_number(call: str) -> int | None:
    """The number of a system call on this machine, if it and libseccomp know it."""
    number = int(_library().seccomp_syscall_resolve_name(call.encode()))
    return number if number >= 0 else None


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(SONAME)
    except OSError as failure:
        raise SandboxFailed(f"{SONAME} cannot be loaded (sudo apt-get install -y libseccomp2): {failure}") from failure
    context = ctypes.c_void_p
    for name, result, arguments in (
        ("seccomp_init", context, [ctypes.c_uint32]),
        ("seccomp_release", None, [context]),
        ("seccomp_attr_set", ctypes.c_int, [context, ctypes.c_int, ctypes.c_uint32]),
        ("seccomp_syscall_resolve_name", ctypes.c_int, [ctypes.c_char_p]),
        (
            "seccomp_rule_add_array",
            ctypes.c_int,
            [context, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison)],
        ),
        ("seccomp_export_bpf", ctypes.c_int, [context, ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), "libseccomp")
