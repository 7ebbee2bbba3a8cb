"""Starting brokers and guests as processes, and reading what guests say on their consoles."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance.demo.setting import (
    BOOTED_SERVER_PORT,
    BROKER,
    PRODUCTS,
    SERVER,
    SITES,
    Setting,
    vcpu_model,
)
from appliance.processes import Processes
from policies.errors import Refused

POLL_SECONDS: Final = 0.05
EVALUATOR: Final = "rego_worker.py"
"""What evaluates rules below broker and guests. They would replace a dead one; here its death ends all."""
START_SECONDS: Final = 40.0
"""How long a process may take until it is ready."""
BOOT_SECONDS: Final = 420.0
"""How long an emulated machine may take until its service is ready, beside others on the same cores."""


@dataclass(frozen=True)
class Start:
    """How a host starts a guest: on whose chip, from which image and init-data, with which guest policy.

    `id_block` False leaves out the image's ID block: the secure processor then starts whatever the host likes.
    """

    chip: str
    image: Path
    init_data: Path
    policy: int = 0x30000
    id_block: bool = True
    disks: Mapping[str, Path] = field(default_factory=dict)


def honest_start(setting: Setting, guest: str) -> Start:
    """The start that the charter foresees for a guest."""
    disks = {"data": setting.sealed_data(guest)} if guest in SITES else {}
    return Start(guest, setting.image, setting.init_data(guest), disks=disks)


def start_guest(processes: Processes, setting: Setting, name: str, start: Start) -> None:
    """Start a guest by its virtual platform, as a process or booted; its console goes to the log of `name`."""
    if setting.booted is None:
        argv = [sys.executable, "-m", "attestation.virtual", "--image", str(start.image)]
    else:
        argv = [sys.executable, "-m", "appliance.cli", "vm", "boot", str(start.image), "--vcpus", "1"]
        argv += ["--forward", f"{BOOTED_SERVER_PORT}:{BOOTED_SERVER_PORT}"] if name == SERVER else []
    argv += ["--vendor", str(setting.vendor.folder), "--chip", str(setting.chip_folder(start.chip))]
    argv += ["--init-data", str(start.init_data), "--policy", hex(start.policy)]
    argv += ["--vcpu-model", vcpu_model(PRODUCTS[start.chip]), "--run", str(setting.folder / "run" / name)]
    argv += [] if start.id_block else ["--no-id-block"]
    for disk, path in start.disks.items():
        argv += ["--disk", f"{disk}={path}"]
    processes.start(name, argv, lasting=EVALUATOR)


def start_broker(processes: Processes, setting: Setting) -> None:
    """Start the broker's process."""
    config = setting.folder / "broker/broker.toml"
    processes.start(BROKER, [sys.executable, "-m", "attestation.broker", str(config)], lasting=EVALUATOR)


def console(log: Path) -> Iterator[dict[str, Any]]:
    """What a guest has said so far: its JSON lines."""
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if line.startswith("{") and line.endswith("}"):
            yield json.loads(line)


def wait_for_event(log: Path, event: str, *, within: float = START_SECONDS) -> dict[str, Any]:
    """The first console line with this `event`. Raises Refused when a refusal comes first, or nothing in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        for line in console(log):
            if line.get("event") == event:
                return line
            if line.get("event") in {"refused", "unusable"}:
                raise Refused(
                    f"{log.stem} was refused: {line.get('what')}",
                    where=str(log),
                    do=str(line.get("do", "")),
                    reasons=tuple(line.get("reasons", ())),
                )
        time.sleep(POLL_SECONDS)
    raise Refused(
        f"{log.stem} was not ready within {within:.0f} s (waited for its word `{event}`)",
        where=str(log),
        do="Read its log; then start again.",
    )


def last_refusal(log: Path) -> tuple[str, ...]:
    """Every reason that a guest which was refused gave on its console."""
    for line in console(log):
        if line.get("event") in {"refused", "unusable"}:
            return tuple(line.get("reasons") or (str(line.get("what")),))
    return ()
