"""SimEnv: a federation on this machine, for development. No attestation, no released keys, no site's data.

Every client's script runs in a process of its own, forked from one that has torch imported already, in its own folder
with its own log. The rounds, checks and aggregation are those of production.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from fl.environments.clients import ClientProcesses
from fl.environments.keeping_out import (
    on_this_machine,
    refuse_in_guest,
    refuse_kit,
    refuse_remote_cluster,
    refuse_site_data,
)
from fl.environments.logging_modes import LogMode, read_log_config
from fl.errors import RecipeUnusable
from fl.jobs.settings import NAME_PATTERN
from fl.run import Run

if TYPE_CHECKING:
    from fl.environments.ray_clients import RayClients
    from fl.recipes.recipe import Recipe

MAX_CLIENTS: Final = 10_000
NAME: Final = re.compile(NAME_PATTERN)
NAME_OF_RUN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
GPUS: Final = re.compile(r"(\d{1,4}|\[\d{1,4}(,\d{1,4})*\])(,(\d{1,4}|\[\d{1,4}(,\d{1,4})*\]))*")


class SimEnv:
    """Simulate a federation with one process per client."""

    def __init__(
        self,
        clients: Sequence[str] | None = None,
        num_clients: int | None = None,
        *,
        num_threads: int | None = None,
        gpu_config: str | None = None,
        log_config: str | Path | None = None,
        backend: Literal["processes", "ray"] = "processes",
        resume: str | None = None,
        data: str | Path | Mapping[str, str | Path] | None = None,
        workspace_root: str | Path | None = None,
    ) -> None:
        """Arguments:

        - `clients` or `num_clients`: the clients' names, or how many (then `site-1`, `site-2`, ...).
        - `num_threads`: how many clients train at the same time (default: the machine's cores).
        - `gpu_config`: which GPUs clients see, dealt to them in turn: "0,1" gives each client one, "[0,1],[2,3]" two.
        - `log_config`: "concise" (live progress in a terminal or a notebook; the default), "full" (a line for each
          event), "verbose" (what clients print too), or a JSON file for the clients' `logging.config.dictConfig`.
        - `backend`: "processes" of this machine, or "ray": actors of a Ray cluster, one for each client.
        - `resume`: a run's id: it goes on in its folder after its last whole round.
        - `data`: what `flare.data_path` finds: a folder with one subfolder per client, or a folder for each client.
        - `workspace_root`: where results go (default: `~/.local/share/sealwright/runs`).

        Raises RecipeUnusable with the argument that is wrong, and SimulationRefused in a guest and in a job's script,
        for a site's sealed data, for a kit, and for an address of another machine.
        """
        refuse_in_guest()
        names = client_names(clients, num_clients, most=MAX_CLIENTS, where="SimEnv")
        if backend not in ("processes", "ray"):
            raise RecipeUnusable(f'backend is {backend!r}, not "processes" or "ray"', where="backend")
        if num_threads is not None and num_threads < 1:
            raise RecipeUnusable(f"num_threads is {num_threads}, not at least 1", where="num_threads")
        if resume is not None and not NAME_OF_RUN.fullmatch(resume):
            raise RecipeUnusable(f"{resume!r} is no run's id", where="resume")
        self.gpus = gpus_of(names, gpu_config)
        self.log_mode: LogMode = read_log_config(log_config)
        self.backend = backend
        self.resume = resume
        cores = len(os.sched_getaffinity(0))
        self.clients = names
        self.at_once = max(1, num_threads if num_threads is not None else cores)
        self.threads_each = max(1, cores // min(self.at_once, len(names)))
        if backend == "ray":
            refuse_remote_cluster(os.environ.get("RAY_ADDRESS"))
        for one in data.values() if isinstance(data, Mapping) else [data]:
            if one is not None:
                refuse_site_data(on_this_machine(one, where="data"), where="data")
        self.data = {name: data_folder(data, name) for name in names}
        root = (
            default_workspace() if workspace_root is None else on_this_machine(workspace_root, where="workspace_root")
        )
        self.workspace_root = root.absolute()
        refuse_kit(self.workspace_root, where="workspace_root")

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. An interrupt ends its processes and is raised again."""
        if recipe.settings.min_clients > len(self.clients):
            raise RecipeUnusable(
                f"the recipe needs {recipe.settings.min_clients} clients, the simulation has {len(self.clients)}",
                where="min_clients",
            )
        refuse_kit(recipe.folder, where="train_script")
        _check_own_lock(recipe)
        started = datetime.now(UTC)
        job_id = self.resume or f"{recipe.name}-{started:%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"
        folder = self.workspace_root / job_id
        if self.resume is None:
            folder.mkdir(mode=0o700, parents=True)
        elif not folder.is_dir():
            raise RecipeUnusable(f"there is no run {job_id} in {self.workspace_root}", where="resume")
        with self._processes(recipe) as processes:
            # Clients' libraries are being imported by now, and so is meanwhile what this process needs.
            from fl.environments.simulation import Simulation

            simulation = Simulation(self, recipe, job_id, folder, started)
            simulation.run(processes)
        return Run(job_id, simulation)

    def _processes(self, recipe: Recipe) -> ClientProcesses | RayClients:
        """What clients run in. As long as this process has no threads, it may be able to fork itself for them."""
        preload = self._preload(recipe)
        if self.backend == "ray":
            from fl.environments.ray_clients import RayClients

            return RayClients(preload, threads=self.threads_each)
        return ClientProcesses(preload, threads=self.threads_each)

    def _preload(self, recipe: Recipe) -> list[str]:
        """What is imported once, for all clients."""
        if recipe.settings.framework != "pytorch":
            return []
        scripts = (recipe.folder / path for path in recipe.settings.scripts)
        optimizers = len(self.clients) > len(os.sched_getaffinity(0)) or any(
            b"optim" in script.read_bytes() for script in scripts if script.is_file()
        )
        return ["torch", *(["fl.environments.torch_optimizers"] if optimizers else [])]


def client_names(clients: Sequence[str] | None, num_clients: int | None, *, most: int, where: str) -> list[str]:
    """The clients' names, given or counted. Raises RecipeUnusable."""
    if clients is None and num_clients is None:
        raise RecipeUnusable("give clients or num_clients", where=where)
    names = list(clients) if clients is not None else [f"site-{number + 1}" for number in range(num_clients or 0)]
    if num_clients is not None and num_clients != len(names):
        raise RecipeUnusable(f"num_clients is {num_clients}, but clients names {len(names)}", where=where)
    if not 1 <= len(names) <= most or len(set(names)) != len(names):
        raise RecipeUnusable(f"there must be 1 to {most} clients, each with its own name", where=where)
    for name in names:
        if not NAME.fullmatch(name):
            raise RecipeUnusable(f"client name {name!r} does not match {NAME_PATTERN}", where=where)
    return names


def gpus_of(names: Sequence[str], gpu_config: str | None) -> dict[str, str] | None:
    """Each client's CUDA_VISIBLE_DEVICES, the groups of `gpu_config` dealt in turn. Raises RecipeUnusable."""
    if gpu_config is None:
        return None
    text = gpu_config.replace(" ", "")
    if not GPUS.fullmatch(text):
        raise RecipeUnusable(
            f"gpu_config {gpu_config!r} is no list of GPUs", where="gpu_config", do='Write "0,1" or "[0,1],[2,3]".'
        )
    groups = [one.strip("[]") for one in re.findall(r"\[[\d,]+\]|\d+", text)]
    return {name: groups[number % len(groups)] for number, name in enumerate(names)}


def _check_own_lock(recipe: Recipe) -> None:
    """Raises RecipeUnusable where a lock that the author keeps is not what is installed; without one, all is well:
    code and packages are of this machine."""
    from fl.jobs.lock import LOCK_FILE

    file = recipe.folder / LOCK_FILE
    content = recipe.added.get(LOCK_FILE) or (file.read_bytes() if file.is_file() else None)
    if content is None:
        return
    from fl.jobs.lock import own_lock, refuse_broken
    from fl.jobs.packages import packages_here

    refuse_broken(own_lock(content), packages_here())


def data_folder(data: str | Path | Mapping[str, str | Path] | None, name: str) -> Path | None:
    """The folder of a client's data. Raises RecipeUnusable if it is named and not there."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        if name not in data:
            raise RecipeUnusable(f"there is no data for client {name}", where="data")
        folder = Path(data[name])
    else:
        folder = Path(data) / name
    if not folder.is_dir():
        raise RecipeUnusable(f"{folder} is not a folder", where="data")
    return folder.resolve()


def default_workspace() -> Path:
    """Where runs keep their results unless told otherwise."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "sealwright" / "runs"
