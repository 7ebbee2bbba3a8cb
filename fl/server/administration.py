"""What users ask of a server and its sites themselves: how they stand, start anew, stop.

No shell and no path: a place is a name of the charter, and what can be asked of it is one of two words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Final, Literal, Protocol, TypeAlias

from fl.errors import PeerLost
from fl.guard.command import SignedCommand
from fl.jobs.results import rfc3339
from fl.party import Party
from fl.server.attendance import Attendance
from fl.server.calls import Call, Caller
from fl.server.jobs import Jobs
from fl.transport.frames import Places, SiteReport, Steer, Verdict, pack
from policies.rights import Command

Steering: TypeAlias = Literal["restart", "stop"]
LISTED_SITES: Final = 300
"""The sites that are told of, the connected ones first."""
OBEYED_SECONDS: Final = 10.0
"""How long a site may take to do what it was asked; by its own judgement it may not do it at all."""


class Judge(Protocol):
    """Judges an order, and writes down what came of it."""

    def __call__(self, request: bytes, caller: Caller, *verbs: Command) -> SignedCommand:
        """The order. Raises what refuses it."""


class Administration:
    """The calls about places of one server's service."""

    def __init__(
        self,
        party: Party,
        server: str,
        jobs: Jobs,
        attending: Callable[[], list[Attendance]],
        judge: Judge,
        steer: Callable[[Steering], None],
    ) -> None:
        """`steer`: restarts or stops this server; it returns at once."""
        self._party = party
        self._server = server
        self._jobs = jobs
        self._attending = attending
        self._judge = judge
        self._steer = steer
        self._serving: datetime = party.clock()

    @property
    def asked(self) -> dict[str, Call]:
        """Calls with one frame, by method."""
        return {"Places": self._places, "Steer": self._steered}

    def _places(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        self._judge(request, caller, "list")
        charter = self._party.charter()
        own = charter.enrolment("server", self._server)
        connected = {one.name: one for one in self._attending()}
        names = sorted(
            (place for place in charter.enrolments() if place.role == "site"),
            key=lambda place: (place.name not in connected, place.name),
        )
        running = [job for job in self._jobs.all() if not job.status.over]
        yield pack(
            Places(
                server=self._server,
                member="" if own is None else own.member,
                serving=rfc3339(self._serving),
                charter_version=charter.version,
                keeps_jobs=self._jobs.lasting,
                jobs=dict(Counter(job.status for job in self._jobs.all())),
                sites=tuple(
                    SiteReport(
                        name=place.name,
                        member=place.member,
                        connected=None if (one := connected.get(place.name)) is None else rfc3339(one.since),
                        lease_until=None if one is None else rfc3339(one.good_until),
                        jobs={
                            job.id: job.journal.state_of(place.name)
                            for job in running
                            if place.name in job.signed.record.roster
                        },
                    )
                    for place in names[:LISTED_SITES]
                ),
            )
        )

    def _steered(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        signed = self._judge(request, caller, "restart", "stop")
        verb: Steering = "stop" if signed.command.command == "stop" else "restart"
        self._party.tell(f"{signed.command.place}: {verb} by {signed.command.user}")
        if signed.command.place == self._server:
            caller.when_over(lambda: self._steer(verb))  # the answer goes first
            yield pack(Verdict(accepted=True))
            return
        attendance = next((one for one in self._attending() if one.name == signed.command.place), None)
        if attendance is None:
            raise PeerLost(f"site {signed.command.place} is not connected", where="site")
        attendance.send(Steer(command=signed.token))
        if not attendance.ends_within(OBEYED_SECONDS):
            raise PeerLost(
                f"site {attendance.name} has not done so within {OBEYED_SECONDS:.0f} s: its own log says why",
                where="site",
            )
        yield pack(Verdict(accepted=True))
