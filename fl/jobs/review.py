"""What a reviewer of a bundle has to see: what it changes, what its code reaches for, what it may let out.

Static analysis finds what is written openly: it shows a reviewer where to look and proves nothing. What code that was
approved in spite of it can do is bounded by sandbox and export gate. Three readers: Python's own `ast` for what our
sandbox and gate are about, bandit and detect-secrets for the rest. Nothing of the bundle is imported or run.
"""

from __future__ import annotations

import ast
import difflib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from fl.errors import MalformedMessage, RecipeUnusable
from fl.jobs.bundle import Bundle
from fl.jobs.lock import LOCK_FILE, differences, parse_lock
from fl.jobs.outputs import Capacity, capacity

Kind = Literal[
    "import", "file", "network", "process", "reflection", "serialised", "native", "shadows", "bandit", "secret"
]
MAX_FINDINGS: Final = 2000
MAX_DIFF: Final = 200_000
"""Characters of the shown difference."""

_MODULES: Final = """
network: socket socketserver ssl http urllib urllib3 requests httpx aiohttp grpc ftplib smtplib poplib imaplib telnetlib
network: xmlrpc asyncio websockets paramiko
process: subprocess multiprocessing pty signal concurrent threading sched resource
file: shutil tempfile glob fileinput mmap sqlite3 zipfile tarfile dbm
reflection: importlib inspect types code codeop runpy builtins gc pkgutil imp
serialised: pickle cPickle dill cloudpickle joblib shelve marshal copyreg
native: ctypes cffi numba cython
"""
_CALLS: Final = """
reflection: eval exec compile __import__ getattr setattr delattr globals locals vars
file: open os.open os.remove os.unlink os.rename os.mkdir os.walk os.listdir io.open
process: os.system os.popen os.fork os.kill os.execv os.execve os.posix_spawn
serialised: torch.load torch.jit.load torch.package.PackageImporter yaml.load yaml.unsafe_load
network: torch.hub.load torch.hub.download_url_to_file
native: torch.ops.load_library torch.utils.cpp_extension.load torch.classes.load_library
"""
_ATTRIBUTES: Final = """
file: write_text write_bytes read_text read_bytes unlink symlink_to hardlink_to tofile
reflection: __subclasses__ __globals__ __builtins__ __code__ __class__ __mro__ __reduce__
"""
_NATIVE: Final = (".so", ".pyd", ".dylib", ".dll", ".a", ".o", ".exe", ".ptx", ".cubin")
_SERIALISED: Final = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz", ".bin", ".ckpt", ".pyc")


def _kinds(table: str) -> dict[str, Kind]:
    """word → kind, from lines of `kind: word word …`."""
    found: dict[str, Kind] = {}
    for line in table.strip().splitlines():
        name, _, words = line.partition(":")
        kind = next(kind for kind in get_args(Kind) if kind == name)
        found.update(dict.fromkeys(words.split(), kind))
    return found


_MODULE_KINDS: Final = _kinds(_MODULES)
_CALL_KINDS: Final = _kinds(_CALLS)
_ATTRIBUTE_KINDS: Final = _kinds(_ATTRIBUTES)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at."""

    kind: Kind
    file: str
    line: int
    what: str


@dataclass(frozen=True, slots=True)
class Review:
    """What is shown. `difference` is empty without a version to compare with."""

    bundle: str
    against: str | None
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    settings: tuple[str, ...]
    """Settings that differ from the earlier version's, or all that are not the defaults."""
    lock: tuple[str, ...]
    """The packages that the code was made with, or how they differ from the earlier version's."""
    difference: str
    findings: tuple[Finding, ...]
    capacity: Capacity
    epsilon: float | None
    """Of the whole job, at `delta`; None where it is not private training."""


def review(bundle: Bundle, against: Bundle | None = None) -> Review:
    """Everything about a bundle that its reviewer should see. Raises RecipeUnusable where bandit or detect-secrets are
    not installed: a review without them would say less than it seems to."""
    old: Mapping[str, bytes] = {} if against is None else against.files
    new = bundle.files
    added, removed = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    changed = sorted(name for name in new.keys() & old.keys() if new[name] != old[name])
    found = [
        *(one for name in sorted(new) for one in findings_in(name, new[name])),
        *_by_libraries(new),
    ]
    privacy = bundle.settings.privacy
    epsilon = None
    if privacy is not None:
        from fl.guard.accounting import epsilon as epsilon_of

        epsilon = epsilon_of(privacy, bundle.settings.num_rounds)
    return Review(
        bundle=bundle.digest,
        against=None if against is None else against.digest,
        added=tuple(added),
        removed=tuple(removed),
        changed=tuple(changed),
        settings=tuple(_settings(bundle, against)),
        lock=tuple(_lock(new, None if against is None else old)),
        difference="" if against is None else _difference(old, new)[:MAX_DIFF],
        findings=tuple(sorted(set(found), key=lambda one: (one.file, one.line, one.kind, one.what)))[:MAX_FINDINGS],
        capacity=capacity(bundle),
        epsilon=epsilon,
    )


