"""The role of a guest whose workload is a container: run its command in its own root, and end as it ends.

The file lies in the guest as `contained`, so that a recipe names it by `entry = "contained"`; it uses the standard
library alone. The container's root is read-only; `/tmp`, `/run` and `/var/tmp` are memory. It has the guest's network,
which the recipe's packet filter bounds, and no capability. It gets no credential: the brokers give those to our roles.
What it writes goes to the serial console, which the host reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CONTAINER = Path("usr/lib/sealwright/container")
BUBBLEWRAP = "/usr/bin/bwrap"
MEMORY = ("/tmp", "/run", "/var/tmp")  # noqa: S108 - mount points in the container


def main(guest: Path) -> int:
    """Run the container that lies in `guest` (the root) and return its exit status."""
    folder = guest / CONTAINER
    start = json.loads((folder / "start.json").read_bytes())
    return os.waitstatus_to_exitcode(
        os.waitpid(os.posix_spawn(BUBBLEWRAP, command_of(folder / "root", start), {}), 0)[1]
    )


def command_of(root: Path, start: dict[str, Any]) -> list[str]:
    """The command line of bubblewrap for `start` (argv, env, cwd)."""
    line = ["bwrap", "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    line += ["--cap-drop", "ALL", "--clearenv", "--ro-bind", str(root), "/", "--dev", "/dev", "--proc", "/proc"]
    for place in MEMORY:
        line += ["--tmpfs", place]
    for word in start["env"]:
        name, _, value = word.partition("=")
        line += ["--setenv", name, value]
    return [*line, "--chdir", start["cwd"], "--", *start["argv"]]
