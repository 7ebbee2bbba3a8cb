"""Three hosts on one network: a network namespace each, joined by a bridge that stands in a fourth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SEAL = [sys.executable, "-m", "appliance.cli"]
ROOT = Path(__file__).resolve().parents[3]
_WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'


@dataclass(frozen=True)
class Host:
    """A host: its namespace, address, and folder. It reads `hosts` in the folder as its /etc/hosts."""

    name: str
    namespace: str
    address: str
    folder: Path

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        inside = ["sh", "-c", _WITH_HOSTS, str(self.folder / "hosts")]
        return ["ip", "netns", "exec", self.namespace, *inside, *words]

    def run(self, *words: str, status: int = 0) -> str:
        """Run a program here, in this host's folder, and return what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{self.name}: {' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def seal(self, *words: str, status: int = 0) -> str:
        """Run `seal` here."""
        return self.run(*SEAL, *words, status=status)


def why_not() -> str | None:
    """Why no such hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    name = f"seal-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def three_hosts(names: tuple[str, str, str], folder: Path) -> Iterator[list[Host]]:
    """Make the hosts, with 10.77.0.1 to 10.77.0.3 as their addresses; take everything down again."""
    mark = f"{os.getpid() % 100_000}"
    switch = f"seal-{mark}-switch"
    spaces = [f"seal-{mark}-{number}" for number in range(len(names))]
    made: list[str] = []
    try:
        for space in (switch, *spaces):
            _ip("netns", "add", space)
            made.append(space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        hosts = []
        for number, (name, space) in enumerate(zip(names, spaces, strict=True), 1):
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            _ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            own = folder / name
            own.mkdir()
            (own / "hosts").write_text("127.0.0.1 localhost\n")
            hosts.append(Host(name, space, f"10.77.0.{number}", own))
        yield hosts
    finally:
        for space in reversed(made):
            subprocess.run(["ip", "netns", "del", space], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
