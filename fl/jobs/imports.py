"""Which modules from outside a bundle its scripts import, found by reading them.

From each script it goes on to the bundle's own modules that are imported, as Python would find them beside the script;
of a package of the bundle every module counts. What is imported by a name that is put together at run time is not
found; a reviewer sees that the code does so (`fl.jobs.review`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

OURS: Final = frozenset({"fl", "policies"})
"""Packages that the sandbox brings, in the version of the measured image."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a top-level module from outside."""

    module: str
    file: str
    line: int
    certain: bool
    """It is run whenever its module is: it is under no `try`, `if` or function."""


def imports_of(files: Mapping[str, bytes], scripts: Collection[str], modules: Collection[str] = ()) -> list[Import]:
    """The imports of third-party modules that `scripts` lead to, by file and line.

    `modules`: what is imported beside each script, whatever it says (filters).
    """
    found: set[Import] = set()
    seen: set[str] = set()
    for script in scripts:
        base = script.rpartition("/")[0]
        below = f"{base}/" if base else ""
        waiting = [script, *(path for module in modules for path in _own_modules(files, f"{below}{module}"))]
        while waiting:
            path = waiting.pop()
            if path in seen or not path.endswith(".py"):
                continue
            seen.add(path)
            for one in _imports_in(path, files.get(path, b"")):
                own = list(_own_modules(files, f"{below}{one.module}"))
                waiting += own
                if not own and one.module not in sys.stdlib_module_names and one.module not in OURS:
                    found.add(one)
    return sorted(found, key=lambda one: (one.file, one.line, one.module))


def _own_modules(files: Mapping[str, bytes], stem: str) -> Iterator[str]:
    """The bundle's files that an import of the module at `stem` may run."""
    if f"{stem}.py" in files:
        yield f"{stem}.py"
    yield from (path for path in files if path.startswith(f"{stem}/") and path.endswith(".py"))


def _imports_in(file: str, content: bytes) -> Iterator[Import]:
    try:
        tree = ast.parse(content, filename=file)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # it does not run either; a review says so
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [node.module]
        else:
            continue  # a relative import stays within a package, all of which is read
        for name in names:
            yield Import(name.partition(".")[0], file, node.lineno, id(node) in at_once)
