"""The one place where the build runs a command: bounded in time, logged, and quoted when it fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cvm_image.build.errors import BuildFailed, UnusableHost

TAIL_LINES = 12
_FIXED_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def run(
    argv: Sequence[str],
    *,
    what: str,
    log: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    quiet: bool = False,
) -> str:
    """Run `argv` to its end and return its standard output; standard error goes to `log`, and so does
    the output unless `quiet`.

    The environment is fixed but for `env`, so that no setting of the caller reaches what is built. Raises BuildFailed,
    showing the command and its last lines, if it fails or does not end within `timeout` seconds, and UnusableHost if
    there is no such program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**_FIXED_ENVIRONMENT, **(env or {})}
    with log.open("ab") as record:
        record.write(f"$ {shlex.join(argv)}\n".encode())
        record.flush()
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=record,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise UnusableHost(f"{argv[0]} is not installed", where=what, do="See `seal doctor`.") from None
        with process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                raise _failed(argv, what, f"did not end within {timeout:.0f} s", log) from None
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if not quiet or process.returncode != 0:
            record.write(output)
    if process.returncode != 0:
        raise _failed(argv, what, f"failed with exit status {process.returncode}", log)
    return output.decode(errors="replace")


def _failed(argv: Sequence[str], what: str, how: str, log: Path) -> BuildFailed:
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    command = shlex.join(argv)
    shown = command if len(command) <= 400 else command[:400] + " …"
    return BuildFailed(
        f"{what} {how}",
        where=str(log),
        do="Read the log; the command and its last lines are below.",
        reasons=(f"command: {shown}", *lines),
    )
