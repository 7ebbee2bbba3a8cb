"""A running sandbox, from outside: one thread that starts it, keeps its log, holds it to its time, and sees it dead."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

from fl.errors import SandboxFailed
from fl.guard.control_groups import ControlGroup
from fl.guard.kept_output import KeptOutput
from fl.guard.limits import Limits

Kind = Literal["finished", "failed", "signal", "memory", "time", "killed"]

DEATH_SECONDS: Final = 20.0
"""How long the kernel may take to clear a killed sandbox away."""
MAX_REPORT: Final = 4096


@dataclass(frozen=True)
class Outcome:
    """How a sandboxed script ended."""

    kind: Kind
    """finished: status 0; failed: another status; signal: a fault; memory, time: a limit; killed: by `kill()`."""
    exit_status: int
    """What the script exited with; 128 + n for an end by signal n."""
    seconds: float
    """From the script's start to its end."""
    log: bytes
    """Head and end of standard output and error, as they came; at most `Limits.log_bytes`. For the site alone."""
    log_truncated: bool

    @property
    def sentence(self) -> str:
        """What became of it, to follow a name: "ended with status 3", "used more memory than its limit"."""
        if self.kind == "finished":
            return "finished"
        if self.kind == "memory":
            return "used more memory than its limit and was ended"
        if self.kind == "time":
            return "used more time than its limit and was ended"
        if self.kind == "killed":
            return "was ended by its site"
        if self.kind == "signal":
            return f"was ended by {_signal_name(self.exit_status - 128)}"
        return f"ended with status {self.exit_status}"


@dataclass(frozen=True)
class Start:
    """What it takes to start one."""

    command: Callable[[int, int], list[str]]
    """The launcher's command line, given the numbers of the report and the info descriptors."""
    passed: tuple[int, ...]
    """Descriptors of ours that the launcher gets under the same numbers; `owned` ones are closed once it has them."""
    owned: tuple[int, ...]
    group: ControlGroup | None
    limits: Limits


