"""Where a failed script failed, in words that hold nothing of what it read.

What a script prints stays at its site, for it may print its data; yet its owner has to learn why it failed. So only
this leaves with the exit status: which of Python's own exceptions ended it, and the last place in the approved bundle
that the traceback names. Both come from short lists, so that a script which fakes its traceback says a few bits more
than its exit status does.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from typing import Final

_FRAME: Final = re.compile(r'^  File "/bundle/([^"\n]+)", line (\d{1,7})', re.MULTILINE)
_RAISED: Final = re.compile(r"^([A-Za-z]+)(?::.*)?$", re.MULTILINE)
_TRACEBACK: Final = "Traceback (most recent call last):\n"
_OWN: Final = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}


def failure_place(output: bytes, files: Mapping[str, bytes]) -> str | None:
    """Return like "ModuleNotFoundError at client.py, line 7", from the last traceback in the script's `output`.

    `files` are the bundle's. None if there is no traceback, or nothing in it that the bundle and Python have.
    """
    _, found, last = output.decode(errors="replace").rpartition(_TRACEBACK)
    if not found:
        return None
    places = [
        f"{name}, line {line}"
        for name, line in _FRAME.findall(last)
        if 0 < int(line) <= files.get(name, b"").count(b"\n") + 1 and name in files
    ]
    raised = [name for name in _RAISED.findall(last) if name in _OWN]
    words = [*raised[:1], *places[-1:]]
    return " at ".join(words) or None
