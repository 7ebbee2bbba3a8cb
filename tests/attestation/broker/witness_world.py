"""Witnesses as processes of their own beside the brokers of a test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attestation.witness.config import create_witness
from policies.charter import write_store
from policies.charter.making import Changes
from policies.documents import Consortium, Witness

REPOSITORY = Path(__file__).parents[3]


@dataclass
class WitnessProcess:
    """A witness that stands alone."""

    folder: Path
    entry: Witness
    process: subprocess.Popen[str] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def start(self) -> WitnessProcess:
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "appliance.cli", "audit", "witness", str(self.folder / "witness.toml")],
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        )
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()
        self.wait_for("ready")
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr or ():
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line.rstrip()})

    def wait_for(self, event: str, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if line.get("event") == event:
                    return line
            if self.process is None or self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the witness did not say {event!r}: {self.lines[-5:]}")

    def send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        if self.reader is not None:
            self.reader.join(timeout=15)
        if self.process.stderr:
            self.process.stderr.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def add_witnesses(world: Any, members: Sequence[str], threshold: int) -> list[WitnessProcess]:
    """Make a witness for each of `members` (w1, w2, …), put them into the charter and start them."""
    at = datetime.now(UTC).replace(microsecond=0)
    found = []
    for number, member in enumerate(members, 1):
        folder, listen = world.folder / f"w{number}", f"127.0.0.1:{free_port()}"
        entry = create_witness(folder, name=f"w{number}", member=member, url=f"https://{listen}", listen=listen, at=at)
        found.append(WitnessProcess(folder, entry))
    demand(world, threshold, [one.entry for one in found])
    for one in found:
        (one.folder / "root.json").write_bytes(world.root)
        write_store(one.folder / "charter", world.store)
        one.start()
    return found


def demand(world: Any, threshold: int, witnesses: Sequence[Witness]) -> None:
    """Have the members decide who witnesses, and how many must cosign."""
    old: Consortium = world.charter().consortium
    new = Consortium(**{**dict(old), "witnesses": tuple(witnesses), "witness_threshold": threshold})
    world.change(Changes(consortium=new))
