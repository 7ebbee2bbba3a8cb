"""PocEnv for edge jobs: simulated devices that speak with its gateways over HTTPS, as devices of the Python kit.

Each has a key, a token and the charter's root, checks a gateway's attestation before it sends anything, and trains the
graph that the charter approves by ExecuTorch.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fl.edge.simulation.population import Population, always_there
from fl.errors import PeerLost, RecipeUnusable
from fl.jobs.settings import FedBuffOptions
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from fl.environments.prod import ProdEnv
    from fl.recipes.recipe import Recipe
    from fl.run import Run

END_SECONDS: Final = 30.0
"""How long a job may take to end once devices have left it."""
STOP_SECONDS: Final = 30.0


class PocDevices:
    """The simulated devices of one job. `stop` ends them, and so does the end of this process."""

    def __init__(self, recipe: Recipe, gateways: int) -> None:
        """Raises RecipeUnusable if the recipe says nothing of devices that a gateway could have."""
        from fl.edge.recipes import EdgeFedBuffRecipe

        if not isinstance(recipe, EdgeFedBuffRecipe) or not isinstance(recipe.settings.options, FedBuffOptions):
            raise TypeError("only an edge job has devices")
        simulation = recipe.simulation()
        if not callable(simulation.task_processor):
            raise RecipeUnusable(
                "devices of PocEnv train the job's graph: give a function of a device's number",
                where="task_processor",
                do="Use SimEnv for a processor of your own.",
            )
        self._job = recipe.name
        self._data_of = simulation.task_processor
        self._simulation = simulation
        self._waits = recipe.settings.options.edge.device_wait_timeout
        self._population = simulation.population or always_there(simulation.num_devices * gateways, median_seconds=1.0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def play(self, env: ProdEnv, run: Run, told: Mapping[str, Any]) -> None:
        """Begin. `told`: what `seal poc` has said."""
        self._thread = threading.Thread(target=self._live, args=(env, run, dict(told)), name="devices", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End them."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _live(self, env: ProdEnv, run: Run, told: Mapping[str, Any]) -> None:
        from fl.edge.kits.python.trainer import ExecuTorchTrainer
        from fl.edge.simulation.over_http import Issuer, simulate_over_http
        from policies.keys import load_private_key

        try:
            with tempfile.TemporaryDirectory(prefix="sealwright-devices-") as folder:
                simulate_over_http(
                    list(told["gateways"].values()),
                    Path(told["root"]).read_bytes(),
                    Issuer(told["issuer"], load_private_key(Path(told["issuer_key"]))),
                    self._job,
                    Population(self._population),
                    self._data_of,
                    ExecuTorchTrainer,
                    Path(folder),
                    seconds=self._simulation.job_timeout,
                    workers=self._simulation.num_workers,
                    production=False,
                    stop=self._stop,
                )
            if self._waits is None and not self._stop.is_set() and not _is_over(env, run.job_id):
                self._give_up(run, "none of them is left, or the job_timeout is over")
        except (SealwrightError, OSError) as error:
            if not self._stop.is_set():
                self._give_up(run, getattr(error, "what", str(error)))

    @staticmethod
    def _give_up(run: Run, why: str) -> None:
        """Nothing else would end the job."""
        sys.stderr.write(f"the simulated devices have gone ({why}): the job is aborted\n")
        try:
            run.abort()
        except SealwrightError as error:
            sys.stderr.write(f"the job could not be aborted: {error.what}\n")


def _is_over(env: ProdEnv, job: str) -> bool:
    """Whether the job is over, or soon is: its nodes tell devices so before its result is sealed."""
    with env.connected() as (client, _):
        try:
            for _event in client.watch(job, timeout=END_SECONDS):
                pass
        except PeerLost:
            return client.report(job).status.over
        return True
