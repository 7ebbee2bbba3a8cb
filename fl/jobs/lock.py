"""A bundle's lock: which third-party distributions its code was made with, and which versions it may run with.

`requirements.lock` has one line for each, sorted by name, in a form that pip reads:

    numpy==2.4.6  # imported, cp311-cp311-manylinux_2_27_x86_64 sha256:5f2c…
    sympy==1.14.0  # needed
    torch>=2.6,<3  # imported

*imported*: the bundle's code imports it; *needed*: one of those asks for it. Lines are made with `==`, of the versions
where the bundle is made, without local labels (`+cpu`). An author who has tried others keeps a lock of this form in the
recipe's folder, with a range in a version's place; what only that distribution needs is then no longer locked. A tag
and a digest say which wheel it was: where a wheel of the same tag is installed, it has to be that one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from fl.errors import MalformedMessage, RecipeUnusable
from fl.jobs.imports import imports_of
from fl.jobs.packages import Build, Packages
from fl.jobs.settings import JobSettings

LOCK_FILE: Final = "requirements.lock"
MAX_LOCK: Final = 256 << 10
MAX_LOCKED: Final = 1000

Why: TypeAlias = Literal["imported", "needed"]

_NAME: Final = r"(?P<name>[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?)"
_EXACT: Final = r"==(?P<version>(?:[0-9]{1,4}!)?[0-9][0-9a-z.]{0,62})"
_RELEASE: Final = r"[0-9]{1,9}(?:\.[0-9]{1,9}){0,5}"
_RANGE: Final = rf">=(?P<least>{_RELEASE}),<(?P<below>{_RELEASE})"
_BUILD: Final = r", (?P<tag>[A-Za-z0-9_.-]{1,120}) sha256:(?P<contents>[0-9a-f]{64})"
_LINE: Final = re.compile(rf"{_NAME}(?:{_EXACT}|{_RANGE})  # (?P<why>imported|needed)(?:{_BUILD})?")
_PLAIN: Final = re.compile(rf"{_RELEASE}(?:\.post[0-9]{{1,9}})?")
_HEAD: Final = "# The packages that this job's code was made with. Sites that have others refuse it.\n"


@dataclass(frozen=True, slots=True)
class Locked:
    """One line of a lock: an exact `version`, or releases from `least` to before `below`."""

    name: str
    version: str | None
    least: str | None
    below: str | None
    why: Why
    build: Build | None = None

    @property
    def wanted(self) -> str:
        """Which versions it may be, as pip writes it."""
        return f">={self.least},<{self.below}" if self.version is None else f"=={self.version}"

    @property
    def line(self) -> str:
        """As the file has it."""
        build = "" if self.build is None else f", {self.build.tag} sha256:{self.build.contents}"
        return f"{self.name}{self.wanted}  # {self.why}{build}"

    def admits(self, version: str) -> bool:
        """Whether an installed version will do; local labels do not matter, releases before the final one do."""
        public = _public(version)
        if self.version is not None:
            return public == self.version
        if self.least is None or self.below is None or not _PLAIN.fullmatch(public):
            return False
        return _release(self.least) <= _release(public.partition(".post")[0]) < _release(self.below)


def parse_lock(content: bytes, *, where: str = LOCK_FILE) -> dict[str, Locked]:
    """A lock's lines by name. Raises MalformedMessage for anything that is not the form above."""
    if len(content) > MAX_LOCK:
        raise MalformedMessage(f"it has more than {MAX_LOCK} bytes", where=where)
    try:
        lines = content.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedMessage("it is not ASCII", where=where) from error
    if lines.pop() != "":
        raise MalformedMessage("its last line has no end", where=where)
    found: dict[str, Locked] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise MalformedMessage(f"line {number} is no `NAME==VERSION  # imported`: {line[:80]!r}", where=where)
        tag, contents = match["tag"], match["contents"]
        why: Why = "imported" if match["why"] == "imported" else "needed"
        build = None if tag is None else Build(tag, contents)
        one = Locked(match["name"], match["version"], match["least"], match["below"], why, build)
        if found and one.name <= next(reversed(found)):
            raise MalformedMessage(f"line {number}: {one.name} is not after the line before", where=where)
        if one.build is not None and one.version is None:
            raise MalformedMessage(f"line {number}: a range names no wheel", where=where)
        found[one.name] = one
    if len(found) > MAX_LOCKED:
        raise MalformedMessage(f"it has more than {MAX_LOCKED} lines", where=where)
    return found


def own_lock(content: bytes | None) -> dict[str, Locked]:
    """An author's own lock, if there is one. Raises RecipeUnusable."""
    try:
        return {} if content is None else parse_lock(content)
    except MalformedMessage as error:
        raise RecipeUnusable(
            f"the recipe's own {LOCK_FILE} is malformed: {error.what}",
            where=LOCK_FILE,
            do="Correct it, or take it away: the bundle gets one for what is installed.",
        ) from error


