"""The processes of simulated clients, from their parent's side."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fl.environments import fork_server
from fl.environments.forking import forget_author, may_be_forked
from fl.errors import ScriptFailed
from fl.site.script import ScriptSession
from fl.transport.local import ScriptSocket

REPORT_SECONDS: Final = 5.0
"""How long an exit may take to be reported after the script's socket closed."""
LOG_TAIL: Final = 4096


class _Fork:
    """A fork of this process that is a fork server; it has of `subprocess.Popen` what is needed here."""

    def __init__(
        self, ours: socket.socket, theirs: socket.socket, preload: list[str], variables: Mapping[str, str]
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any fork beside threads; OpenBLAS's take care of forks themselves.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        self._status: int | None = None
        if self._pid == 0:
            status = 1
            try:
                ours.close()
                os.environ.update(variables)
                forget_author()
                fork_server.serve(theirs, preload)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.0005
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork server", timeout or 0)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return status

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)


class ClientProcesses:
    """A fork server and the clients that it started. Leaving the context ends them all."""

    def __init__(self, preload: Sequence[str], *, threads: int) -> None:
        """`preload` are modules to import before forking; each client computes with `threads` threads."""
        self._threads = threads
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        count = str(threads)
        variables = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        self._process: subprocess.Popen[bytes] | _Fork
        if may_be_forked(list(preload)):
            self._process = _Fork(self._control, theirs, list(preload), variables)
        else:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fl.environments.fork_server", str(theirs.fileno()), *preload],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
            )
        theirs.close()
        self._logs: dict[str, Path] = {}
        self._exits: dict[str, int] = {}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read_exits, name="clients' exits", daemon=True)
        self._reader.start()

    def start(
        self,
        name: str,
        *,
        folder: Path,
        script: str,
        arguments: Sequence[str],
        work: Path,
        environment: Mapping[str, str] | None = None,
        log_config: Mapping[str, Any] | None = None,
    ) -> socket.socket:
        """Start a client; the site's end of its script socket.

        `environment` is added to this process's own; `log_config` is given to `logging.config.dictConfig`.
        """
        log = work / "log.txt"
        ours, theirs = ScriptSocket.pair()
        request = {
            "name": name,
            "folder": str(folder),
            "script": script,
            "args": list(arguments),
            "work": str(work),
            "log": str(log),
            "threads": self._threads,
            "environment": dict(environment or {}),
            "log_config": log_config,
        }
        try:
            rights = array.array("i", [theirs.fileno()])
            self._control.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError as error:
            ours.close()
            raise ScriptFailed(name, "could not be started: the process that forks clients has ended") from error
        finally:
            theirs.close()
        self._logs[name] = log
        return ours

    def session(self, name: str, **client: Any) -> ScriptSession:
        """Start a client, by `start`'s arguments; the conversation with its script."""
        sock = self.start(name, **client)
        return ScriptSession(sock, site=name, how_it_ended=lambda: self.how_it_ended(name))

    def how_it_ended(self, name: str) -> str:
        """What became of a client whose socket has closed, with its last words."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._exits or self._process.poll() is not None, REPORT_SECONDS)
            status = self._exits.get(name)
        if status is None:
            return "closed its connection to the job before the job was over"
        if status == 0:
            return "ended before the job was over"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        log = self._logs[name]
        last = _last_line(log)
        return f"{how}: {last} (log: {log})" if last else f"{how} (log: {log})"

    def wait_for_exits(self, seconds: float) -> None:
        """Wait until every client has ended, and after `seconds` end those that have not."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(
                lambda: self._logs.keys() <= self._exits.keys() or self._process.poll() is not None,
                max(0.0, deadline - time.monotonic()),
            )

    def _read_exits(self) -> None:
        while True:
            try:
                raw = self._control.recv(1 << 16)
            except OSError:
                raw = b""
            with self._changed:
                if raw:
                    report = json.loads(raw)
                    self._exits[report["name"]] = report["status"]
                self._changed.notify_all()
            if not raw:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.shutdown(socket.SHUT_RDWR)  # the fork server ends its clients, then itself
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._control.close()


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""
