"""The processes that a demonstration or a proof of concept starts, watched: when one dies, all end and it is named.

Each runs in a process group of its own, writes to a log of its own, and gets a signal from the kernel when its
parent dies, so that nothing is left behind even if the parent is killed outright.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from policies.errors import Refused

GRACE_SECONDS = 4.0
"""How long a process may take to end by itself before it is killed."""

SETTLE_SECONDS = 1.5
"""How long a process may take to end after a program below it did, if that was its own end."""

TAIL_LINES = 5


@dataclass(frozen=True)
class Watched:
    """One running process, its name in messages, and where it writes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lasting: str | None = None
    """A program that, wherever it runs below the process, is to live as long as the process itself. A service may
    replace such a helper when it dies, but in an undertaking that is watched its death is a sign."""
    seen: set[int] = field(default_factory=set)

    def lost(self) -> str | None:
        """Which lasting program has ended although the process itself lives."""
        if self.lasting is None:
            return None
        # What such a program starts itself bears its name until it becomes another program: it is not one of them.
        now = {
            pid
            for pid in _below(self.process.pid)
            if self.lasting in _command(pid) and self.lasting not in _command(_parent(pid))
        }
        # The kernel's lists of children may leave one out while others come and go: ask for each by its number.
        gone = sorted(pid for pid in self.seen - now if self.lasting not in _command(pid))
        self.seen.update(now)
        if not gone or self.process.poll() is not None:
            return None
        return f"{Path(self.lasting).stem}, process {gone[0]} of {self.name},"

    def last_words(self) -> str:
        """The last lines of its log, for a message about its end."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " / ".join(line.strip() for line in lines[-TAIL_LINES:])


class Processes:
    """The running processes of one undertaking. Safe to use from several threads."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, Watched] = {}
        self._lock = threading.Lock()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        lasting: str | None = None,
    ) -> Watched:
        """Start `argv` under `name`; its output goes to `<logs>/<name>.log`.

        `lasting` is a program that must not end below it before itself (`Watched.lasting`).
        The kernel sends SIGTERM to it when the *thread* that started it ends, so start from one that lives long enough.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self.log_of(name)
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        watched = Watched(name, process, log, lasting)
        with self._lock:
            self._running[name] = watched
        return watched

    def log_of(self, name: str) -> Path:
        """Where the process of this name writes, or wrote."""
        return self._logs / f"{name}.log"

    def dead(self, *, within: float = 0.0) -> Refused | None:
        """The sentence that names the first process found to have ended although nobody stopped it.

        Looked for during `within` seconds; None if all live.
        """
        deadline = time.monotonic() + within
        while True:
            with self._lock:
                for watched in self._running.values():
                    if watched.process.poll() is not None:
                        return _died(watched)
                    lost = watched.lost()
                    if lost is not None:
                        return _ended(lost, "ended", watched) if _outlives(watched) else _died(watched)
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def stop(self, name: str) -> None:
        """End one process and wait for it; does nothing if it is not running."""
        with self._lock:
            watched = self._running.pop(name, None)
        if watched is not None:
            _end([watched])

    def finish(self, name: str, *, within: float, what: str) -> int:
        """Wait until a process ends by itself and return its exit status. Raises Refused after `within` seconds."""
        with self._lock:
            watched = self._running.pop(name)
        try:
            return watched.process.wait(timeout=within)
        except subprocess.TimeoutExpired:
            _end([watched])
            raise Refused(
                f"{name} did not end within {within:.0f} s while {what}",
                where=str(watched.log),
                do="Read its log; then start again.",
            ) from None

    def stop_all(self) -> None:
        """End every process, the last started first, and wait for all of them."""
        with self._lock:
            remaining = list(reversed(self._running.values()))
            self._running.clear()
        _end(remaining)


def _outlives(watched: Watched) -> bool:
    """Whether a process goes on without the program that it lost; or else both are ending of one cause."""
    try:
        watched.process.wait(timeout=SETTLE_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _died(watched: Watched) -> Refused:
    """The sentence that names a process which ended in the middle."""
    status = watched.process.returncode
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return _ended(watched.name, how, watched)


def _ended(who: str, how: str, watched: Watched) -> Refused:
    words = watched.last_words()
    return Refused(
        f"{who} {how} in the middle, so everything was stopped",
        where=str(watched.log),
        do=f"The last words there: {words}" if words else "Nothing was written there.",
    )


def _below(parent: int) -> list[int]:
    """The processes below `parent`, each after its parent."""
    found = [parent]
    for pid in found:
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # it ended while it was looked at: the next look tells
                found += map(int, listed.read_text("ascii").split())
    return found[1:]


def _parent(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):  # it is gone
        return int(Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()[1])
    return 0


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _end(processes: Sequence[Watched]) -> None:
    for watched in processes:
        _signal(watched, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for watched in processes:
        try:
            watched.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(watched, signal.SIGKILL)
            watched.process.wait()
    for watched in processes:  # what a dead leader left in its group
        _signal(watched, signal.SIGKILL)


def _signal(watched: Watched, number: signal.Signals) -> None:
    try:
        os.killpg(watched.process.pid, number)
    except ProcessLookupError:
        return
