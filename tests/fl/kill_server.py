"""Kill a server in the middle of a job and start another in its place: `kill_server.py FOLDER DRIVER WHEN [masked]`.

WHEN is in round 1: `begun`, `training` (a script has logged something), `updated` (the first update has come), `summed`
(the sum is there, and not kept yet).

A process of its own, because servers are forked before gRPC starts. Prints what became of the job as JSON.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from federation_world import SITES, FederationWorld, found_federation, make_job, wait_until  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from fl.server.job_store import JobKeeper  # noqa: E402
from policies.errors import SealwrightError  # noqa: E402

ADA = "acme-pharma/ada"
SCRIPT = """
import time
import numpy as np
from fl import client as flare

flare.init()
add = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    flare.log("trained", float(received.current_round), step=received.current_round)
    time.sleep(1.5 if add > 2 else 0.5)
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(add)}))
"""


def serve(pipe: Any, world: FederationWorld, listen: str, state: Path, identity: Any) -> None:
    """A server process: serves when it is told to, and writes its ledger's entries to a file.

    Told `summed`, it keeps no round after the first, for ever.
    """
    if pipe.recv() == "summed":
        keep = JobKeeper.save

        def save(keeper: JobKeeper, saved: Any) -> None:
            if saved.round > 1:
                time.sleep(3600)
            keep(keeper, saved)

        JobKeeper.save = save  # type: ignore[method-assign]
    ledger = state.with_name("ledger")

    def record(kind: str, document: Any) -> str:
        with ledger.open("a") as file:
            file.write(json.dumps([kind, document.get("event")]) + "\n")
        return ""

    with world.server(identity, listen=listen, state=state, record=record):
        pipe.send("serving")
        pipe.recv()


def main() -> None:
    """Play it."""
    where, driver, when, *masked = sys.argv[1:]
    folder = Path(where)
    world = found_federation(folder)
    script = SCRIPT.replace("    flare.log(", "    # (") if masked else SCRIPT  # nothing leaves beside a sum
    bundle, model = make_job(folder, script, num_rounds=3, round_seconds=60, secure_aggregation=bool(masked))
    world.approve(bundle)
    world.way = {"driver": driver}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    identity = world.identity("server", "hub", seconds=600)
    state = folder / "state"
    fork = multiprocessing.get_context("fork")
    servers = []
    for _ in range(2):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=serve, args=(theirs, world, address, state, identity))
        process.start()
        servers.append((process, ours))
    (first, first_pipe), (second, second_pipe) = servers
    found: dict[str, Any] = {"killed": False}
    try:
        first_pipe.send(when)
        assert first_pipe.poll(20), "the first server does not serve"
        first_pipe.recv()
        with contextlib.ExitStack() as stack:
            for name, number in zip(SITES, (1.0, 3.0), strict=True):
                stack.enter_context(world.site(address, name, number=number, patience=60.0))
            with world.client(address) as client:
                mine = client.submit(bundle, model, roster=None, recipients=[ADA])
                events = watched(client, mine, until=when)
            os.kill(first.pid or 0, signal.SIGKILL)
            first.join(10)
            found["killed"] = first.exitcode == -signal.SIGKILL
            (folder / "kept").mkdir()
            for path in state.iterdir():
                (folder / "kept" / path.name).write_bytes(path.read_bytes())
            second_pipe.send("go")
            assert second_pipe.poll(20), "the second server does not serve"
            second_pipe.recv()
            with world.client(address) as client:
                events += list(client.watch(mine, timeout=60))
                found["status"] = client.report(mine).status.value
                result = client.download(mine, folder / "result", ledgers=None)
        document = json.loads((result / "job.json").read_text())
        found["model"] = load_file(result / "model.safetensors")["w"].tolist()
        found["rounds"] = [entry["round"] for entry in document["rounds"]]
        found["updates"] = [[entry["round"], sorted(entry["updates"])] for entry in document["rounds"]]
        trained: dict[str, list[int]] = {name: [] for name in SITES}
        for event in events:
            if event.kind == "value" and event.site is not None:
                trained[event.site].append(int(event.values["trained"]))
        found["trained"] = trained
        found["exports"] = [[entry["job"] == mine, entry["round"]] for kind, entry in world.ledger if kind == "export"]
        found["ledger"] = [json.loads(line)[1] for line in state.with_name("ledger").read_text().splitlines()]
        wait_until(lambda: any(path.suffix == ".end" for path in state.iterdir()), 5)
        with world.client(address) as client:
            client.delete(mine)
        found["left_in_store"] = [path.name for path in state.iterdir()]
        second_pipe.send("stop")
        second.join(20)
    finally:
        for process, _ in servers:
            if process.is_alive():
                process.kill()
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


def watched(client: Any, job: str, *, until: str) -> list[Any]:
    """The events until round 1 is under way, or has its first update."""
    events = []
    for event in client.watch(job, timeout=60):
        events.append(event)
        if until == "training" and event.kind == "value" and event.round == 1:
            break
        if until == "begun" and event.kind == "round" and event.round == 1:
            break
        if until == "summed" and event.kind == "aggregated" and event.round == 1:
            break
        if until == "updated" and event.kind == "update" and event.round == 1:
            break
    return events


if __name__ == "__main__":
    try:
        main()
    except SealwrightError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    os._exit(0)  # forked processes and gRPC's threads have nothing to say any more
