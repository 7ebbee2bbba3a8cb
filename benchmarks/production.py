"""Seconds from submitting a small job to its opened result, over services of production on the virtual platform.

Three rounds of 1 MB of random weights at two sites: broker, server and sites are processes of their own, the scripts
run in sandboxes, the result is sealed, logged, downloaded, verified. The services run already, as they do in
production; the first job, which finds everything cold, does not count. The median of the others does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.trials import tell
from fl import FedAvgRecipe, PocEnv

_CLIENT = """
from fl import client as flare

flare.init()
own = int(flare.get_site_name().split("-")[1])
while flare.is_running():
    flare.send(flare.FLModel(params={"w": flare.receive().params["w"] + 0.001 * own}))
"""


def measure(*, jobs: int = 5) -> dict[str, float]:
    """The median of `jobs` jobs, and how long the services take to start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "code").mkdir()
        (folder / "code" / "client.py").write_text(_CLIENT)
        recipe = FedAvgRecipe(
            name="small",
            min_clients=2,
            num_rounds=3,
            initial_model={"w": np.random.default_rng(7).standard_normal(250_000, dtype=np.float32)},
            train_script=str(folder / "code" / "client.py"),
        )
        tell("production: services start")
        begun = time.perf_counter()
        with PocEnv(num_clients=2, workspace_root=folder / "runs") as env:
            env.execute(recipe).get_result(timeout=300)
            cold = time.perf_counter() - begun
            times = []
            for number in range(jobs):
                tell(f"production: job {number + 1} of {jobs}")
                start = time.perf_counter()
                env.execute(recipe).get_result(timeout=300)
                times.append(time.perf_counter() - start)
    return {"submit_to_result_seconds": statistics.median(times), "start_and_first_job_seconds": cold}
