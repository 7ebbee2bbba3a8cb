"""May the author's process be forked to make the fork server, and what of it does the fork forget?

A fork has one thread: whatever another thread holds at that moment is held for ever. So a process is forked only while
all its threads are OpenBLAS's, which takes care of forks itself. Of libraries' state, what the author may have changed
is looked at, and of the author's own modules nothing is kept: a client's script imports them anew, as at a site.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, Final

TASKS: Final = Path("/proc/self/task")
MAPS: Final = Path("/proc/self/maps")
INSTALLED: Final = frozenset({"site-packages", "dist-packages"})


def may_be_forked(preload: list[str]) -> bool:
    """Whether a fork of this process would save an import and be as good as a new process."""
    torch: Any = sys.modules.get("torch")
    return (
        torch is not None
        and "torch" in preload
        and _is_library(torch, ())
        and threads() <= 1 + threads_of_openblas(MAPS.read_text(errors="replace"), os.environ)
        and not torch.cuda.is_initialized()
        and torch.is_grad_enabled()
        and torch.get_default_dtype() is torch.float32
        and torch.get_default_device().type == "cpu"
        and not torch.are_deterministic_algorithms_enabled()
    )


def threads() -> int:
    """How many threads this process has, in whatever language they were started."""
    try:
        return len(list(TASKS.iterdir()))
    except OSError:
        return 1 << 30


def threads_of_openblas(maps: str, environment: Any) -> int:
    """How many threads each OpenBLAS in this process has started when it was loaded, in all.

    `maps`: /proc/self/maps. One that was told to start fewer is believed to have done so.
    """
    libraries = {line.rpartition(" ")[2] for line in maps.splitlines() if "openblas" in line.rpartition("/")[2]}
    wanted = environment.get("OPENBLAS_NUM_THREADS") or environment.get("OMP_NUM_THREADS") or ""
    cores = len(os.sched_getaffinity(0))
    each = min(int(wanted), cores) if wanted.isdecimal() else cores
    return len(libraries) * max(0, each - 1)


def forget_author() -> None:
    """In the fork: be as a new process that has imported libraries, and nothing of the author's."""
    kept = library_folders()
    for name, module in list(sys.modules.items()):
        if name != "__main__" and not _is_library(module, kept):
            del sys.modules[name]
    sys.path[0] = str(Path.cwd())
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)


def library_folders() -> tuple[str, ...]:
    """Where modules lie that are nobody's own: the interpreter's and ours; installed ones say so by their path."""
    ours = [sys.modules[name].__path__[0] for name in ("fl", "policies", "attestation") if name in sys.modules]
    return tuple(str(Path(folder).resolve()) + os.sep for folder in [*ours, sysconfig.get_path("stdlib")])


def _is_library(module: ModuleType, kept: tuple[str, ...]) -> bool:
    own = vars(module)  # some of torch's modules answer to any attribute
    places = [own.get("__file__"), *(own.get("__path__") or [])]
    return all(_lies_in(Path(place), kept) for place in places if isinstance(place, str))


def _lies_in(place: Path, kept: tuple[str, ...]) -> bool:
    return bool(INSTALLED & set(place.parts)) or f"{place.resolve()}{os.sep}".startswith(kept)
