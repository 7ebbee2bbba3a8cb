"""What one client may have of a broker: sessions a second, sessions at all; and what the operator sees of each call."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from attestation.broker.exchange import ClientLimits
from attestation.canonical import b64
from attestation.connection import BrokerClient
from attestation.errors import BrokerUnavailable

UNIT = Path(__file__).parents[3] / "appliance/systemd/seal-broker.service"


@pytest.fixture
def limited(tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, tools: Any) -> Iterator[Callable[[str], Any]]:
    """Starts a broker of its own with these limits."""
    started = []

    def start(limits: str) -> Any:
        world = tools.found_world(tmp_path, virtual_vendor, virtual_chips, ("one",))
        with (tmp_path / "one/broker.toml").open("a") as settings:
            settings.write(f"\n[limits]\n{limits}\n")
        started.append(tools.start_broker(tmp_path / "one", world.entries[0]))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def opened(client: BrokerClient) -> str:
    nonce = b64(os.urandom(32))
    answer = client.answer("POST", "/v1/sessions", json.dumps({"nonce": nonce}).encode(), nonce=nonce)
    return str(answer.result["session"])


def refusal(client: BrokerClient) -> str:
    """Why no session is opened; nothing if one is."""
    try:
        opened(client)
    except BrokerUnavailable as error:
        return str(error)
    return ""


def waits(client: BrokerClient) -> set[str]:
    """What is said until a session is opened at last."""
    said, end = set(), time.monotonic() + 60
    while word := refusal(client):
        said.add(word)
        assert time.monotonic() < end
        time.sleep(0.2)
    return said


def test_a_client_that_opens_sessions_too_fast_is_told_and_comes_again(limited: Callable[[str], Any]) -> None:
    running = limited("client_rate = 2.0\nclient_burst = 5")
    client = BrokerClient(running.entry, "virtual.trial")
    try:
        refused = [word for word in (refusal(client) for _ in range(20)) if word]
        assert refused
        assert all("too fast" in word for word in refused)
        client.time()  # what opens no session is not bounded by it
        waits(client)  # its bucket fills again
    finally:
        client.close()


def test_sessions_are_bounded_and_make_room_when_they_end(limited: Callable[[str], Any]) -> None:
    running = limited("sessions = 12\nsession_seconds = 10\nclient_rate = 1000.0\nclient_burst = 1000")
    client = BrokerClient(running.entry, "virtual.trial")
    try:
        for _ in range(12):
            opened(client)
        said = waits(client)
        assert said
        assert all("sessions are open" in word for word in said)
    finally:
        client.close()


def test_one_client_s_haste_is_not_another_s() -> None:
    limits = ClientLimits(1.0, 3, clients=10)
    assert [limits.allows("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limits.allows("b", 0.0)
    assert not limits.allows("a", 0.5)
    assert limits.allows("a", 1.6)
    for number in range(100):
        limits.allows(f"client {number}", 2.0)
    assert len(limits._buckets) == 10


def test_the_lines_of_a_request_share_the_id_that_its_client_sees(broker: Any) -> None:
    url = urlsplit(broker.entry.url)
    context = ssl.create_default_context(cadata=broker.entry.issuer_certificate)
    context.check_hostname = False
    connection = http.client.HTTPSConnection(str(url.hostname), url.port, context=context, timeout=10)
    seen = []
    try:
        for path in ("/v1/time?nonce=no", "/v1/ledger/checkpoint", "/nowhere", "/kbs/v0/resource/a/b/c"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            seen.append((answer.headers["Seal-Request"], answer.status))
    finally:
        connection.close()
    assert len({identifier for identifier, _ in seen}) == len(seen)
    end = time.monotonic() + 10
    for identifier, status in seen:
        while not (lines := [line for line in broker.lines if line.get("request") == identifier]):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [line["status"] for line in lines if line["event"] == "request"] == [status]


def test_the_unit_closes_what_a_broker_does_not_need() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["User"] == "seal-broker"
    assert (service["NoNewPrivileges"], service["CapabilityBoundingSet"], service["ProtectSystem"]) == (
        "yes",
        "",
        "strict",
    )
    assert service["SystemCallErrorNumber"] == "EPERM"
    for closed in ("PrivateDevices", "ProtectHome", "RestrictNamespaces", "MemoryDenyWriteExecute", "ProtectClock"):
        assert service[closed] == "yes"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here, which knows how much a unit leaves open")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNIT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
