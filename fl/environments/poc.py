"""PocEnv: all services of production on this machine, on the virtual platform, started by one call.

They are processes of the `seal` command (`seal poc`): a broker, a server and one guest for each site, from a charter
of one member that is made anew and approves the recipe's bundle. Then the recipe runs as in ProdEnv. Nothing here
protects anything: one member decides alone, and the platform is virtual, as every record says.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from fl.environments.poc_devices import PocDevices
from fl.environments.prod import ProdEnv
from fl.environments.sim import client_names, data_folder
from fl.errors import PeerLost, RecipeUnusable
from fl.run import Run

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe

MAX_CLIENTS: Final = 64
START_SECONDS: Final = 180.0
"""How long everything may take to be up, and half as long again for each client."""
STOP_SECONDS: Final = 30.0


class PocEnv:
    """Run a recipe over real services on this machine. `stop` ends them, and so does the end of this process."""

    def __init__(
        self,
        clients: Sequence[str] | None = None,
        num_clients: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        *,
        data: str | Path | Mapping[str, str | Path] | None = None,
        workspace_root: str | Path | None = None,
    ) -> None:
        """Arguments:

        - `clients` or `num_clients`: the sites' names, or how many (then `site-1`, `site-2`, ...). For a job of devices
          these are its gateways.
        - `gpu_ids`: must be empty: a site's sandbox has no GPU on the virtual platform.
        - `data`: what `flare.data_path` finds: a folder with a subfolder per site, or a folder for each; it is sealed.
        - `workspace_root`: where results go (default: `~/.local/share/sealwright/runs`).

        Raises RecipeUnusable with the argument that is wrong.
        """
        self.clients = client_names(clients, num_clients, most=MAX_CLIENTS, where="PocEnv")
        if gpu_ids:
            raise RecipeUnusable(
                f"the virtual platform's sites have no GPU {gpu_ids[0]}",
                where="gpu_ids",
                do="Use SimEnv(gpu_config=...).",
            )
        self._data = {name: folder for name in self.clients if (folder := data_folder(data, name)) is not None}
        self._workspace = workspace_root
        self._services: _Services | None = None
        self._devices: PocDevices | None = None

    def execute(self, recipe: Recipe) -> Run:
        """Start the services, if they do not run with this recipe's bundle already, and submit the job.

        Raises PeerLost with what `seal poc` said if they do not come up, and what ProdEnv raises.
        """
        if recipe.settings.min_clients > len(self.clients):
            raise RecipeUnusable(
                f"the recipe needs {recipe.settings.min_clients} clients, there are {len(self.clients)}",
                where="min_clients",
            )
        edge = recipe.settings.recipe == "fedbuff"
        devices = PocDevices(recipe, len(self.clients)) if edge else None
        digest = recipe.bundle().digest
        if self._services is None or self._services.bundle != digest or not self._services.alive:
            self.stop()
            self._services = _Services(self.clients, self._data, recipe)
        self._leave()
        env = ProdEnv(self._services.kit, workspace_root=self._workspace, sites=self.clients)
        run = env.execute(recipe)
        if devices is not None:
            devices.play(env, run, self._services.told)
            self._devices = devices
        return run

    def stop(self) -> None:
        """End the services; a job that runs ends with them. Results that were fetched stay."""
        self._leave()
        services, self._services = self._services, None
        if services is not None:
            services.stop()

    def _leave(self) -> None:
        """Simulated devices of an earlier job go."""
        devices, self._devices = self._devices, None
        if devices is not None:
            devices.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self.stop()


class _Services:
    """The process of `seal poc`, from its start until all that it started has ended."""

    def __init__(self, sites: Sequence[str], data: Mapping[str, Path], recipe: Recipe) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sealwright-poc-"))
        self.bundle = recipe.export(self._folder / "bundle")
        option = "--gateway" if recipe.settings.recipe == "fedbuff" else "--site"
        words = [word for site in sites for word in (option, site)]
        words += [word for site, folder in data.items() for word in ("--data", f"{site}={folder}")]
        words += ["--bundle", str(self._folder / "bundle" / "job.bundle"), "--json"]
        self._said = self._folder / "seal-poc.log"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [*_seal(), "poc", str(self._folder / "poc"), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._process, self._folder)
        self.told = self._await_told(START_SECONDS * (1 + len(sites) / 2))
        """What `seal poc` has said: the kit, and of gateways where they are, and how devices are let in."""
        self.kit = Path(self.told["kit"])

    @property
    def alive(self) -> bool:
        """Whether the services run, as far as they say."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End them."""
        self._end()

    def _await_told(self, seconds: float) -> dict[str, Any]:
        output, deadline = self._process.stdout, time.monotonic() + seconds
        raw = b""
        while output is not None and (left := deadline - time.monotonic()) > 0:
            if not select.select([output], [], [], left)[0]:
                break
            piece = os.read(output.fileno(), 1 << 16)
            raw += piece
            try:
                told: dict[str, Any] = json.loads(raw)
                _ = told["kit"]
                return told
            except (ValueError, KeyError, TypeError):
                if not piece:
                    break
        words = _refusal(raw) or self._said.read_text(errors="replace").strip()[-2000:] or "it said nothing"
        self.stop()
        raise PeerLost(f"the services did not come up: {words}", where="seal poc")


def _refusal(raw: bytes) -> str:
    """Why the command ended, if it said so on its output."""
    try:
        error = json.loads(raw)["error"]
        return "; ".join([str(error["what"]), *map(str, error.get("reasons", []))])
    except (ValueError, KeyError, TypeError):
        return ""


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Let `seal poc` end what it started, and itself; then its folder goes, with every key in it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # the kernel tells what it started that it has died
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


def _seal() -> list[str]:
    """The `seal` command beside this interpreter, or on the path. Raises RecipeUnusable."""
    beside = Path(sys.executable).with_name("seal")
    found = str(beside) if beside.is_file() else shutil.which("seal")
    if found is None:
        raise RecipeUnusable("the command `seal` is not installed", where="PocEnv", do="pip install sealwright")
    return [found]
