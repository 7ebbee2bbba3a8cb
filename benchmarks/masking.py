"""Secure aggregation beside plain averaging: seconds of a round of five simulated sites with a million numbers each.

And a round of a hundred sites of which ten drop out: its steps alone, without network or scripts.

A round's time is that of a longer job less a short one's, over the rounds between, medians of `trials`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.trials import tell
from fl import FedAvgRecipe, SimEnv
from fl.aggregation.masking import MaskedSum, Participant, Round, majority

SCRIPT = """
import numpy as np
from fl import client as flare
flare.init()
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(0.01)}))
"""


def measure(
    *, numbers: int = 1_000_000, sites: int = 5, many: int = 100, rounds: int = 5, trials: int = 3
) -> dict[str, float | dict[str, float]]:
    """Plain and masked rounds, their ratio, and one round of many sites."""
    tell(f"masking: rounds of {sites} sites, {numbers} numbers")
    plain, masked = (_round(numbers, sites, rounds, trials, secure=secure) for secure in (False, True))
    tell(f"masking: {many} sites, a tenth of which drops out")
    return {
        "plain_round_seconds": plain,
        "masked_round_seconds": masked,
        "ratio": masked / plain,
        f"round_of_{many}_sites": _many(numbers, many),
    }


def _round(numbers: int, sites: int, rounds: int, trials: int, *, secure: bool) -> float:
    def job(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "client.py").write_text(SCRIPT)
            recipe = FedAvgRecipe(
                name="masks",
                initial_model={"w": np.zeros(numbers, dtype=np.float32)},
                min_clients=sites,
                num_rounds=count,
                train_script=str(Path(folder) / "client.py"),
                secure_aggregation=secure,
            )
            begun = time.perf_counter()
            recipe.execute(SimEnv(num_clients=sites, workspace_root=Path(folder) / "runs")).get_result()
            return time.perf_counter() - begun

    return max(1e-6, statistics.median((job(rounds + 1) - job(1)) / rounds for _ in range(trials)))


def _many(numbers: int, count: int) -> dict[str, float]:
    """Seconds of one site's steps (the mean over all), and of the server's, with a tenth of the sites lost."""
    names = [f"s{number:03}" for number in range(count)]
    lost = set(names[:: max(1, count // (count // 10 or 1))][: count // 10])
    begun = time.perf_counter()
    sites = {name: Participant(name, os.urandom) for name in names}
    members = {name: name for name in names}
    round_ = Round(b"bench", {name: one.public_keys for name, one in sites.items()}, members, majority(count))
    total = MaskedSum(round_, [np.zeros(numbers, dtype=np.uint32)])
    dealt = {name: one.share(round_) for name, one in sites.items()}
    for name, shares in total.shares_for(dealt).items():
        sites[name].receive(shares)
    vector = np.arange(numbers, dtype=np.uint32)
    of_server = 0.0
    for name in names:
        if name not in lost:
            masked = vector.copy()
            sites[name].masks().add_to(masked)
            start = time.perf_counter()
            total.fold(name, [masked])
            of_server += time.perf_counter() - start
    survivors = total.survivors
    for name in survivors:
        sites[name].confirm(survivors)
    revealed = {name: sites[name].reveal(survivors) for name in survivors}
    of_sites = time.perf_counter() - begun - of_server
    start = time.perf_counter()
    (summed,) = total.unmask(revealed)
    of_server += time.perf_counter() - start
    if not np.array_equal(summed, vector * np.uint32(len(survivors))):
        sys.exit("the sum is wrong")
    return {"a_site_seconds": of_sites / count, "server_seconds": of_server}