def lock_text(lock: Iterable[Locked]) -> bytes:
    """The lock's file: the same for the same lines."""
    lines = [one.line for one in sorted(lock, key=lambda one: one.name)]
    return (_HEAD + "".join(f"{line}\n" for line in lines)).encode()


def make_lock(
    files: Mapping[str, bytes], settings: JobSettings, packages: Packages, kept: Mapping[str, Locked] | None = None
) -> bytes:
    """The lock of a bundle of these files, from what is installed where it is made.

    `kept`: an author's own lock, whose lines stay as far as the code has need of them. Raises RecipeUnusable where they
    do not hold here, and for an import that nothing here provides, unless its code may do without it.
    """
    kept = kept or {}
    imported: set[str] = set()
    for one in imports_of(files, settings.scripts, settings.filter_modules):
        if one.certain and one.module not in packages.providers:
            raise RecipeUnusable(
                f"{one.file}, line {one.line}, imports {one.module}, which is not in the bundle and not installed here",
                where=one.file,
                do="Make the bundle where the job's packages are installed, or import it under `try`.",
            )
        imported |= set(packages.providers.get(one.module, ()))
    lines: dict[str, Locked] = {}
    waiting = sorted(imported)
    while waiting:
        name = waiting.pop()
        if name not in lines:
            one_line = lines[name] = kept.get(name) or _exactly(name, packages)
            waiting += [] if one_line.version is None else sorted(packages.needs(name))
    lines = {name: replace(one, why="imported" if name in imported else "needed") for name, one in lines.items()}
    refuse_broken(lines, packages)
    return lock_text(lines.values())


def refuse_broken(lock: Mapping[str, Locked], packages: Packages) -> None:
    """Raises RecipeUnusable with what of an author's own lock does not hold here."""
    broken = tuple(broken_lines(lock, packages))
    if broken:
        raise RecipeUnusable(
            f"the recipe's own {LOCK_FILE} does not hold: {'; '.join(broken)}",
            where=LOCK_FILE,
            do=f"Install what it names, or take the line out of {LOCK_FILE}: it is made anew for what is installed.",
        )


def broken_lines(lock: Mapping[str, Locked], packages: Packages) -> Iterator[str]:
    """A sentence for each line that what is installed here does not hold."""
    for name, one in sorted(lock.items()):
        found = packages.versions.get(name)
        if found is None:
            if one.why == "imported":  # what that needs may differ from build to build
                yield f"the job's code wants {name}{one.wanted}, which is not installed here"
        elif not one.admits(found):
            yield f"the job's code wants {name}{one.wanted}; here is {found}"
        elif one.build is not None and found == one.version:
            here = packages.build(name)
            if here is not None and here.tag == one.build.tag and here.contents != one.build.contents:
                yield f"{name} {found} is here with other contents than the lock's ({here.contents[:16]}…)"


def lock_reasons(files: Mapping[str, bytes], settings: JobSettings, packages: Packages) -> Iterator[str]:
    """Why a bundle may not run with what is installed here, by its lock."""
    content = files.get(LOCK_FILE)
    if content is None:
        yield f"the bundle has no {LOCK_FILE}: make it anew (seal job bundle)"
        return
    try:
        lock = parse_lock(content)
    except MalformedMessage as error:
        yield f"the bundle's {LOCK_FILE} is malformed: {error.what}"
        return
    yield from broken_lines(lock, packages)
    for one in imports_of(files, settings.scripts, settings.filter_modules):
        for name in sorted(packages.providers.get(one.module, ())):
            if name not in lock or lock[name].why != "imported":
                yield f"{one.file}, line {one.line}, imports {one.module} of {name}, which the lock does not name"


def differences(new: Mapping[str, Locked], old: Mapping[str, Locked] | None) -> Iterator[str]:
    """What a reviewer sees of a lock: its lines, or how they differ from those of the version before."""
    if old is None:
        yield from (f"{name}{one.wanted} ({one.why})" for name, one in new.items())
        return
    for name in sorted(new.keys() | old.keys()):
        before, after = old.get(name), new.get(name)
        if before != after:
            yield f"{name}: {_shown(before)} → {_shown(after)}"


def _shown(one: Locked | None) -> str:
    if one is None:
        return "none"
    return f"{one.wanted} ({one.why}{'' if one.build is None else f', {one.build.tag} {one.build.contents[:16]}'})"


def _exactly(name: str, packages: Packages) -> Locked:
    version = packages.versions[name]
    public = _public(version)
    build = packages.build(name) if version == public else None
    return Locked(name, public, None, None, "imported", build)


def _public(version: str) -> str:
    return version.partition("+")[0]


def _release(version: str) -> tuple[int, ...]:
    """A release's numbers, without zeros at the end: 2.6 is 2.6.0 (PEP 440)."""
    numbers = [int(part) for part in version.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
