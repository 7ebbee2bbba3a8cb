"""Clients that are forks of the author's process: as good as new ones, and made only where that is safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federation_world import wait_until

from fl.environments.forking import may_be_forked, threads, threads_of_openblas

ROOT = Path(__file__).parents[2]
HELPER = "state = []\n"
CLIENT = """
import logging
import os
import random
import sys
import time
from pathlib import Path

import helper
import numpy as np
import torch
from fl import client as flare

flare.init()
parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(bytes(1), b" ").decode()
print("of", "a new process" if "fork_server" in parent else "the author's process")
print("state", helper.state, Path(helper.__file__).name, "job" in sys.modules, logging.root.handlers, sys.argv[1:])
print("threads", torch.get_num_threads())
for drawn in (float(torch.rand(1)), np.random.random(), random.random()):
    print("drawn", drawn)
while flare.is_running():
    received = flare.receive()
    time.sleep(float(sys.argv[1]))
    weight = torch.nn.Parameter(received.params["weight"].clone())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()
    flare.send(flare.FLModel(params={"weight": weight.detach(), "bias": received.params["bias"]}))
"""
JOB = """
import logging
import sys
import threading

import helper
import torch
from fl import FedAvgRecipe, SimEnv

helper.state.append("the author's")
logging.basicConfig(level=logging.DEBUG)
torch.manual_seed(5)
if sys.argv[1] == "beside a thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
recipe = FedAvgRecipe(
    name="forked", min_clients=2, num_rounds=1, initial_model=torch.nn.Linear(2, 1), train_script="client.py",
    train_args=sys.argv[2],
)
run = recipe.execute(SimEnv(num_clients=2, workspace_root="work"))
for name, text in run._handle.logs().items():
    print("".join(f"{name}: {line}\\n" for line in text.splitlines()), end="")
sys.exit(run.get_status() != "finished")
"""


def command(folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    for name, text in {"helper.py": HELPER, "client.py": CLIENT, "job.py": JOB}.items():
        (folder / name).write_text(text)
    return [sys.executable, "job.py", *words], {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("how", ["alone", pytest.param("beside a thread", marks=pytest.mark.long)])
def test_a_client_is_as_new_whatever_its_author_has_done(tmp_path: Path, how: str) -> None:
    words, environment = command(tmp_path, how, "0")
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert said.count("of " + ("the author's process" if how == "alone" else "a new process")) == 2, done.stdout
    assert said.count("state [] helper.py False [] ['0']") == 2, done.stdout
    cores = len(os.sched_getaffinity(0))
    assert said.count(f"threads {max(1, cores // min(cores, 2))}") == 2, done.stdout
    assert len({line for line in said if line.startswith("drawn")}) == 6, "each client draws its own numbers"


@pytest.mark.long
def test_when_the_author_s_process_is_killed_everything_ends(tmp_path: Path) -> None:
    words, environment = command(tmp_path, "alone", "600")
    with subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True) as process:
        assert wait_until(lambda: len(list(tmp_path.glob("work/*/site-*/log.txt"))) == 2, 60)
        time.sleep(1)
        ours = of_session(process.pid)
        assert len(ours) >= 3, ours
        os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not of_session(process.pid), 30), of_session(process.pid)


def of_session(session: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_only_threads_of_openblas_are_none_of_the_authors() -> None:
    maps = "7f0-7f1 r-xp 0 fe:01 12 /x/numpy.libs/libscipy_openblas64_-1.so\n7f1-7f2 r--p 0 fe:01 12 /x/libtorch.so\n"
    cores = len(os.sched_getaffinity(0))
    assert threads_of_openblas("", {}) == 0
    assert threads_of_openblas(maps + maps, {}) == cores - 1
    assert threads_of_openblas(maps, {"OMP_NUM_THREADS": "1"}) == 0
    assert threads_of_openblas(maps, {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "9"}) == 0
    assert threads_of_openblas(maps, {"OPENBLAS_NUM_THREADS": "many"}) == cores - 1
    assert threads_of_openblas(maps + maps.replace("scipy_openblas64_-1", "openblasp-r0"), {}) == 2 * (cores - 1)


def test_a_process_that_would_save_no_import_is_not_forked() -> None:
    assert threads() >= 1
    assert not may_be_forked([]), "nothing is imported for clients without torch"
