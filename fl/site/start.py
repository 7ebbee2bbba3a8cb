"""Run a site inside its guest: attend at the server, take part in approved jobs, come back after a cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from attestation.client import PAUSE_SECONDS
from attestation.errors import LeaseEnded, PeerLapsed, PeerRefused
from fl.errors import LeaseLapsed, PeerLost
from fl.guard.command import SignedCommand
from fl.guard.limits import Limits
from fl.party import Party
from fl.site.job import SiteJob
from fl.site.lasting_link import LastingLink
from fl.site.link import Attending
from fl.site.orders import Orders
from fl.transport.channel import connect
from fl.transport.frames import Finish, Left, Masking, Prepare, Steer, Told, Train
from fl.transport.route import Route
from policies.errors import SealwrightError
from policies.init_data import ServerAddress

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter

MAX_JOBS: Final = 4
"""Jobs that a site takes part in at the same time."""
MAX_TAKEN: Final = 100_000
"""Jobs that a site remembers; then it has to be started anew."""
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0
FORGOTTEN_SECONDS: Final = 120.0
"""A server that has restarted asks for its jobs within this time."""
LOOK_SECONDS: Final = 1.0
"""Between two looks whether a lease is back, this site's and the server's."""


def run(
    *,
    identity: Callable[[], Identity],
    charter: Callable[[], Charter],
    clock: Callable[[], datetime],
    server: Route | ServerAddress | str,
    server_name: str,
    data: Mapping[str, bytes],
    record: Callable[[str, Mapping[str, Any]], str],
    stop: threading.Event,
    tell: Callable[[str], None],
    limits: Limits | None = None,
    patience: float = 300.0,
    pause: float = PAUSE_SECONDS,
    connected: Callable[[], None] = lambda: None,
) -> None:
    """Take part in federated jobs until `stop` is set.

    - `identity`: the current identity of this guest, whose role is `site`; asked again at each connection and check.
    - `charter`: the current charter, verified; asked again for each decision.
    - `clock`: the time that the brokers vouch for.
    - `server`, `server_name`: the way to the server (a bare `host:port` is a direct one, by gRPC), and the name under
      which it is enrolled.
    - `data`: the site's decrypted files by name; scripts find them by `flare.data_path(name)`. They stay in memory.
    - `record`: writes `(kind, document)` into the ledger and returns the entry with its receipt as JSON text, or "".
      Called with `job` when an approved job is taken; if it raises, the job is not taken.
    - `stop`: ends it; running scripts are killed. So does a user of the site's own member with the right to operate
      (`seal site stop`).
    - `tell`: takes lines for the guest's log. Scripts' own output never goes there.
    - `limits`: what a script may use. `connected`: called at each connection.
    - `patience`: without a connection for so many seconds it gives up. Until then jobs go on with what they have.
    - `pause`: a lease that has ended, this site's or the server's, is waited for so many seconds. Jobs pause meanwhile:
      their scripts go on with what they have, nothing leaves, and they come back with the site.

    Raises PeerRefused at once if what answers at `server` is not the attested server `server_name` (a refusal is never
    waited out), PeerLost when `patience` has run out; PeerLapsed, LeaseLapsed or LeaseEnded when `pause` has.
    """
    party = Party(identity, charter, clock, record, tell)
    route = Route.of(server)
    where = route.addresses[0]
    site = _Site(party, route, server_name, data, limits or Limits())
    taken: set[str] = set()
    attending: list[Attending] = []
    ends = time.monotonic() + patience
    wait = FIRST_PAUSE
    paused_until: float | None = None
    known = False

    def accepted() -> None:
        nonlocal wait, paused_until, known
        tell(f"site {site.name} is connected to the attested server {server_name}")
        wait, paused_until, known = FIRST_PAUSE, None, True
        connected()

    def close_when_stopped() -> None:
        stop.wait()
        for one in attending:
            site.say_goodbye(one)
            one.close()

    threading.Thread(target=close_when_stopped, name="stop", daemon=True).start()
    try:
        while not stop.is_set():
            try:
                try:
                    with site.connected() as one:
                        attending[:] = [one]
                        site.attend(one, taken, accepted)
                finally:
                    if known:
                        ends, known = time.monotonic() + patience, False
            except (LeaseLapsed, PeerRefused, LeaseEnded) as lapse:
                if stop.is_set():
                    return
                if isinstance(lapse, PeerRefused) and not isinstance(lapse, PeerLapsed) and paused_until is None:
                    raise  # in a pause it may be the server's credential of before, which it renews as this site did
                now = time.monotonic()
                if paused_until is None:
                    tell(f"paused: {lapse.what}")
                    wait, paused_until = FIRST_PAUSE, now + pause
                if now >= paused_until:
                    raise
                ends = max(ends, now + patience)
            except _Steered as order:
                site.end_jobs(PeerLost(f"the site ends its jobs: {order.verb} by {order.user}", where=where))
                if order.verb == "stop":
                    return
                ends, wait, paused_until = time.monotonic() + patience, FIRST_PAUSE, None
                continue
            except PeerLost as lost:
                if stop.is_set():
                    return
                tell(lost.what)
                if time.monotonic() + wait > (ends if paused_until is None else max(ends, paused_until)):
                    unreached = f"the server {server_name} at {where} has not been reachable for {patience:.0f} s"
                    raise PeerLost(f"{unreached}: {lost.what}", where=where) from lost
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_PAUSE if paused_until is None else LOOK_SECONDS)
    finally:
        site.end_jobs(PeerLost("the site stops", where=where))


class _Steered(Exception):
    """A user has ordered the site to restart or to stop."""

    def __init__(self, signed: SignedCommand) -> None:
        super().__init__(signed.command.command)
        self.verb = signed.command.command
        self.user = signed.command.user


class _Site:
    """A site's jobs and the link that they have in common. For one thread."""

    def __init__(self, party: Party, route: Route, server_name: str, data: Mapping[str, bytes], limits: Limits) -> None:
        self._party = party
        self._route = route
        self._server_name = server_name
        self._data = data
        self._limits = limits
        self._link = LastingLink()
        self._jobs: dict[str, SiteJob] = {}
        self._orders: Orders | None = None
        self.name = ""

    @contextmanager
    def connected(self) -> Iterator[Attending]:
        """Connect and attend. Raises PeerRefused, PeerLapsed, LeaseLapsed, LeaseEnded, PeerLost."""
        own = self._party.identity()
        self.name = own.name
        if self._orders is None:
            self._orders = Orders(self._party, own.name, self._server_name)
        with connect(
            self._route,
            server=self._server_name,
            tls_key=own.tls_key_pem,
            certificate_pem=own.certificate_pem,
            charter=self._party.charter,
            clock=self._party.clock,
            here=("site", own.name),
        ) as connection:
            attending = Attending(self._party, connection)
            try:
                yield attending
            finally:
                self._link.pause()
                attending.close()

    def attend(self, attending: Attending, taken: set[str], accepted: Callable[[], None]) -> None:
        """Take part in jobs until the connection ends, which is raised; jobs that were paused go on."""
        paused = {job_id for job_id, job in self._jobs.items() if job.thread.is_alive()}

        def begin() -> None:
            self._link.attach(attending)
            accepted()

        forget = threading.Timer(FORGOTTEN_SECONDS, self._end_forgotten, (paused,))
        forget.daemon = True
        forget.start()
        try:
            self._take_part(attending, taken, paused, begin)
        finally:
            forget.cancel()

    def _end_forgotten(self, paused: set[str]) -> None:
        """End the jobs of before of which the server has said nothing since this site is back: it has them no more."""
        for job_id in list(paused):
            job = self._jobs.get(job_id)
            if job is not None:
                self._party.tell(f"job {job_id}: the server does not have it any more")
                job.stop()

    def _take_part(self, attending: Attending, taken: set[str], paused: set[str], begin: Callable[[], None]) -> None:
        for frame in attending.frames(begin):
            jobs = self._jobs = {job_id: job for job_id, job in self._jobs.items() if job.thread.is_alive()}
            if isinstance(frame, Steer):
                self._steer(frame, attending)
                continue
            job = jobs.get(frame.job)
            if isinstance(frame, Prepare):
                if job is not None and frame.job in paused:
                    paused.discard(frame.job)
                    job.resume()
                    continue
                if job is not None:
                    self._party.tell(f"job {frame.job} runs here already")
                    continue
                self._begin(frame, attending, taken)
            elif isinstance(frame, Told):
                self._heed(frame, job)
            elif job is not None and isinstance(frame, Train | Masking):
                job.train(frame)
            elif job is not None and isinstance(frame, Finish):
                job.finish()

    def _heed(self, told: Told, job: SiteJob | None) -> None:
        """A user's command: what it stops here is ended, as if the server had said so."""
        if self._orders is None:
            return
        signed = self._orders.heed(told, None if job is None else job.submitter)
        if signed is not None and job is not None and signed.command.command in {"abort", "reject"}:
            self._party.tell(f"job {told.job}: {signed.command.command} by {signed.command.user}")
            job.finish()

    def _steer(self, frame: Steer, attending: Attending) -> None:
        """A user's command about the site itself. Raises _Steered if it is to be done."""
        signed = None if self._orders is None else self._orders.steered(frame)
        if signed is not None:
            why = "the site stops" if signed.command.command == "stop" else "the site restarts"
            self._party.tell(f"{why}: {signed.command.user} wants it")
            self.say_goodbye(attending, why)
            raise _Steered(signed)

    def say_goodbye(self, attending: Attending, why: str = "the site stops") -> None:
        """Jobs end here: without this the server would wait for the site to come back to them."""
        for job_id, job in list(self._jobs.items()):
            if job.thread.is_alive():
                attending.send(Left(job=job_id, reasons=(why,)))
        attending.flush()

    def end_jobs(self, why: SealwrightError) -> None:
        """End all jobs: there is no connection on which they could go on."""
        self._link.end(why)
        for job in self._jobs.values():
            job.stop()
        for job in self._jobs.values():
            job.thread.join(10)
        self._jobs, self._link = {}, LastingLink()

    def _begin(self, frame: Prepare, attending: Attending, taken: set[str]) -> None:
        orders = self._orders
        if orders is None:
            return
        why = orders.why_rejected(frame.job) or _why_not(frame.job, len(self._jobs), taken)
        if why is not None:
            self._party.tell(f"job {frame.job} is not taken: {why}")
            attending.send(Left(job=frame.job, reasons=(why,)))
            return
        attending.check_server()
        taken.add(frame.job)
        party, data, limits = self._party, self._data, self._limits
        job = SiteJob(party, self.name, self._server_name, self._link, data, limits, frame, orders.log)
        self._jobs[frame.job] = job
        job.thread.start()


def _why_not(job: str, running: int, taken: set[str]) -> str | None:
    """Why a job is not begun here, if it is not. A job begins once: asked again, it would let more out than agreed."""
    if job in taken:
        return "it was taken here before"
    if running >= MAX_JOBS:
        return f"{MAX_JOBS} other jobs run here"
    if len(taken) >= MAX_TAKEN:
        return f"{MAX_TAKEN} jobs were taken here since the site's start"
    return None
