"""The server's calls, whatever carries them: sites attend, fetch, deliver; users' calls are in `fl.server.user_calls`.

Every call is judged by its caller's certificate, which TLS has proved: a site's by its appraisal at attendance and by
its lease, a user's by the charter, each time. What a caller did wrong is told to it with every reason and to the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from attestation.errors import LeaseEnded
from fl.edge.parent import TreeCalls, TreeJob
from fl.errors import LeaseLapsed, MalformedMessage, PeerLost, RoundOver, UpdateRefused
from fl.guard.gate import max_update_size
from fl.party import Party
from fl.server.administration import Steering
from fl.server.attendance import Attendance, Attendances
from fl.server.calls import (
    Call,
    Caller,
    CallerGone,
    StoppedSending,
    first_frame,
    only_frame,
    refusal_of,
    unstalled,
    untaken,
)
from fl.server.job import ServerJob
from fl.server.job_store import JobStore
from fl.server.jobs import Jobs
from fl.server.room import Room
from fl.server.user_calls import UserCalls
from fl.transport.chunks import serve_chunks
from fl.transport.frames import (
    FROM_ATTENDING_SITE,
    Away,
    Deliver,
    Fetch,
    Lease,
    Left,
    Logged,
    Masking,
    Pull,
    Ready,
    Said,
    Verdict,
    pack,
    unpack,
)
from fl.transport.port import GONE_SECONDS
from policies.errors import SealwrightError

MAX_CALLS_EACH: Final = 32
"""Calls of one caller at the same time."""
PULLS_AT_ONCE: Final = 8
"""Updates that are received at the same time; the others wait at their sites."""
END_SECONDS: Final = 2.0
"""How much later than a delivery that is malformed the end of its site's connection may be noticed."""
CUT_SECONDS: Final = GONE_SECONDS + 5.0
"""The same for one that breaks off, which may be the first that is seen of a cut."""
MAX_LOGGED_A_ROUND: Final = 20_000
"""Values that a site may log in a round. An honest site's own bound is half of it."""


