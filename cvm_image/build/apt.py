"""Debian's archives, without touching the host's own apt: resolve packages to exact files, and fetch those files.

Mirrors, proxies and the keyring are the host's unless the recipe names others. Everything apt writes lies in a folder
of its own (`Dir::State`, `Dir::Cache`, `Dir::Etc`), so that other suites than the host's can be asked. What apt says is
trusted only in `seal image lock`, where it has checked the archive's signature; a build checks digests.
"""

from __future__ import annotations

import email.utils
import re
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.commands import run
from cvm_image.build.errors import MissingInput, UnusableHost, UnusableRecipe
from cvm_image.build.lock import LockedPackage
from cvm_image.build.recipe import HOST
from cvm_image.build.store import Store, link_or_copy

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_HELPER = "/usr/lib/apt/apt-helper"
_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$")
_BATCH = 40


@dataclass(frozen=True)
class Archives:
    """Where the archives are: base URL by name (`debian`, `debian-security`), and the keyring that signs them."""

    urls: Mapping[str, str]
    keyring: Path


def find_archives(mirrors: Mapping[str, str], keyring: str, *, log: Path) -> Archives:
    """Resolve a recipe's mirrors; `host` means the one that this host's apt has for that archive.

    Raises UnusableHost if the host's apt names none, and UnusableRecipe for a mirror that is no http(s) or file URL.
    """
    known = _host_mirrors(log) if HOST in mirrors.values() else {}
    urls: dict[str, str] = {}
    for archive, mirror in mirrors.items():
        if mirror == HOST and archive not in known:
            raise UnusableHost(
                f"this host's apt knows no mirror of {archive}",
                where="apt sources",
                do=f'Name one in the recipe: [mirrors] {archive} = "URL".',
            )
        url = known[archive] if mirror == HOST else mirror
        if urllib.parse.urlsplit(url).scheme not in {"http", "https", "file"}:
            raise UnusableRecipe(f"{url!r} is no mirror's URL", where=f"mirrors.{archive}", do="Give an http(s) URL.")
        urls[archive] = url.rstrip("/") + "/"
    ring = KEYRING if keyring == HOST else Path(keyring)
    if not ring.is_file():
        raise UnusableHost("the archive's keyring is missing", where=str(ring), do="Install debian-archive-keyring.")
    return Archives(urls, ring)


def _host_mirrors(log: Path) -> dict[str, str]:
    listing = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], what="asking apt for its mirrors", log=log, timeout=60
    )
    found: dict[str, str] = {}
    for url in sorted(set(listing.split())):
        archive = urllib.parse.urlsplit(url).path.rstrip("/").rpartition("/")[2]
        if archive in {"debian", "debian-security"}:
            found.setdefault(archive, url)
    return found


