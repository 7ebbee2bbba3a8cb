"""Approved jobs that are stopped all the same: one that has spent its budget, one whose code is revoked as it runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from appliance.demo.attacks import Attack, AttackSucceeded, Repelled
from appliance.demo.founding import SIGNERS, serve_charter, sign_and_publish
from appliance.demo.setting import SERVER, SITES, Setting
from appliance.processes import Processes
from fl.environments.prod import ProdEnv
from fl.errors import JobFailed
from fl.jobs.bundle import make_bundle
from fl.recipes.fedavg import FedAvgRecipe
from fl.transport.memory import SealedMemory

if TYPE_CHECKING:
    from fl.jobs.bundle import Bundle
    from fl.run import Run

JOB_SECONDS: Final = 120.0
BEGUN_SECONDS: Final = 30.0
ENDLESS: Final = """import time

from fl import client as flare

flare.init()
flare.receive()
time.sleep(3600)
"""


def endless_job() -> tuple[Bundle, SealedMemory]:
    """A job whose scripts sleep for an hour in its only round: its bundle and its first model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "client.py").write_text(ENDLESS)
        recipe = FedAvgRecipe(
            name="endless",
            initial_model={"w": np.zeros(1, dtype=np.float32)},
            min_clients=len(SITES),
            num_rounds=1,
            train_script=str(Path(folder) / "client.py"),
        )
        return make_bundle(Path(folder), recipe.settings), recipe.first_model()


def overspent(bundle: Bundle, first_model: Callable[[], SealedMemory]) -> Attack:
    """The approved job is run once more: its budget is for one run."""

    def play(title: str, setting: Setting, _: Processes) -> Repelled:
        with first_model() as model:
            run = ProdEnv(setting.kit, workspace_root=setting.folder / "result").submit(bundle, model)
        return Repelled(title, ", ".join(SITES), _stopped(title, run, "is spent"))

    return Attack("a job is run once more than its budget allows", play)


def revoked(bundle: Bundle, first_model: SealedMemory) -> Attack:
    """Two members revoke a bundle while its scripts are in the middle of a round."""

    def play(title: str, setting: Setting, _: Processes) -> Repelled:
        with first_model:
            run = ProdEnv(setting.kit, workspace_root=setting.folder / "result").submit(bundle, first_model)
        _await_round(title, run, setting)
        proposal = setting.shared / "revoke.json"
        setting.seal("charter", "revoke", setting.charter_folder, bundle.digest, "--out", proposal)
        sign_and_publish(setting, proposal, SIGNERS)
        serve_charter(setting)
        return Repelled(title, f"{SERVER}, {', '.join(SITES)}", _stopped(title, run, "is not approved"))

    return Attack("a job goes on after its code was revoked", play)


def _await_round(title: str, run: Run, setting: Setting) -> None:
    deadline = time.monotonic() + BEGUN_SECONDS
    with ProdEnv(setting.kit).connected() as (client, _):
        while client.report(run.get_job_id()).round is None:
            if time.monotonic() > deadline:
                raise AttackSucceeded(f"{title}: the job has not begun")
            time.sleep(0.1)


def _stopped(title: str, run: Run, words: str) -> tuple[str, ...]:
    """The reasons for which a job failed, those with `words` first. Raises AttackSucceeded if none has them."""
    try:
        run.get_result(timeout=JOB_SECONDS)
    except JobFailed as failure:
        named = tuple(reason for reason in failure.reasons if words in reason)
        if named:
            return (*named, *(reason for reason in failure.reasons if reason not in named))
    raise AttackSucceeded(f"{title}: the job was not stopped")
