"""Flower's side: its simulation by its Python entry, and a SuperLink with two SuperNodes over TLS.

Its TLS proves the server only.
"""

from __future__ import annotations

import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.certificate import make_certificate
from benchmarks.peers.environments import Tagged, program, rounds_noted
from benchmarks.simulation import HELLO_NETWORK

_APP = """
import os, time
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

KIND, CLIENTS, ROUNDS = os.environ["BENCH_KIND"], int(os.environ["BENCH_CLIENTS"]), int(os.environ["BENCH_ROUNDS"])
MEGABYTES, TIMES = float(os.environ["BENCH_MEGABYTES"]), os.environ["BENCH_TIMES"]
NETWORK
client_app = ClientApp()
server_app = ServerApp()


def hello(arrays):
    rows = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    labels = (rows.sum(1) > 0).long()
    network = Network()
    network.load_state_dict(arrays.to_torch_state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for batch in [slice(start, start + 32) for start in range(0, 512, 32)] * 2:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(rows[batch]), labels[batch]).backward()
        optimizer.step()
    return ArrayRecord(network.state_dict())


@client_app.train()
def train(message: Message, context: Context):
    round_ = message.content["config"]["server-round"]
    with open(TIMES, "a") as file:
        file.write(f"{round_} {time.time()}\\n")
    arrays = message.content["arrays"]
    if KIND == "hello":
        arrays = hello(arrays)
    else:
        own = 0.001 * (1 + int(context.node_config.get("partition-id", 0)))
        arrays = ArrayRecord({name: value + own for name, value in arrays.to_torch_state_dict().items()})
    told = MetricRecord({"num-examples": 512, "accuracy": 1.0})
    return Message(content=RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    if KIND == "hello":
        state = Network().state_dict()
    else:
        state = {f"part{number}": torch.rand(int(MEGABYTES * 1e6 / 4 / 8)) for number in range(8)}
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(state), num_rounds=ROUNDS)
    assert len(result.train_metrics_clientapp) == ROUNDS
    with open(TIMES + ".result", "w") as file:
        file.write(str(time.time()))
"""
_SIMULATION = """
import os
from app import client_app, server_app
from flwr.simulation import run_simulation

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server_app=server_app, client_app=client_app, num_supernodes=int(os.environ["BENCH_CLIENTS"]),
               backend_config=resources)
assert os.path.exists(os.environ["BENCH_TIMES"] + ".result")
"""
_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "bench"
version = "1.0.0"
description = "rounds of random weights"
license = "Apache-2.0"
dependencies = ["flwr>=1.42.0"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "benchapp.app:server_app"
clientapp = "benchapp.app:client_app"
"""


def simulate(folder: Path, kind: str, *, clients: int, rounds: int, megabytes: float) -> list[float]:
    """Seconds of the whole process, then of each round."""
    (folder / "app.py").write_text(_app(kind))
    (folder / "job.py").write_text(_SIMULATION)
    with Tagged(**_asked(kind, clients, rounds, megabytes, folder)) as processes:
        whole = processes.run([program("flower"), "job.py"], folder, folder / "log", seconds=900)
    return [whole, *rounds_noted(folder / "times")]


def federate(folder: Path, *, rounds: int, megabytes: float) -> dict[str, float | list[float]]:
    """`rounds`: seconds of each; `submit_to_result`; `pss_megabytes` of all processes."""
    application = folder / "application"
    (application / "benchapp").mkdir(parents=True)
    (application / "pyproject.toml").write_text(_PROJECT)
    (application / "benchapp" / "__init__.py").write_text("")
    (application / "benchapp" / "app.py").write_text(_app("weights"))
    key, certificate = make_certificate()
    (folder / "key.pem").write_bytes(key)
    (folder / "certificate.pem").write_bytes(certificate)
    home, port = folder / "home", _free_port()
    home.mkdir()
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = "{folder}/certificate.pem"\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "bench"\n[superlink.bench]\n{connection}')
    log = folder / "services.log"
    asked = _asked("weights", 2, rounds, megabytes, folder)
    with Tagged(**asked, FLWR_HOME=str(home)) as processes, ExitStack() as ends:
        processes.environment["PATH"] = f"{Path(program('flower')).parent}:{processes.environment['PATH']}"
        pem = ["--ssl-ca-certfile", "certificate.pem", "--ssl-certfile", "certificate.pem", "--ssl-keyfile", "key.pem"]
        alone = "--disable-runtime-dependency-installation"
        link = [program("flower", "flower-superlink"), *pem, alone, "--host", "127.0.0.1", "--port", str(port)]
        ends.enter_context(processes.started(link, folder, log))
        context = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
        health = f"https://127.0.0.1:{port}/health"
        _wait(lambda: urllib.request.urlopen(health, timeout=2, context=context).read() is not None, log)
        for number in range(2):
            node = [program("flower", "flower-supernode"), "--root-certificates", "certificate.pem"]
            node += ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(_free_port())]
            config = ["--node-config", f"partition-id={number} num-partitions=2"]
            ends.enter_context(processes.started([*node, *config], folder, log))
        _wait(lambda: log.read_text(errors="replace").count("SuperNode ID") >= 2, log)
        start = time.time()
        command = [program("flower", "flwr"), "run", str(application), "bench", "--stream"]
        processes.run(command, folder, folder / "log", seconds=900)
    return {
        "rounds": rounds_noted(folder / "times"),
        "submit_to_result": float((folder / "times.result").read_text()) - start,
        "pss_megabytes": processes.most_pss * 1024 / 1e6,
    }


def _app(kind: str) -> str:
    return _APP.replace("NETWORK", HELLO_NETWORK if kind == "hello" else "")


def _asked(kind: str, clients: int, rounds: int, megabytes: float, folder: Path) -> dict[str, str]:
    values = {"KIND": kind, "CLIENTS": clients, "ROUNDS": rounds, "MEGABYTES": megabytes, "TIMES": folder / "times"}
    return {f"BENCH_{name}": str(value) for name, value in values.items()}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait(ready: Callable[[], bool], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise RuntimeError(f"Flower's services do not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        if sys.argv[1] == "hello":
            print(simulate(Path(name), "hello", clients=2, rounds=2, megabytes=0))
        else:
            print(federate(Path(name), rounds=3, megabytes=float(sys.argv[1])))
