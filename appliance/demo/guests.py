"""Starting brokers and guests as processes, and reading what guests say on their consoles."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.demo.setting import PRODUCTS, SITES, Setting, vcpu_model
from appliance.kits.starting import DISKS
from appliance.processes import Processes
from policies.errors import Refused
from policies.kits import INIT_DATA, LOCAL

POLL_SECONDS: Final = 0.05
EVALUATOR: Final = "rego_worker.py"
"""What evaluates rules below broker and guests. They would replace a dead one; here its death ends all."""
START_SECONDS: Final = 40.0
"""How long a process may take until it is ready."""
BOOT_SECONDS: Final = 420.0
"""How long an emulated machine may take until its service is ready, beside others on the same cores."""


@dataclass(frozen=True)
class Start:
    """How a host starts a guest when it does not follow its kit: which image and init-data, with which guest policy.

    `id_block` False leaves out the image's ID block: the secure processor then starts whatever the host likes.
    """

    guest: str
    image: Path
    init_data: Path
    policy: int = 0x30000
    id_block: bool = True


def honest_start(setting: Setting, guest: str) -> Start:
    """What a guest's kit starts."""
    return Start(guest, setting.image, setting.guest_kit(guest) / INIT_DATA)


def start_guest(processes: Processes, setting: Setting, guest: str) -> None:
    """Start a guest from its kit; its console goes to the log of `guest`."""
    _start(processes, setting, guest, "vm", "launch", str(setting.guest_kit(guest)))


def start_broker(processes: Processes, setting: Setting, broker: str) -> None:
    """Start a broker from its kit."""
    _start(processes, setting, broker, "broker", "run", str(setting.broker_kit(broker)))


def start_otherwise(processes: Processes, setting: Setting, name: str, start: Start) -> None:
    """Start a guest as a hostile host does, past its kit; its console goes to the log of `name`."""
    words = ["vm", "launch", str(start.image), "--init-data", str(start.init_data), "--policy", hex(start.policy)]
    words += ["--vendor", str(setting.vendor(start.guest)), "--chip", str(setting.chip(start.guest))]
    words += ["--vcpu-model", vcpu_model(PRODUCTS[start.guest]), "--run", str(setting.folder / "attacks/run" / name)]
    words += [] if start.id_block else ["--no-id-block"]
    if start.guest in SITES:
        words += ["--disk", f"data={setting.guest_kit(start.guest) / LOCAL / DISKS / 'data'}"]
    _start(processes, setting, name, *words)


def _start(processes: Processes, setting: Setting, name: str, *words: str) -> None:
    setting.seal.note(["seal", *words])
    processes.start(name, [sys.executable, "-m", "appliance.cli", *words], lasting=EVALUATOR)


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
