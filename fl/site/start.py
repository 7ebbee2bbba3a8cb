"""Run a site inside its guest: attend at the server, take part in approved jobs, come back after a cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from fl.errors import PeerLost
from fl.guard.limits import Limits
from fl.party import Party
from fl.site.job import SiteJob
from fl.site.link import Attending
from fl.transport.channel import connect
from fl.transport.frames import Finish, Left, Prepare, Train

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter

MAX_JOBS: Final = 4
"""Jobs that a site takes part in at the same time."""
MAX_TAKEN: Final = 100_000
"""Jobs that a site remembers; then it has to be started anew."""
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0


def run(
    *,
    identity: Callable[[], Identity],
    charter: Callable[[], Charter],
    clock: Callable[[], datetime],
    server: str,
    server_name: str,
    data: Mapping[str, bytes],
    record: Callable[[str, Mapping[str, Any]], str],
    stop: threading.Event,
    tell: Callable[[str], None],
    limits: Limits | None = None,
    patience: float = 60.0,
    connected: Callable[[], None] = lambda: None,
) -> None:
    """Take part in federated jobs until `stop` is set.

    - `identity`: the current identity of this guest, whose role is `site`; asked again at each connection and check.
    - `charter`: the current charter, verified; asked again for each decision.
    - `clock`: the time that the brokers vouch for.
    - `server`, `server_name`: the server's `host:port`, and the name under which it is enrolled.
    - `data`: the site's decrypted files by name; scripts find them by `flare.data_path(name)`. They stay in memory.
    - `record`: writes `(kind, document)` into the ledger and returns the entry with its receipt as JSON text, or "".
      Called with `job` when an approved job is taken; if it raises, the job is not taken.
    - `stop`: ends it; running scripts are killed.
    - `tell`: takes lines for the guest's log. Scripts' own output never goes there.
    - `limits`: what a script may use. `connected`: called at each connection.
    - `patience`: without a connection for so many seconds it gives up.

    Raises PeerRefused at once if what answers at `server` is not the attested server `server_name` (a refusal is never
    waited out), PeerLost when `patience` has run out.
    """
    party = Party(identity, charter, clock, record, tell)
    taken: set[str] = set()
    deadline = time.monotonic() + patience
    pause = FIRST_PAUSE
    current: list[Attending] = []

    def close_when_stopped() -> None:
        stop.wait()
        for attending in current:
            attending.close()

    threading.Thread(target=close_when_stopped, name="stop", daemon=True).start()
    while not stop.is_set():
        try:
            own = identity()
            with connect(
                server,
                server=server_name,
                tls_key=own.tls_key_pem,
                certificate_pem=own.certificate_pem,
                charter=charter(),
                at=clock(),
            ) as connection:
                attending = Attending(party, connection)
                current[:] = [attending]
                tell(f"site {own.name} is connected to the attested server {server_name}")
                connected()
                pause = FIRST_PAUSE
                try:
                    _attend(party, own.name, server_name, attending, data, limits or Limits(), taken)
                finally:
                    attending.close()
                    deadline = time.monotonic() + patience
        except PeerLost as lost:
            if stop.is_set():
                return
            tell(lost.what)
            if time.monotonic() + pause > deadline:
                raise PeerLost(
                    f"the server {server_name} at {server} has not been reachable for {patience:.0f} s: {lost.what}",
                    where=server,
                ) from lost
            stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _attend(
    party: Party,
    site: str,
    server: str,
    attending: Attending,
    data: Mapping[str, bytes],
    limits: Limits,
    taken: set[str],
) -> None:
    jobs: dict[str, SiteJob] = {}
    try:
        for frame in attending.frames():
            jobs = {job_id: job for job_id, job in jobs.items() if job.thread.is_alive()}
            job = jobs.get(frame.job)
            if isinstance(frame, Prepare):
                if job is not None:
                    party.tell(f"job {frame.job} runs here already")
                    continue
                why = _why_not(frame.job, len(jobs), taken)
                if why is not None:
                    party.tell(f"job {frame.job} is not taken: {why}")
                    attending.send(Left(job=frame.job, reasons=(why,)))
                    continue
                taken.add(frame.job)
                jobs[frame.job] = SiteJob(party, site, server, attending, data, limits, frame)
                jobs[frame.job].thread.start()
            elif job is not None and isinstance(frame, Train):
                job.train(frame)
            elif job is not None and isinstance(frame, Finish):
                job.finish()
    finally:
        for job in jobs.values():
            job.stop()
        for job in jobs.values():
            job.thread.join(10)


def _why_not(job: str, running: int, taken: set[str]) -> str | None:
    """Why a job is not begun here, if it is not. A job begins once: asked again, it would let more out than agreed."""
    if job in taken:
        return "it was taken here before"
    if running >= MAX_JOBS:
        return f"{MAX_JOBS} other jobs run here"
    if len(taken) >= MAX_TAKEN:
        return f"{MAX_TAKEN} jobs were taken here since the site's start"
    return None
