"""Whole flows a second of a real broker: session, attestation, release, with 64 guests at a time over fresh TLS.

A flow makes three signed calls on one new TLS 1.3 connection; the broker is a process of its own with SQLite, the
guests are threads of this process on one virtual chip. Two limits beside it, in the same run: one process that does
nothing but a flow's cryptography and commits (P-384 verification, Ed25519 signatures and verifications, HPKE, SQLite
with synchronous=FULL), and an aiohttp TLS service that answers nothing, under as many threads with three calls each.
Batches of broker and empty service alternate; medians count. Guests and broker share the cores, so that the guests'
own work is in the figure.
"""

from __future__ import annotations

import http.client
import json
import os
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.evidence.report import Product
from attestation.hybrid import HybridPrivateKey, seal
from attestation.virtual.chip import create_chip
from attestation.virtual.vendor import create_vendor
from benchmarks.certificate import make_certificate
from benchmarks.trials import ROOT, load_trial, tell

SIGNATURES, VERIFICATIONS, COMMITS = 5, 2, 2
MAX_SECONDS = 30.0


def measure(*, guests: int = 64, flows: int = 128, batches: int = 3) -> dict[str, float]:
    """Flows a second of broker, cryptography alone and empty service. At most 900 flows; stops after 30 seconds."""
    if flows * batches > 900:
        raise ValueError("an owner's policy of the trial releases a thousand times")
    trial = load_trial("attestation/broker/conftest.py", "broker_trial")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("broker: founding a consortium")
        vendor = create_vendor(folder / "vendor")
        chips = {Product.MILAN: create_chip(vendor, folder / "chip", Product.MILAN)}
        world = trial.found_world(folder / "world", vendor, chips, ("one",))
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
    def flow(_: int) -> None:
        attester = world.attester("site", "north")
        guest = trial.RawGuest(world, running.entry, attester, world.init_data["site/north"])
        try:
            guest.open().attest()
            guest.post("/v1/release", json.dumps({"job": None, "resource": trial.SITE_KEY}).encode())
        finally:
            guest.client.close()

    key, certificate = make_certificate()
    chain = folder / "chain.pem"
    chain.touch(mode=0o600)
    chain.write_bytes(key + certificate)
    command = [sys.executable, "-m", "benchmarks.empty_service", str(chain)]
    whole, empty, spent = [], [], []
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline())
            context = ssl.create_default_context(cadata=certificate.decode())
            end = time.monotonic() + MAX_SECONDS
            with ThreadPoolExecutor(guests) as pool:
                list(pool.map(flow, range(min(guests, flows))))  # caches warm, database pages there
                for batch in range(batches):
                    tell(f"broker: batch {batch + 1} of {batches}")
                    before = _processor_seconds(running.process.pid)
                    whole.append(_rate(pool, flow, flows))
                    spent.append((_processor_seconds(running.process.pid) - before) / flows)
                    empty.append(_rate(pool, lambda _: _three_calls(port, context), flows))
                    if time.monotonic() > end:
                        break
        finally:
            service.terminate()
    bare = _cryptography(folder, flows)
    found, limit = statistics.median(whole), statistics.median(empty)
    return {
        "flows_per_second": found,
        "broker_processor_milliseconds_per_flow": 1000 * statistics.median(spent),
        "cryptography_and_commits_alone_per_second": bare,
        "empty_service_flows_per_second": limit,
        "share_of_cryptography_and_commits": found / bare,
        "share_of_both_in_turn": found * (1 / bare + 1 / limit),
    }


def _rate(pool: ThreadPoolExecutor, work: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    list(pool.map(work, range(count)))
    return count / (time.perf_counter() - start)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _three_calls(port: int, context: ssl.SSLContext) -> None:
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        for size in (60, 6000, 60):
            connection.request("POST", "/", body=bytes(size))
            if connection.getresponse().read() == b"":
                raise RuntimeError("the empty service did not answer")
    finally:
        connection.close()


def _cryptography(folder: Path, flows: int) -> float:
    """Flows a second if a flow were its cryptography and its commits alone, in one thread."""
    chip, broker = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
    guest = HybridPrivateKey.generate().public_bytes()
    scheme, text = ec.ECDSA(hashes.SHA384()), bytes(0x2A0)
    report, proof = chip.sign(text, scheme), broker.sign(text)
    times = []
    database = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE entry (body BLOB)")
        for _ in range(flows):
            start = time.perf_counter()
            chip.public_key().verify(report, text, scheme)
            for _ in range(VERIFICATIONS):
                broker.public_key().verify(proof, text)
            for _ in range(SIGNATURES):
                broker.sign(text)
            seal(b"a key of 32 bytes, as it may be.", guest, info=b"bench")
            for _ in range(COMMITS):
                database.execute("INSERT INTO entry VALUES (?)", (text,))
            times.append(time.perf_counter() - start)
    finally:
        database.close()
    return 1 / statistics.median(times)
