"""The one place that runs another program: a bounded time, a fixed environment, and an error that shows the command."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cvm_image.errors import ToolFailed

PACKAGES: Mapping[str, str] = {"mkfs.erofs": "erofs-utils", "veritysetup": "cryptsetup-bin"}
"""Which Debian package holds a tool."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAST_LINES = 20


def run_tool(command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """Run `command` and return what it printed on standard output.

    Raises ToolFailed if the program is missing, fails, or takes longer than `seconds`.
    """
    program = shutil.which(command[0], path=_PATH)
    if program is None:
        package = PACKAGES.get(command[0], command[0])
        raise ToolFailed(f"{command[0]} is not installed", where="tools", do=f"Run `apt-get install {package}`.")
    shown = shlex.join(str(word) for word in command)
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=seconds,
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8", **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(
            f"{command[0]} took longer than {seconds:g} seconds", where=shown, do="Free the machine and try again."
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        raise ToolFailed(
            f"{command[0]} ended with status {done.returncode}: {' / '.join(said) or 'it said nothing'}",
            where=shown,
            do="Correct what it names.",
        )
    return done.stdout.decode("utf-8", "replace")


def clear_folder(folder: Path) -> None:
    """Remove a scratch folder and all in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
