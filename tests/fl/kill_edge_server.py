"""Kill the server of an edge job between two versions and start another in its place: `kill_edge_server.py FOLDER`.

A process of its own, because servers are forked before gRPC starts. Prints what became of the job as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from edge_world import JOB, EdgeWorld  # noqa: E402
from kill_server import serve  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_edge_chaos import GATES, RunningGateway, bundle_of, found_chaos  # noqa: E402

from fl.edge.kits.python import DeviceSettings, GatewayConnection  # noqa: E402
from fl.tensors import encode  # noqa: E402
from fl.transport.memory import SealedMemory  # noqa: E402
from policies.errors import SealwrightError  # noqa: E402

VERSIONS = 5


def live(world: EdgeWorld, gateway: RunningGateway, folder: Path, over: threading.Event) -> None:
    """A device that goes on until the end, whatever its gateway says."""
    connection = GatewayConnection(f"https://{gateway.address}", timeout=10.0)
    device = world.device(connection, folder, settings=DeviceSettings(jobs=(JOB,), wait_seconds=0.2, encoding="f32"))
    while not over.is_set():
        over.wait(min(device.step(), 0.1))
    connection.close()


def main() -> None:
    """Play it."""
    folder = Path(sys.argv[1])
    world = found_chaos(folder)
    bundle = bundle_of(versions=VERSIONS, updates=3)
    world.federation.approve(bundle, GATES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    identity = world.federation.identity("server", "hub", seconds=600)
    state = folder / "state"
    fork = multiprocessing.get_context("fork")
    servers = []
    for _ in range(2):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=serve, args=(theirs, world.federation, address, state, identity))
        process.start()
        servers.append((process, ours))
    (first, first_pipe), (second, second_pipe) = servers
    found: dict[str, Any] = {}
    over = threading.Event()
    threads: list[threading.Thread] = []
    gateway = None
    try:
        first_pipe.send("go")
        assert first_pipe.poll(20), "the first server does not serve"
        first_pipe.recv()
        gateway = RunningGateway(world, GATES[0], address).start()
        with world.federation.client(address) as client:
            model = SealedMemory.of(encode({"w": (bundle.settings.schema_of_model["w"], bytes(12))}))
            job = client.submit(bundle, model, roster=GATES, recipients=("acme-pharma/ada",))
            threads += [
                threading.Thread(target=live, args=(world, gateway, folder / f"device-{number}", over))
                for number in range(3)
            ]
            for thread in threads:
                thread.start()
            for event in client.watch(job, timeout=60):
                if event.kind == "round" and event.round == 2:  # the third version is there
                    break
        os.kill(first.pid or 0, signal.SIGKILL)
        first.join(10)
        found["killed"] = first.exitcode == -signal.SIGKILL
        second_pipe.send("go")
        assert second_pipe.poll(20), "the second server does not serve"
        second_pipe.recv()
        with world.federation.client(address) as client:
            found["rounds"] = [event.round for event in client.watch(job, timeout=90) if event.kind == "round"]
            found["status"] = client.report(job).status.value
            result = client.download(job, folder / "result", ledgers=None)
        document = json.loads((result / "job.json").read_text())
        found["told"] = [entry["round"] for entry in document["rounds"]]
        found["model"] = load_file(result / "model.safetensors")["w"].tolist()
        second_pipe.send("stop")
        second.join(20)
    finally:
        over.set()
        for thread in threads:
            thread.join(20)
        if gateway is not None:
            gateway.stop.set()
            gateway.thread.join(20)
        for process, _ in servers:
            if process.is_alive():
                process.kill()
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except SealwrightError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
