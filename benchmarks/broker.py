"""Whole flows a second of a real broker: session, attestation, release, with 64 guests at a time over fresh TLS.

A flow makes three signed calls on one new TLS 1.3 connection; the broker is a process of its own with SQLite, the
guests are threads of this process on one virtual chip. Beside it, in the same run and under the same guests, a broker
with nothing but HTTPS and a flow's cryptography left in (benchmarks.bare_broker). Short batches of both alternate, so
that both meet the same neighbours on the machine; the share is the median of the pairs' shares. Guests and brokers
share the cores, so that the guests' own work is in both figures; the processor time that each broker's process took
for a flow is told beside them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from attestation.evidence.report import Product
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import create_vendor
from benchmarks.trials import ROOT, load_trial, tell


def measure(*, guests: int = 64, flows: int = 128, batches: int = 15) -> dict[str, float]:
    """Flows a second of the broker and of the bare one, and what their processes took for it."""
    trial = load_trial("attestation/broker/conftest.py", "broker_trial")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("broker: founding a consortium")
        vendor = create_vendor(folder / "vendor")
        chips = {Product.MILAN: create_chip(vendor, folder / "chip", Product.MILAN)}
        rules = trial.release_rules("site", "north", most=guests + flows * batches)
        more = {"members/borealis-hospital/release/key.data.rego": rules}
        world = trial.found_world(folder / "world", vendor, chips, ("one",), more=more)
        with (folder / "world/one/broker.toml").open("a") as settings:
            settings.write("\n[limits]\nclient_rate = 100000.0\nclient_burst = 100000\n")
        world.charter = cache(world.charter)  # a guest's host needs no new charter for every flow
        running = trial.start_broker(folder / "world/one", world.entries[0])
        try:
            trial.deposit_all(world, running.entry)
            return _compare(trial, world, running, folder, guests, flows, batches)
        finally:
            running.stop()


def _compare(
    trial: Any, world: Any, running: Any, folder: Path, guests: int, flows: int, batches: int
) -> dict[str, float]:
    def flow(entry: Any) -> None:
        attester = world.attester("site", "north")
        guest = trial.RawGuest(world, entry, attester, world.init_data["site/north"])
        try:
            guest.open().attest()
            guest.post("/v1/release", json.dumps({"job": None, "resource": trial.SITE_KEY}).encode())
        finally:
            guest.client.close()

    command = [sys.executable, "-m", "benchmarks.bare_broker", str(folder / "world/one")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline())
            bare = running.entry.model_copy(update={"url": f"https://127.0.0.1:{port}"})
            sides = {"whole": (running.entry, running.process.pid), "bare": (bare, service.pid)}
            rates: dict[str, list[float]] = {name: [] for name in sides}
            spent: dict[str, list[float]] = {name: [] for name in sides}
            with ThreadPoolExecutor(guests) as pool:
                for entry, _ in sides.values():
                    list(pool.map(flow, [entry] * guests))  # caches warm, database pages there
                for batch in range(batches):
                    tell(f"broker: batch {batch + 1} of {batches}")
                    for name, (entry, process) in sides.items():
                        before, start = _processor_seconds(process), time.perf_counter()
                        list(pool.map(flow, [entry] * flows))
                        rates[name].append(flows / (time.perf_counter() - start))
                        spent[name].append((_processor_seconds(process) - before) / flows)
        finally:
            service.terminate()
    found, limit = statistics.median(rates["whole"]), statistics.median(rates["bare"])
    return {
        "flows_per_second": found,
        "bare_flows_per_second": limit,
        "share": statistics.median(one / other for one, other in zip(rates["whole"], rates["bare"], strict=True)),
        "broker_processor_milliseconds_per_flow": 1000 * statistics.median(spent["whole"]),
        "bare_processor_milliseconds_per_flow": 1000 * statistics.median(spent["bare"]),
    }


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
