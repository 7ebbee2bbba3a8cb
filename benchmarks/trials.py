"""The consortia of the tests, for benchmarks: the same founders, the same real broker, server and sites."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_trial(path: str, name: str) -> ModuleType:
    """The module at `path` in the tests' folder, under `name`."""
    if name in sys.modules:
        return sys.modules[name]
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))  # where the tests' shared modules are
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"tests/{path} is not there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
