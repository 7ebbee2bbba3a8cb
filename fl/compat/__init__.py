"""Stand-ins: modules of ours under the names of another system's, so that scripts written for it run as they are.

`install("nvflare")` lets `import nvflare.client` and the like find `fl.compat.nvflare.client`; `python -m fl.compat
nvflare SCRIPT ARGUMENTS…` installs and runs a script. A module or a name that has no stand-in says so, by its name.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final, NoReturn

SYSTEMS: Final = ("nvflare",)


class NotSupported(ImportError):
    """A name of another system for which there is no stand-in."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not supported here (docs/reference/compat.md lists what is)", name=name)


def missing(module: str, name: str) -> NoReturn:
    """What a stand-in's `__getattr__` does with a name that it does not have; a module's is imported instead."""
    if name.startswith("__") or _is_module(module, name):
        raise AttributeError(name)
    raise NotSupported(f"{module.removeprefix(__name__ + '.')}.{name}")


def _is_module(package: str, name: str) -> bool:
    if "." in name or not hasattr(sys.modules.get(package), "__path__"):
        return False
    return importlib.util.find_spec(f"{package}.{name}") is not None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `SYSTEM.rest` as `fl.compat.SYSTEM.rest`: one module under two names."""

    def __init__(self, system: str) -> None:
        self.system = system

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.system:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        ours = f"{__name__}.{spec.name}"
        try:
            return importlib.import_module(ours)
        except ModuleNotFoundError as error:
            if error.name is not None and ours.startswith(error.name):
                raise NotSupported(spec.name) from None
            raise

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, under its own name."""


def install(system: str) -> None:
    """Let this process find the stand-ins of `system`, before a package of that name that may be installed."""
    if system not in SYSTEMS:
        raise NotSupported(system)
    if not any(isinstance(finder, _Finder) and finder.system == system for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(system))


def bundled(system: str) -> dict[str, bytes]:
    """The file that a job's bundle needs so that its scripts find the stand-ins wherever they run."""
    text = f'"""Sealwright stands in for {system}."""\n\nfrom fl import compat\n\ncompat.install("{system}")\n'
    return {f"{system}/__init__.py": text.encode()}