class FederationService:
    """The jobs and the connected sites of one server."""

    def __init__(
        self,
        party: Party,
        name: str,
        model_key: bytes,
        store: JobStore | None = None,
        steer: Callable[[Steering], None] = lambda _: None,
    ) -> None:
        """`store`: keeps the jobs; those in it that are not over go on. `steer`: restarts or stops the server."""
        self._party = party
        self._lock = threading.Lock()
        self._spool = None if store is None else store.spool
        self._rooms = {False: Room(), True: Room(0 if self._spool is None else self._spool.free // 2)}
        """For updates in memory, and for those in the spool."""
        self._pulls = threading.BoundedSemaphore(PULLS_AT_ONCE)
        self._calls: dict[bytes, int] = {}
        self.attendances = Attendances(self._site_joined, self._site_left)
        self._jobs = Jobs(party, self.attendances.all, store)
        users = UserCalls(party, name, model_key, self._jobs, self.attendances.all, steer, store)
        tree = TreeCalls(party, "server", self._trees)
        self._streamed: dict[str, Call] = {
            "Attend": self._attend,
            "Deliver": self._deliver,
            **users.streamed,
            **tree.streamed,
        }
        self._asked: dict[str, Call] = {"Fetch": self._fetch, **users.asked, **tree.asked}
        users.go_on()

    @property
    def streamed(self) -> tuple[str, ...]:
        """The calls that take a stream of frames."""
        return tuple(self._streamed)

    @property
    def asked(self) -> tuple[str, ...]:
        """The calls that take one frame."""
        return tuple(self._asked)

    def appraise(self) -> bytes:
        """The server's current EARs, which are no secret: whoever connects appraises the server by them first.

        Raises Refusal while there are none.
        """
        try:
            return pack(Lease(ears=self._party.identity().ears))
        except SealwrightError as error:
            raise refusal_of(error) from error

    def answer(self, name: str, request: Iterator[bytes] | bytes, caller: Caller) -> Iterator[bytes]:
        """Answer the call `name`: frames, made as they are taken. Raises Refusal, which the log has then, too.

        A caller that does not take a frame for STALL_SECONDS is cut off.
        """
        method = self._streamed.get(name) or self._asked[name]
        try:
            with self._counted(caller.certificate):
                yield from untaken(method(request, caller), caller)
        except SealwrightError as error:
            self._party.tell(f"refused {caller.who}: {error.what}")
            raise refusal_of(error) from error

    def close(self, why: str) -> None:
        """Stop all jobs and end all connections."""
        self._jobs.stop(why)
        for attendance in self.attendances.all():
            attendance.end(why)
        self._jobs.close(why)

    def _trees(self) -> dict[str, TreeJob]:
        """The edge jobs that run, by id."""
        return {job.id: job.tree for job in self._jobs.all() if job.tree is not None}

    # sites

    def _attend(self, requests: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        lease = first_frame(unstalled(requests, caller), Lease)
        attendance = Attendance(self._party, caller.certificate, lease)
        caller.when_over(lambda: attendance.end("its connection ended"))
        reader = threading.Thread(
            target=self._read_attendance, args=(attendance, requests), name=f"from {attendance.name}", daemon=True
        )
        self.attendances.add(attendance)
        self._party.tell(f"site {attendance.name} is connected")
        reader.start()
        try:
            while not attendance.ended:
                if (own := attendance.own_lease()) is not None:
                    yield pack(own)
                if (frame := attendance.next_frame()) is not None:
                    yield pack(frame)
                attendance.check()
        except LeaseEnded as error:
            attendance.fail(error)
        finally:
            attendance.end("its connection ended")
            self.attendances.remove(attendance)
            self._party.tell(f"site {attendance.name} is gone: {attendance.why}")
        if attendance.cause is not None:
            raise attendance.cause

    def _read_attendance(self, attendance: Attendance, requests: Iterator[bytes]) -> None:
        name = attendance.name
        try:
            for raw in requests:
                frame, _ = unpack(FROM_ATTENDING_SITE, raw, where=name)
                if isinstance(frame, Lease):
                    attendance.renew(frame)
                    continue
                if isinstance(frame, Away):
                    attendance.fail(LeaseLapsed(f"site {name} pauses: {frame.why}", where=f"site/{name}"))
                    return
                job = self._jobs.find(frame.job)
                if job is None or name not in job.signed.record.roster:
                    raise MalformedMessage("a frame is about a job that is not the site's", where=name)
                if isinstance(frame, Ready):
                    job.ready(attendance)
                elif isinstance(frame, Left):
                    job.left(name, "; ".join(frame.reasons))
                elif isinstance(frame, Masking):
                    job.heard(name, frame)
                elif isinstance(frame, Said):
                    job.said(name, frame.text, frame.round)
                elif isinstance(frame, Logged):
                    job.logged(name, frame.key, frame.value, frame.step, most=MAX_LOGGED_A_ROUND)
        except SealwrightError as error:
            attendance.fail(error)
        except CallerGone:
            attendance.end("its connection broke")
        else:
            attendance.end("it hung up")

    def _site_joined(self, attendance: Attendance) -> None:
        for job in self._jobs.all():
            job.connected(attendance)

    def _site_left(self, attendance: Attendance) -> None:
        for job in self._jobs.all():
            if attendance.lapsed or attendance.cause is None:
                job.away(attendance.name, attendance.why, cut=not attendance.lapsed)
            else:
                job.left(attendance.name, attendance.why or "its connection ended")

    def _attending(self, caller: Caller, job_id: str) -> tuple[Attendance, ServerJob]:
        attendance = self.attendances.of_certificate(caller.certificate)
        if attendance is None or attendance.ended:
            raise LeaseLapsed("the caller does not attend", where="connection")
        attendance.check()
        if attendance.cause is not None:
            raise attendance.cause
        job = self._jobs.find(job_id)
        if job is None or attendance.name not in job.signed.record.roster:
            raise PeerLost(f"there is no job {job_id} for {attendance.name}", where="job")
        return attendance, job

    def _fetch(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        head = only_frame(request, Fetch)
        attendance, job = self._attending(caller, head.job)
        if head.what == "file" and (file := job.file(head.sha256)) is not None:
            return _while_attending(attendance, serve_chunks(file, head.offset))
        if head.what == "bundle" and head.sha256 == job.bundle.digest:
            return _while_attending(attendance, serve_chunks(job.bundle.raw, head.offset))
        if head.what == "model":
            job.await_turn(attendance, None)
        model = job.model(head.sha256) if head.what == "model" else None
        if model is None and head.what == "model":  # a server that took the job up does not serve it yet
            job.await_turn(attendance, None)
            model = job.model(head.sha256)
        if model is None and head.what == "model" and not job.status.over:
            raise RoundOver(f"job {head.job} serves another model now")
        if model is None:
            raise PeerLost(f"job {head.job} serves no {head.what} {head.sha256}", where="job")
        return _while_attending(attendance, serve_chunks(model, head.offset))

    def _deliver(self, requests: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        yield from self._receive_update(unstalled(requests, caller), caller)

    def _receive_update(self, requests: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        head = first_frame(requests, Deliver)
        attendance, job = self._attending(caller, head.job)
        name = attendance.name
        job.await_turn(attendance, head.round)
        if job.is_settled(name, head.round):  # it came whole before a cut, its verdict did not; or it comes too late
            yield pack(Verdict(accepted=True))
            return
        settings = job.bundle.settings
        limit = max_update_size(settings.schema_of_update)
        if settings.cross_site_evaluation:  # a site's own model is never encoded
            limit = max(limit, max_update_size(settings.schema_of_model))
        if not 0 < head.size <= limit:
            error = UpdateRefused(name, (f"it has {head.size} bytes, more than the {limit} of an update",))
            job.left(name, error.reasons[0])
            yield pack(Verdict(accepted=False, reasons=error.reasons))
            return
        try:
            with self._pulls, self._room_for(head.size) as give_back, job.arriving(name, head) as assembly:
                yield pack(Pull(offset=assembly.at))
                assembly.take(_while_attending(attendance, requests))
                memory = assembly.leave_open()
                memory.on_close = give_back()
                job.deliver(name, head, memory)
        except UpdateRefused as refusal:
            yield pack(_verdict(refusal.reasons))
        except MalformedMessage as error:
            if attendance.ends_within(CUT_SECONDS if isinstance(error, StoppedSending) else END_SECONDS):
                raise  # why the connection ended decides over the site
            job.left(name, f"its delivery failed: {error.what}")
            yield pack(_verdict((error.what,)))
        else:
            yield pack(Verdict(accepted=True))

    @contextmanager
    def _room_for(self, size: int) -> Iterator[Callable[[], Callable[[], None]]]:
        """Room for an update. What is yielded gives the duty to give it back to its caller."""
        room, owed = self._rooms[self._spool is not None and self._spool.takes(size)], [True]

        def hand_over() -> Callable[[], None]:
            owed.clear()
            return lambda: room.give_back(size)

        room.take(size)
        try:
            yield hand_over
        finally:
            if owed:
                room.give_back(size)

    @contextmanager
    def _counted(self, certificate: bytes) -> Iterator[None]:
        """One of a caller's calls. Raises PeerLost when it has MAX_CALLS_EACH under way already."""
        with self._lock:
            if self._calls.get(certificate, 0) >= MAX_CALLS_EACH:
                raise PeerLost(f"the caller has {MAX_CALLS_EACH} calls under way already", where="call")
            self._calls[certificate] = self._calls.get(certificate, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[certificate] -= 1
                if not self._calls[certificate]:
                    del self._calls[certificate]


def _while_attending(attendance: Attendance, frames: Iterator[bytes]) -> Iterator[bytes]:
    """`frames` as long as the site attends. Raises what ended its attendance."""
    for frame in frames:
        if attendance.ended:
            raise attendance.cause or PeerLost(f"site {attendance.name} does not attend any more", where="connection")
        yield frame


def _verdict(reasons: tuple[str, ...]) -> Verdict:
    return Verdict(accepted=False, reasons=tuple(reason[:2000] for reason in reasons[:64]))
