"""The broker's memory over 100,000 sessions: what sessions cost ends with them."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

OPENED = json.dumps({"version": "0.4.0", "tee": "snp", "extra-params": {}}).encode()
GOALS = {10_000: 8, 100_000: 100}
"""After how many sessions memory is looked at, and up to there one in how many is a whole flow, with attestation and
release: the first have enough of them to fill what the broker keeps of a thousand guests."""
THREADS = 8
PER_CONNECTION = 250


@pytest.fixture
def patient(tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, tools: Any) -> Iterator[tuple[Any, Any]]:
    """A broker that forgets sessions after ten seconds and bounds no client, with an owner who releases often."""
    rules = {"members/borealis-hospital/release/key.data.rego": tools.release_rules("site", "north", most=max(GOALS))}
    world = tools.found_world(tmp_path, virtual_vendor, virtual_chips, ("one",), more=rules)
    with (tmp_path / "one/broker.toml").open("a") as settings:
        settings.write("\n[limits]\nsession_seconds = 10\nclient_rate = 100000.0\nclient_burst = 100000\n")
    running = tools.start_broker(tmp_path / "one", world.entries[0])
    try:
        tools.deposit_all(world, running.entry)
        charter = world.charter()
        world.charter = lambda: charter
        yield world, running
    finally:
        running.stop()


def proportional_bytes(process: int) -> int:
    """PSS: what the process has for itself, and its part of what it shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.mark.long
def test_memory_is_flat_from_ten_thousand_sessions_to_a_hundred_thousand(
    patient: tuple[Any, Any], tools: Any, record_testsuite_property: Any
) -> None:
    world, running = patient
    url = urlsplit(running.entry.url)
    context = ssl.create_default_context(cadata=running.entry.issuer_certificate)
    context.check_hostname = False

    def flow() -> None:
        guest = tools.RawGuest(world, running.entry, world.attester("site", "north"), world.init_data["site/north"])
        try:
            guest.open().attest()
            guest.post("/v1/release", json.dumps({"job": None, "resource": "borealis-hospital/key/data"}).encode())
        finally:
            guest.client.close()

    def open_sessions(whole: int) -> None:
        """Sessions on one connection; one in `whole` of them is a whole flow on a connection of its own."""
        connection = http.client.HTTPSConnection(str(url.hostname), url.port, context=context, timeout=60)
        try:
            for number in range(PER_CONNECTION):
                if number % whole == 0:
                    flow()
                    continue
                connection.request("POST", "/kbs/v0/auth", OPENED, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert (answer.status, len(answer.read()) > 0) == (200, True)
        finally:
            connection.close()

    seen, done = [], 0
    with ThreadPoolExecutor(THREADS) as pool:
        for goal, whole in GOALS.items():
            list(pool.map(open_sessions, [whole] * ((goal - done) // PER_CONNECTION)))
            done = goal
            time.sleep(1)
            seen.append(proportional_bytes(running.process.pid))
    record_testsuite_property("broker-memory", json.dumps(seen))
    assert seen[1] < 1.1 * seen[0], f"PSS went from {seen[0] / 1e6:.1f} MB to {seen[1] / 1e6:.1f} MB"