def findings_in(name: str, content: bytes) -> Iterator[Finding]:
    """What one file is or reaches for, by its name and by its syntax tree."""
    lower = name.lower()
    if lower.endswith(_NATIVE) or content.startswith((b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe")):
        yield Finding("native", name, 0, "native code, which no reader of Python sees into")
    if lower.endswith(_SERIALISED) or content.startswith(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
    ):
        yield Finding("serialised", name, 0, "a serialised object or archive: loading it may run what is in it")
    top = name.split("/")[0].removesuffix(".py")
    if name.endswith(".py") and (
        top in sys.stdlib_module_names or top in {"numpy", "torch", "fl", "sitecustomize", "usercustomize"}
    ):
        yield Finding("shadows", name, 0, f"is imported in place of the module {top}")
    if not name.endswith(".py"):
        return
    try:
        tree = ast.parse(content, filename=name)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield Finding("reflection", name, 0, "is no Python that can be parsed, so nothing in it was looked at")
        return
    for node in ast.walk(tree):
        yield from _in_node(node, name)


def _in_node(node: ast.AST, file: str) -> Iterator[Finding]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
        for module in names:
            reach = _MODULE_KINDS.get(module.split(".")[0], "import")
            yield Finding(reach, file, node.lineno, f"imports {module}")
    elif isinstance(node, ast.Call):
        called = _dotted(node.func)
        kind = _CALL_KINDS.get(called)
        if called.startswith(("os.exec", "os.spawn")):
            kind = "process"
        if kind is not None:
            yield Finding(kind, file, node.lineno, f"calls {called}")
    if isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTE_KINDS:
        yield Finding(_ATTRIBUTE_KINDS[node.attr], file, node.lineno, f"uses .{node.attr}")
    if isinstance(node, ast.Name) and node.id in {"__builtins__", "__loader__", "__spec__"}:
        yield Finding("reflection", file, node.lineno, f"uses {node.id}")


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return ".".join(reversed(parts))


def _by_libraries(files: Mapping[str, bytes]) -> Iterator[Finding]:
    """What bandit and detect-secrets find. They read files, so the bundle's are laid out in a folder for a moment."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of bandit's own plugin loader
            from bandit.core.config import BanditConfig
            from bandit.core.manager import BanditManager
        from detect_secrets.core.secrets_collection import SecretsCollection
        from detect_secrets.settings import default_settings
    except ImportError as error:
        raise RecipeUnusable(
            f"a review needs bandit and detect-secrets: {error}", where="review", do="pip install 'sealwright[review]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="sealwright-") as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        manager = BanditManager(BanditConfig(), "file", ignore_nosec=True, quiet=True)
        manager.discover_files([str(folder / name) for name in files if name.endswith(".py")])
        manager.run_tests()
        for issue in manager.get_issue_list():
            file = Path(issue.fname).relative_to(folder).as_posix()
            yield Finding("bandit", file, issue.lineno, f"{issue.test_id} ({issue.severity.lower()}): {issue.text}")
        with default_settings():
            secrets = SecretsCollection(root=scratch)
            for name in files:
                secrets.scan_file(name)
        for file, secret in secrets:
            yield Finding("secret", file, secret.line_number, f"looks like a secret: {secret.type}")


def _settings(bundle: Bundle, against: Bundle | None) -> Iterator[str]:
    new = bundle.settings.model_dump(mode="json")
    old = {} if against is None else against.settings.model_dump(mode="json")
    plain = bundle.settings.model_dump(mode="json", exclude_defaults=True)
    for name, value in new.items():
        if against is None and name in plain:
            yield f"{name}: {_short(value)}"
        elif against is not None and old.get(name) != value:
            yield f"{name}: {_short(old.get(name))} → {_short(value)}"


def _lock(new: Mapping[str, bytes], old: Mapping[str, bytes] | None) -> Iterator[str]:
    if LOCK_FILE not in new:
        yield f"there is no {LOCK_FILE}: server and sites refuse this bundle"
        return
    try:
        before = None if old is None else parse_lock(old[LOCK_FILE]) if LOCK_FILE in old else {}
        yield from differences(parse_lock(new[LOCK_FILE]), before)
    except MalformedMessage as error:
        yield f"a {LOCK_FILE} is malformed, and refused by server and sites: {error.what}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _difference(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> str:
    parts: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, b""), new.get(name, b"")
        if before == after:
            continue
        if b"\0" in before + after:
            parts.append(f"{name}: {len(before)} → {len(after)} bytes, no text\n")
            continue
        lines = difflib.unified_diff(
            before.decode(errors="backslashreplace").splitlines(keepends=True),
            after.decode(errors="backslashreplace").splitlines(keepends=True),
            f"a/{name}",
            f"b/{name}",
        )
        parts.extend(line if line.endswith("\n") else f"{line}\n" for line in lines)
    return "".join(parts)
