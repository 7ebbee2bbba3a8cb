"""The server's gRPC service: sites attend, fetch and deliver; what users may call is in `fl.server.user_calls`.

Every call is judged by its caller's certificate, which TLS has proved: a site's by its appraisal at attendance and by
its lease, a user's by the charter, each time. What a caller did wrong is told to it with every reason and to the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc

from attestation.errors import LeaseEnded
from fl.errors import LeaseLapsed, MalformedMessage, PeerLost, UpdateRefused
from fl.guard.gate import max_update_size
from fl.party import Party
from fl.server.attendance import Attendance, Attendances
from fl.server.calls import certificate_of, first_frame, only_frame, refusal_details, status_of, unstalled
from fl.server.job import ServerJob
from fl.server.jobs import Jobs
from fl.server.user_calls import UserCalls
from fl.transport.chunks import assemble, serve_chunks
from fl.transport.frames import (
    FROM_ATTENDING_SITE,
    METHOD_PREFIX,
    Away,
    Deliver,
    Fetch,
    Lease,
    Left,
    Logged,
    Pull,
    Ready,
    Verdict,
    pack,
    unpack,
)
from policies.errors import SealwrightError

MAX_CALLS_EACH: Final = 32
"""Calls of one caller at the same time."""
PULLS_AT_ONCE: Final = 8
"""Updates that are received at the same time; the others wait at their sites."""
END_SECONDS: Final = 2.0
"""How much later than a delivery that breaks off the end of its site's connection may be noticed."""
MAX_LOGGED_A_ROUND: Final = 20_000
"""Values that a site may log in a round. An honest site's own bound is half of it."""

Call = Callable[[Any, grpc.ServicerContext], Iterator[bytes]]


class FederationService:
    """The jobs and the connected sites of one server."""

    def __init__(self, party: Party, name: str, model_key: bytes) -> None:
        self._party = party
        self._lock = threading.Lock()
        self._pulls = threading.BoundedSemaphore(PULLS_AT_ONCE)
        self._calls: dict[bytes, int] = {}
        self.attendances = Attendances(self._site_joined, self._site_left)
        self._jobs = Jobs(party, self.attendances.all)
        self._users = UserCalls(party, name, model_key, self._jobs, self._names)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service, for a gRPC server."""
        streamed: dict[str, Call] = {"Attend": self._attend, "Deliver": self._deliver, **self._users.streamed}
        asked: dict[str, Call] = {"Fetch": self._fetch, **self._users.asked}
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Appraise": grpc.unary_unary_rpc_method_handler(self._appraise),
            **{name: grpc.stream_stream_rpc_method_handler(self._answered(call)) for name, call in streamed.items()},
            **{name: grpc.unary_stream_rpc_method_handler(self._answered(call)) for name, call in asked.items()},
        }
        return grpc.method_handlers_generic_handler(METHOD_PREFIX.strip("/"), handlers)

    def close(self, why: str) -> None:
        """Stop all jobs and end all connections."""
        for job in self._jobs.all():
            job.abort(why)
        for attendance in self.attendances.all():
            attendance.end(why)
        self._jobs.close(why)

    def _names(self) -> list[str]:
        return [attendance.name for attendance in self.attendances.all()]

    # sites

    def _appraise(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        """The server's current EARs, which are no secret: whoever connects appraises the server by them first."""
        try:
            return pack(Lease(ears=self._party.identity().ears))
        except SealwrightError as error:
            context.abort(status_of(error), refusal_details(error))
            raise

    def _attend(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        certificate = certificate_of(context)
        with unstalled(context) as progress:
            lease = first_frame(progress(requests), Lease)
        attendance = Attendance(self._party, certificate, lease)
        context.add_callback(lambda: attendance.end("its connection ended"))
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
                elif isinstance(frame, Logged):
                    job.logged(name, frame.key, frame.value, frame.step, most=MAX_LOGGED_A_ROUND)
        except SealwrightError as error:
            attendance.fail(error)
        except grpc.RpcError:
            attendance.end("its connection broke")
        else:
            attendance.end("it hung up")

    def _site_joined(self, attendance: Attendance) -> None:
        for job in self._jobs.all():
            job.connected(attendance)

    def _site_left(self, attendance: Attendance) -> None:
        for job in self._jobs.all():
            if attendance.lapsed:
                job.away(attendance.name, attendance.why)
            else:
                job.left(attendance.name, attendance.why or "its connection ended")

    def _attending(self, context: grpc.ServicerContext, job_id: str) -> tuple[Attendance, ServerJob]:
        attendance = self.attendances.of_certificate(certificate_of(context))
        if attendance is None or attendance.ended:
            raise LeaseLapsed("the caller does not attend", where="connection")
        attendance.check()
        if attendance.cause is not None:
            raise attendance.cause
        job = self._jobs.find(job_id)
        if job is None or attendance.name not in job.signed.record.roster:
            raise PeerLost(f"there is no job {job_id} for {attendance.name}", where="job")
        return attendance, job

    def _fetch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        head = only_frame(request, Fetch)
        attendance, job = self._attending(context, head.job)
        if head.what == "bundle" and head.sha256 == job.bundle.digest:
            return _while_attending(attendance, serve_chunks(job.bundle.raw, head.offset))
        model = job.model(head.sha256) if head.what == "model" else None
        if model is None:
            raise PeerLost(f"job {head.job} serves no {head.what} {head.sha256}", where="job")
        return _while_attending(attendance, serve_chunks(model.view, head.offset))

    def _deliver(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with unstalled(context) as progress:
            yield from self._receive_update(progress(requests), context)

    def _receive_update(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        head = first_frame(requests, Deliver)
        attendance, job = self._attending(context, head.job)
        name = attendance.name
        if job.has_counted(name, head.round):  # it came whole before a pause; its verdict did not
            yield pack(Verdict(accepted=True))
            return
        limit = max_update_size(job.bundle.settings.schema_of_model)
        if not 0 < head.size <= limit:
            error = UpdateRefused(name, (f"it has {head.size} bytes, more than the {limit} of an update",))
            job.left(name, error.reasons[0])
            yield pack(Verdict(accepted=False, reasons=error.reasons))
            return
        try:
            with self._pulls:
                yield pack(Pull(offset=0))
                chunks = _while_attending(attendance, requests)
                memory = assemble(chunks, size=head.size, sha256=None, where=name)
                job.deliver(name, head, memory)
        except UpdateRefused as refusal:
            yield pack(_verdict(refusal.reasons))
        except MalformedMessage as error:
            if attendance.ends_within(END_SECONDS):
                raise  # why the connection ended decides over the site
            job.left(name, f"its delivery failed: {error.what}")
            yield pack(_verdict((error.what,)))
        else:
            yield pack(Verdict(accepted=True))

    # both

    def _answered(self, method: Call) -> Callable[..., Iterator[bytes]]:
        """`method`, with refusals told to the caller as a gRPC status whose details are JSON, and to the log."""

        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            try:
                with self._counted(certificate_of(context)):
                    yield from method(request, context)
            except SealwrightError as error:
                self._party.tell(f"refused {context.peer()}: {error.what}")
                context.abort(status_of(error), refusal_details(error))

        return answer

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
