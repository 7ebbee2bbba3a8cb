"""The tools tree: a Debian root that holds every program of the build, so that the host's versions do not matter.

EROFS images made by two versions of mkfs.erofs differ, and so do the trees that two versions of dpkg lay out. The tree
is made from locked packages and entered by bubblewrap: read-only, without network, with what a command may see named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.commands import run
from cvm_image.build.errors import UnusableHost

PACKAGES = (
    "apt",
    "busybox-static",
    "cryptsetup-bin",
    "dmsetup",
    "erofs-utils",
    "kmod",
    "mount",
    "mmdebstrap",
    "qemu-system-x86",
    "zstd",
)
"""What the tree is made of, besides Debian's essential packages."""


@dataclass(frozen=True)
class Mount:
    """A path of the host that a command sees at `target` (below /build). Devices in it work only if it is writable."""

    source: Path
    target: str
    writable: bool = False


class Tools:
    """The tools tree at `tree`; `log` takes what its commands print."""

    def __init__(self, tree: Path, log: Path) -> None:
        self.tree = tree
        self.log = log

    def command(self, argv: Sequence[str], mounts: Iterable[Mount] = (), *, network: bool = False) -> list[str]:
        """Return the command line that runs `argv` in the tree with these mounts."""
        line = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
        if not network:
            line.append("--unshare-net")
        if os.geteuid() != 0:
            line += ["--unshare-user", "--uid", "0", "--gid", "0"]
        line += ["--ro-bind", str(self.tree), "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]  # noqa: S108
        line += ["--tmpfs", "/build", "--tmpfs", "/run"]
        for mount in mounts:
            line += ["--dev-bind" if mount.writable else "--ro-bind", str(mount.source), mount.target]
        return [*line, "--chdir", "/build", "--", *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        what: str,
        mounts: Iterable[Mount] = (),
        timeout: float = 600,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run `argv` in the tree and return its standard output. Raises BuildFailed."""
        return run(self.command(argv, mounts), what=what, log=self.log, timeout=timeout, env=env)


def need_root() -> None:
    """Raise UnusableHost unless this process may make files of other owners and mount: laying out a root needs both."""
    if os.geteuid() != 0:
        raise UnusableHost(
            "laying out a root file system needs root",
            where="this user",
            do="Run it as root, or in a container as root.",
        )