class Apt:
    """apt for one suite, in a folder of its own."""

    def __init__(
        self, folder: Path, archives: Archives, suite: str, *, log: Path, components: Sequence[str] = ("main",)
    ) -> None:
        self._archives = archives
        self._log = log
        self._config = folder / "apt.conf"
        self._folder = folder
        for part in ("state/lists/partial", "cache/archives/partial", "parts"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").write_text("")
        lines = []
        for archive, url in archives.urls.items():
            named = f"{suite}-security" if archive == "debian-security" else suite
            lines.append(f"deb [signed-by={archives.keyring} arch=amd64] {url} {named} {' '.join(components)}")
        (folder / "sources.list").write_text("\n".join(lines) + "\n")
        self._config.write_text(_configuration(folder, _host_transport(log)))

    def _run(self, argv: Sequence[str], what: str, timeout: float) -> str:
        return run(argv, what=what, log=self._log, timeout=timeout, env={"APT_CONFIG": str(self._config)})

    def update(self) -> int:
        """Fetch the lists and let apt check their signatures. Return the newest release's time (seconds)."""
        self._run(["apt-get", "-qq", "update"], "fetching the package lists", 300)
        times = [0]
        for release in (self._folder / "state/lists").glob("*_InRelease"):
            dated = re.search(r"^Date: (.+)$", release.read_text(errors="replace"), re.MULTILINE)
            if dated:
                times.append(int(email.utils.parsedate_to_datetime(dated.group(1)).timestamp()))
        return max(times)

    def resolve(self, wanted: Sequence[str]) -> list[LockedPackage]:
        """Every package that an empty system needs for `wanted` (names, or apt patterns), without recommendations."""
        listing = self._run(
            ["apt-get", "-qq", "-y", "-o", "Acquire::ForceHash=SHA256", "--print-uris", "install", *wanted],
            "resolving packages",
            120,
        )
        return self._locked(listing)

    def resolve_alone(self, package: str) -> list[LockedPackage]:
        """That package by itself, without what it depends on."""
        listing = self._run(
            ["apt-get", "-qq", "-o", "Acquire::ForceHash=SHA256", "--print-uris", "download", package],
            f"resolving {package}",
            120,
        )
        return self._locked(listing)

    def dependency(self, package: str, pattern: str) -> str:
        """The first package that `package` depends on whose name matches: a kernel's meta-package to its kernel."""
        listing = self._run(["apt-cache", "depends", "--important", package], f"asking what {package} needs", 60)
        for line in listing.splitlines():
            name = line.strip().removeprefix("Depends: ")
            if line.strip().startswith("Depends: ") and re.fullmatch(pattern, name):
                return name
        raise UnusableRecipe(
            f"{package} depends on nothing like {pattern}", where="kernel.package", do="Name a kernel's meta-package."
        )

    def _locked(self, listing: str) -> list[LockedPackage]:
        locked = []
        for line in listing.splitlines():
            match = _LINE.match(line)
            if match is None:
                continue
            archive, path = self._place(match["uri"])
            name, version, rest = urllib.parse.unquote(match["file"]).removesuffix(".deb").split("_")
            locked.append(
                LockedPackage(
                    name=name,
                    version=version,
                    architecture="all" if rest == "all" else "amd64",
                    archive=archive,
                    path=path,
                    size=int(match["size"]),
                    sha256=match["sha256"],
                )
            )
        return sorted(locked, key=lambda one: (one.name, one.version))

    def _place(self, uri: str) -> tuple[str, str]:
        for archive, url in self._archives.urls.items():
            if uri.startswith(url):
                return archive, uri.removeprefix(url)
        raise UnusableHost(f"apt names a file of no mirror asked for: {uri}", where="apt", do="Check the mirrors.")


def fetch_packages(
    packages: Sequence[LockedPackage], store: Store, archives: Archives | None, *, folder: Path, log: Path
) -> None:
    """Have every package in the store, fetching what is missing and checking each digest.

    `archives` None means offline: nothing is fetched. Raises MissingInput for what cannot be had.
    """
    missing = [one for one in {one.sha256: one for one in packages}.values() if not store.holds(one.sha256)]
    if not missing:
        return
    if archives is None:
        raise MissingInput(
            f"{len(missing)} packages are not in the cache, {missing[0].name} {missing[0].version} among them",
            where=str(store.root),
            do="Build once without --offline, or give the lock's archive with --archive.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "fetch.conf"
    config.write_text(_configuration(folder, _host_transport(log)))
    landing = folder / "landing"
    landing.mkdir(exist_ok=True)
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        triples: list[str] = []
        for one in batch:
            if one.archive not in archives.urls:
                raise MissingInput(
                    f"the lock takes {one.name} from {one.archive}, of which the recipe names no mirror",
                    where="mirrors",
                    do="Name it in the recipe.",
                )
            triples += [archives.urls[one.archive] + one.path, str(landing / one.sha256), f"SHA256:{one.sha256}"]
        run(
            [_HELPER, "download-file", *triples],
            what=f"fetching {len(batch)} packages ({sum(one.size for one in batch) / 1e6:.0f} MB)",
            log=log,
            timeout=1200,
            env={"APT_CONFIG": str(config)},
        )
        for one in batch:
            take_input(store, landing / one.sha256, one.sha256, f"{one.name} {one.version}")
    shutil.rmtree(landing)


def take_input(store: Store, file: Path, sha256: str, what: str) -> None:
    """Move `file` into the store under its digest. Raises MissingInput if it is another's, or not there."""
    target = store.input(sha256)
    partial = target.with_name(f"{sha256}.partial")
    if file.is_file():
        partial.unlink(missing_ok=True)
        link_or_copy(file, partial)
        partial.rename(target)
        file.unlink()
    if not store.holds(sha256):
        raise MissingInput(
            f"{what} is not what the lock says it is", where=str(file), do="Renew the lock, or the mirror."
        )


def _host_transport(log: Path) -> str:
    """The host's settings of how to reach mirrors and how old their word may be, as apt configuration; no others.

    A host with a frozen mirror has said so to its apt (`Check-Valid-Until`); signatures are checked anyway.
    """
    settings = ""
    for tree in ("Acquire::http", "Acquire::https", "Acquire::Check-Valid-Until", "Acquire::Check-Date"):
        settings += run(["apt-config", "dump", tree], what="asking apt for its proxies", log=log, timeout=60)
    return "".join(line + "\n" for line in settings.splitlines() if "::" in line and '""' not in line)


def _configuration(folder: Path, transport: str) -> str:
    return f"""Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "{folder}/parts";
Dir::Etc::main "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
{transport}"""
