"""ProdEnv: the consortium's own server and sites, attested, through a user's kit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fl.environments.kit import CurrentCharter, Kit, current_charter, open_kit
from fl.environments.sim import default_workspace
from fl.environments.user_client import UserClient
from fl.errors import JobAborted, JobFailed, KitUnusable, PeerLost
from fl.jobs.bundle import Bundle
from fl.jobs.progress import JobEvent, Status
from fl.jobs.results import JOB_FILE
from fl.run import Run
from fl.tracking import track_result
from fl.transport.memory import SealedMemory

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe

SO_FAR_SECONDS: Final = 2.0
"""How long what happened so far may take to come; what comes later is not waited for."""


class ProdEnv:
    """Run a recipe on the consortium's server and sites."""

    def __init__(
        self,
        startup_kit_location: str | Path,
        login_timeout: float = 10.0,
        username: str | None = None,
        *,
        sites: Sequence[str] | None = None,
        recipients: Sequence[str] | None = None,
        workspace_root: str | Path | None = None,
    ) -> None:
        """Arguments:

        - `startup_kit_location`: the folder of a user's kit (`fl.environments.kit` lists its files).
        - `login_timeout`: how many seconds to wait for a broker.
        - `username`: the kit's user, `MEMBER/USER` or `USER`; given only to be sure that it is the right kit.
        - `sites`: the roster (default: all sites for which the bundle is approved).
        - `recipients`: who gets the result, as `MEMBER/USER` (default: the submitter).
        - `workspace_root`: where results go (default: `~/.local/share/sealwright/runs`).

        Raises KitUnusable.
        """
        self.kit = open_kit(Path(startup_kit_location))
        if username is not None and username not in {self.kit.user, self.kit.file.user}:
            raise KitUnusable(f"this is the kit of {self.kit.user}, not of {username}", where=str(startup_kit_location))
        self._login_timeout = login_timeout
        self._sites = None if sites is None else tuple(sites)
        self._recipients = tuple(recipients) if recipients is not None else (self.kit.user,)
        self._workspace = (Path(workspace_root) if workspace_root is not None else default_workspace()).absolute()

    def execute(self, recipe: Recipe) -> Run:
        """Submit the job. Its bundle has to be approved in the charter."""
        bundle = recipe.bundle()
        with recipe.first_model() as model:
            return self.submit(bundle, model, recipe.large)

    def submit(self, bundle: Bundle, model: SealedMemory, files: Mapping[str, Path] | None = None) -> Run:
        """Submit a bundle with a first model, and its large files, by digest.

        Raises RecipeUnusable for a file that is not there, ApprovalRefused, PeerRefused, PeerLost, BrokerUnavailable.
        """
        with self.connected() as (client, _):
            job = client.submit(bundle, model, roster=self._sites, recipients=self._recipients, files=files)
        return self.run(job)

    def run(self, job: str) -> Run:
        """A job that was submitted before, by its id."""
        return Run(job, _SubmittedJob(self, job, self._workspace / job))

    @contextmanager
    def connected(self) -> Iterator[tuple[UserClient, CurrentCharter]]:
        """A connection to the server, appraised by the charter as it is now."""
        kit: Kit = self.kit
        with (
            current_charter(kit, self._login_timeout) as current,
            UserClient.connected(kit, current.charter, current.at) as client,
        ):
            yield client, current


class _SubmittedJob:
    """The handle of a job at the server."""

    def __init__(self, env: ProdEnv, job: str, folder: Path) -> None:
        self._env = env
        self._job = job
        self._folder = folder

    def status(self) -> Status:
        with self._env.connected() as (client, _):
            return client.report(self._job).status

    def abort(self) -> None:
        with self._env.connected() as (client, _):
            client.abort(self._job)

    def watch(self, observe: Callable[[JobEvent], None]) -> Status:
        with self._env.connected() as (client, _):
            for event in client.watch(self._job):
                observe(event)
            return client.report(self._job).status

    def events(self) -> list[JobEvent]:
        found: list[JobEvent] = []
        with self._env.connected() as (client, _):
            try:
                for event in client.watch(self._job, timeout=SO_FAR_SECONDS):
                    found.append(event)  # noqa: PERF402 - what came before the time was up counts
            except PeerLost:
                if client.report(self._job).status.over:
                    raise  # it was no wait for what is to come
        return found

    def logs(self) -> dict[str, str]:
        return {}

    def result(self, timeout: float | None) -> Path:
        with self._env.connected() as (client, _):
            for _event in client.watch(self._job, timeout=timeout):
                pass
            report = client.report(self._job)
        if report.status is Status.FAILED:
            raise JobFailed(self._job, report.reasons or ("the server gave no reason",))
        if report.status is Status.ABORTED:
            raise JobAborted(self._job, "; ".join(report.reasons) or "someone")
        # The server's EAR in the statement may be newer than the charter and the time from before the wait.
        from attestation.client import ledger_keys

        with self._env.connected() as (client, current):
            folder = client.download(self._job, self._folder, ledgers=ledger_keys(current.charter))
        track_result(folder, json.loads((folder / JOB_FILE).read_bytes()))
        return folder
