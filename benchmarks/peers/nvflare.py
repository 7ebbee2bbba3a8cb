"""NVIDIA FLARE's side: its simulator, and a provisioned federation of real processes with mutual TLS."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers.environments import Tagged, program, rounds_noted
from benchmarks.simulation import HELLO_CLIENT, HELLO_NETWORK

_NETWORK = """
import torch


class Weights(torch.nn.Module):
    def __init__(self, megabytes=1.0):
        super().__init__()
        count = int(megabytes * 1e6 / 4 / 8)
        parts = [torch.nn.Parameter(torch.rand(count), requires_grad=False) for _ in range(8)]
        self.parts = torch.nn.ParameterList(parts)
"""
_CLIENT = """
import sys, time
import nvflare.client as flare

flare.init()
own = int(flare.system_info()["site_name"].split("-")[1])
while flare.is_running():
    received = flare.receive()
    with open(sys.argv[1], "a") as file:
        file.write(f"{received.current_round} {time.time()}\\n")
    params = {name: value + 0.001 * own for name, value in received.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 1.0}))
"""
_RECIPE = """
import sys
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

def recipe(kind, clients, rounds, megabytes, times):
    if kind == "hello":
        from network import Network
        return FedAvgRecipe(name="hello", model=Network(), min_clients=clients, num_rounds=rounds,
                            train_script="client.py")
    made = FedAvgRecipe(name="weights", model={"class_path": "network.Weights", "args": {"megabytes": megabytes}},
                        min_clients=clients, num_rounds=rounds, train_script="client.py", train_args=times)
    made.add_server_file("network.py")
    made.add_client_file("network.py")
    return made
"""
_SIMULATION = """
import sys
from nvflare.recipe import SimEnv
from recipe import recipe

kind, clients, rounds, megabytes, threads, times = sys.argv[1:]
sys.argv = sys.argv[:1]
run = recipe(kind, int(clients), int(rounds), float(megabytes), times).execute(
    SimEnv(num_clients=int(clients), num_threads=int(threads), workspace_root="work"))
assert run.get_result(), run.get_status()
"""
_PROJECT = """
api_version: 3
name: bench
participants:
  - {{name: localhost, type: server, org: bench, fed_learn_port: {port}}}
  - {{name: site-1, type: client, org: bench}}
  - {{name: site-2, type: client, org: bench}}
  - {{name: admin@bench.example, type: admin, org: bench, role: project_admin}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
    args: {{template_file: [master_template.yml]}}
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config, scheme: grpc}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""
_SUBMISSION = """
import sys, time
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.recipe import ProdEnv
from recipe import recipe

kit, rounds, megabytes, times = sys.argv[1:]
sys.argv = sys.argv[:1]
end = time.monotonic() + 120
while True:
    try:
        session = new_secure_session("admin@bench.example", kit, timeout=5)
        if len(session.get_system_info().client_info) >= 2:
            break
        session.close()
    except Exception as error:
        if time.monotonic() > end:
            raise
    if time.monotonic() > end:
        raise SystemExit("the clients did not join")
    time.sleep(0.5)
made = recipe("weights", 2, int(rounds), float(megabytes), times)
start = time.perf_counter()
run = made.execute(ProdEnv(startup_kit_location=kit, username="admin@bench.example"))
while not session.get_job_meta(run.get_job_id())["status"].startswith("FINISHED"):
    time.sleep(0.1)
assert run.get_result(timeout=120)
print("SUBMIT_TO_RESULT", time.perf_counter() - start, flush=True)
session.close()
"""


def simulate(folder: Path, kind: str, *, clients: int, rounds: int, megabytes: float, threads: int) -> list[float]:
    """Seconds of the whole process, then of each round."""
    hello = kind == "hello"
    client = HELLO_CLIENT.replace("from fl import client as flare", "import nvflare.client as flare")
    _write(folder, {"network.py": HELLO_NETWORK if hello else _NETWORK, "client.py": client if hello else _CLIENT})
    _write(folder, {"recipe.py": _RECIPE, "job.py": _SIMULATION})
    times = folder / "times"
    numbers = [str(one) for one in (clients, rounds, megabytes, threads)]
    with Tagged() as processes:
        command = [program("nvflare"), "job.py", kind, *numbers, str(times)]
        whole = processes.run(command, folder, folder / "log", seconds=900)
    return [whole, *(rounds_noted(times) if times.exists() else [])]


def federate(folder: Path, *, rounds: int, megabytes: float) -> dict[str, float | list[float]]:
    """`rounds`: seconds of each; `submit_to_result`; `pss_megabytes` of all processes."""
    _write(folder, {"network.py": _NETWORK, "client.py": _CLIENT, "recipe.py": _RECIPE, "submit.py": _SUBMISSION})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _write(folder, {"project.yml": _PROJECT.format(port=port)})
    with Tagged() as processes, ExitStack() as ends:
        processes.environment["PATH"] = f"{Path(program('nvflare')).parent}:{processes.environment['PATH']}"
        provision = [program("nvflare", "nvflare"), "provision", "-p", "project.yml", "-w", "work"]
        processes.run(provision, folder, folder / "log", seconds=120)
        kits = folder / "work" / "bench" / "prod_00"
        resources = kits / "localhost" / "local" / "resources.json.default"
        resources.write_text(resources.read_text().replace("/tmp/nvflare", str(folder / "store")))  # noqa: S108
        for who in ("localhost", "site-1", "site-2"):
            script = str(kits / who / "startup" / "start.sh")
            ends.enter_context(processes.started(["bash", script], folder, folder / "services.log"))
        arguments = [str(kits / "admin@bench.example"), str(rounds), str(megabytes), str(folder / "times")]
        try:
            processes.run([program("nvflare"), "submit.py", *arguments], folder, folder / "log", seconds=900)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError((folder / "services.log").read_text(errors="replace")[-2000:]) from error
    told = [line for line in (folder / "log").read_text().splitlines() if line.startswith("SUBMIT_TO_RESULT")]
    return {
        "rounds": rounds_noted(folder / "times"),
        "submit_to_result": float(told[-1].split()[1]),
        "pss_megabytes": processes.most_pss * 1024 / 1e6,
    }


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        if sys.argv[1] == "hello":
            print(simulate(Path(name), "hello", clients=2, rounds=2, megabytes=0, threads=2))
        else:
            print(federate(Path(name), rounds=3, megabytes=float(sys.argv[1])))
        print("whole", time.perf_counter() - started)