class SandboxedProcess:
    """A running sandbox. A context manager: leaving it kills what still runs and waits for the end."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._log = KeptOutput(start.limits.log_bytes)
        self._report = bytearray()
        self._info = bytearray()
        self._inner: int | None = None
        self._cause: Literal["killed", "time", "start"] | None = None
        self._outcome: Outcome | None = None
        self._error: OSError | None = None
        self._begun_at: float | None = None
        self._settled = threading.Event()  # begun, or ended without
        self._ended = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A thread of its own that lives as long as the sandbox: the parent-death signal follows the starting thread.
        self._thread = threading.Thread(target=self._supervise, name="sandbox", daemon=True)
        self._thread.start()

    def await_beginning(self) -> None:
        """Return when the script is about to run; raises SandboxFailed, with bubblewrap's words, if it never did."""
        seconds = self._start.limits.start_seconds
        self._settled.wait(seconds + 2 * DEATH_SECONDS)
        if self._begun_at is not None:
            return
        self.kill()
        self._thread.join(DEATH_SECONDS)
        if self._cause == "start":
            raise SandboxFailed(f"the sandbox did not come up within {seconds:g} s")
        words = bytes(self._log).decode(errors="replace").strip().splitlines()
        raise SandboxFailed(f"the sandbox did not come up: {words[-1] if words else self._error or 'no reason given'}")

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Its outcome once everything in it is dead; None if it still runs after `timeout` seconds."""
        self._ended.wait(timeout)
        return self._outcome

    def kill(self) -> None:
        """End everything in it at once. Returns immediately; `wait` tells when it is over. May be called again."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def outcome(self) -> Outcome | None:
        """Its outcome if it has ended, else None."""
        return self._outcome

    def log(self) -> tuple[bytes, bool]:
        """Head and end of what it has written so far, and whether something between them was thrown away."""
        with self._lock:
            return bytes(self._log), self._log.truncated

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._ended.wait(2 * DEATH_SECONDS)

    def _supervise(self) -> None:
        log, log_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        report, report_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        info, info_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for descriptor in (log_end, report_end, info_end):
            os.set_blocking(descriptor, True)
        began = time.monotonic()
        status = 1
        try:
            try:
                process = subprocess.Popen(
                    self._start.command(report_end, info_end),
                    stdin=subprocess.DEVNULL,
                    stdout=log_end,
                    stderr=log_end,
                    pass_fds=(*self._start.passed, report_end, info_end),
                    env={},
                    cwd="/",
                )
            finally:
                for descriptor in (*self._start.owned, log_end, report_end, info_end):
                    os.close(descriptor)
            with process:
                self._watch(process, log, report, info, began + self._start.limits.start_seconds)
                status = process.wait()
        except OSError as error:
            self._error = error
        finally:
            for descriptor in (log, report, info):
                os.close(descriptor)
            if self._inner is not None:
                os.close(self._inner)
            with self._lock:
                os.close(self._wake)
                self._wake = -1
            self._conclude(status)

    def _watch(self, process: subprocess.Popen[bytes], log: int, report: int, info: int, deadline: float) -> None:
        """Serve its pipes until all of it is dead."""
        outer = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for descriptor in (log, report, info, outer, self._wake):
                    selector.register(descriptor, selectors.EVENT_READ)
                while True:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        if self._cause is not None:
                            raise OSError(f"a killed sandbox was still there after {DEATH_SECONDS:g} s")
                        self._cause = "time" if self._begun_at is not None else "start"
                        deadline = self._end(process)
                        continue
                    ready = {key.fd for key, _ in selector.select(left)}
                    if self._wake in ready and self._cause is None:
                        self._cause = "killed"
                        deadline = self._end(process)
                    if self._wake in ready:
                        os.eventfd_read(self._wake)
                    for descriptor, take in (
                        (log, self._take_log),
                        (report, self._take_report),
                        (info, self._take_info),
                    ):
                        if descriptor in ready and take(descriptor) is False:
                            selector.unregister(descriptor)
                    if self._begun_at is not None and self._cause is None:
                        deadline = self._begun_at + self._start.limits.wall_seconds
                    if outer in ready:
                        break
            self._take_info(info)
            if self._inner is not None:
                # Its process 1 is gone only when the kernel has ended every other process of the namespace.
                _kill(self._inner)
                _await_end(self._inner)
            while self._take_log(log):
                continue
            while self._take_report(report):
                continue
        finally:
            os.close(outer)

    def _end(self, process: subprocess.Popen[bytes]) -> float:
        """Kill it; when it has to be gone."""
        if self._inner is not None:
            _kill(self._inner)
        process.kill()
        return time.monotonic() + DEATH_SECONDS

    def _take_log(self, descriptor: int) -> bool | None:
        """Keep head and end of what it writes and throw the rest away, so that it never waits for a reader.

        Whether more may come; None if there is nothing now.
        """
        try:
            piece = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None
        with self._lock:
            self._log.take(piece)
        return bool(piece)

    def _take_report(self, descriptor: int) -> bool | None:
        try:
            piece = os.read(descriptor, MAX_REPORT)
        except BlockingIOError:
            return None
        if len(self._report) + len(piece) <= MAX_REPORT:
            self._report += piece
        if self._begun_at is None and self._report.startswith(b"R"):
            self._begun_at = time.monotonic()
            self._settled.set()
        return bool(piece)

    def _take_info(self, descriptor: int) -> bool | None:
        """Learn from bubblewrap which process is process 1 inside."""
        try:
            piece = os.read(descriptor, MAX_REPORT)
        except BlockingIOError:
            return None
        self._info += piece
        if self._inner is None and self._info.endswith(b"}\n"):
            try:
                self._inner = os.pidfd_open(json.loads(self._info)["child-pid"])
            except ProcessLookupError:
                return bool(piece)  # it has ended already
        return bool(piece)

    def _conclude(self, status: int) -> None:
        """Say how it ended, and leave nothing behind."""
        now = time.monotonic()
        starved = False
        try:
            if self._start.group is not None:
                starved = self._start.group.killed_for_memory()
                self._start.group.remove()
        except OSError as error:
            self._error = error
        finally:
            kind, status = self._judge(128 - status if status < 0 else status, starved)
            self._outcome = Outcome(kind, status, now - (self._begun_at or now), bytes(self._log), self._log.truncated)
            self._ended.set()
            self._settled.set()

    def _judge(self, status: int, starved: bool) -> tuple[Kind, int]:
        """What the report, the limits and our own hand say together."""
        ended = self._report.removeprefix(b"R")
        number = int(ended[1:]) if ended[1:].isdigit() else 0
        if ended == b"E0":
            return "finished", 0
        if starved:
            return "memory", status
        if ended.startswith(b"S"):
            return ("time" if number == signal.SIGXCPU else "signal"), 128 + number
        if ended.startswith(b"E"):
            return "failed", number
        # Process 1 did not live to tell: somebody ended it from outside.
        if self._cause in ("killed", "time"):
            return self._cause, status
        return ("signal" if status > 128 else "failed"), status or 1


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(DEATH_SECONDS * 1000):
        raise OSError(f"a killed sandbox was still there after {DEATH_SECONDS:g} s")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
