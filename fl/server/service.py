"""The server's gRPC service: sites attend, fetch and deliver; users submit, watch, download and stop jobs.

Every call is judged by its caller's certificate, which TLS has proved: a site's by its appraisal at attendance and by
its lease, a user's by the charter, each time. What a caller did wrong is told to it with every reason and to the log.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.canonical import b64
from attestation.errors import LeaseEnded, PeerLapsed
from attestation.identity import appraise_user
from fl.errors import ApprovalRefused, LeaseLapsed, MalformedMessage, PeerLost, UpdateRefused
from fl.guard.approval import approve, read_record
from fl.guard.gate import max_update_size
from fl.jobs.bundle import MAX_BUNDLE, parse_bundle
from fl.jobs.progress import Status
from fl.party import Party
from fl.server.attendance import Attendance, Attendances
from fl.server.job import ServerJob
from fl.transport.chunks import assemble, serve_chunks
from fl.transport.frames import (
    FROM_ATTENDING_SITE,
    METHOD_PREFIX,
    About,
    Away,
    Deliver,
    Fetch,
    Happened,
    Lease,
    Left,
    List,
    Logged,
    Pull,
    Ready,
    Reports,
    Result,
    Submit,
    Verdict,
    adapter_of,
    pack,
    unpack,
)
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from policies.documents import Right, User

MAX_RUNNING: Final = 4
"""Jobs that run side by side; more wait in the queue."""
MAX_JOBS: Final = 200
"""Jobs that the server remembers; the oldest that are over go first."""
MAX_OPEN: Final = 32
"""Jobs that wait or run; more are not taken."""
KEPT_RESULTS: Final = 4 << 30
"""Bytes of sealed results that are kept for download; beyond, the oldest go, the newest never."""
MAX_CALLS_EACH: Final = 32
"""Calls of one caller at the same time."""
PULLS_AT_ONCE: Final = 8
"""Updates that are received at the same time; the others wait at their sites."""
STALL_SECONDS: Final = 10.0
"""A caller that is in the middle of sending something and sends nothing for so long is cut off."""
END_SECONDS: Final = 2.0
"""How much later than a delivery that breaks off the end of its site's connection may be noticed."""
MAX_LOGGED_A_ROUND: Final = 20_000
"""Values that a site may log in a round. An honest site's own bound is half of it."""
LISTED_JOBS: Final = 100
LISTED_SITES: Final = 1000
SEALING_OVERHEAD: Final = 1 << 20

T = TypeVar("T")


class FederationService:
    """The jobs and the connected sites of one server."""

    def __init__(self, party: Party, name: str, model_key: bytes) -> None:
        self._party = party
        self._name = name
        self._model_key = model_key
        self._lock = threading.Lock()
        self._jobs: dict[str, ServerJob] = {}
        self._pulls = threading.BoundedSemaphore(PULLS_AT_ONCE)
        self._calls: dict[bytes, int] = {}
        self._runners = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="job")
        self.attendances = Attendances(self._site_joined, self._site_left)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service, for a gRPC server."""
        return grpc.method_handlers_generic_handler(
            METHOD_PREFIX.strip("/"),
            {
                "Appraise": grpc.unary_unary_rpc_method_handler(self._appraise),
                "Attend": grpc.stream_stream_rpc_method_handler(self._answered(self._attend)),
                "Fetch": grpc.unary_stream_rpc_method_handler(self._answered(self._fetch)),
                "Deliver": grpc.stream_stream_rpc_method_handler(self._answered(self._deliver)),
                "Submit": grpc.stream_stream_rpc_method_handler(self._answered(self._submit)),
                "Jobs": grpc.unary_stream_rpc_method_handler(self._answered(self._reports)),
                "Report": grpc.unary_stream_rpc_method_handler(self._answered(self._report)),
                "Watch": grpc.unary_stream_rpc_method_handler(self._answered(self._watch)),
                "Download": grpc.unary_stream_rpc_method_handler(self._answered(self._download)),
                "Abort": grpc.unary_stream_rpc_method_handler(self._answered(self._abort)),
            },
        )

    def close(self, why: str) -> None:
        """Stop all jobs and end all connections."""
        for job in self._all_jobs():
            job.abort(why)
        for attendance in self.attendances.all():
            attendance.end(why)
        self._runners.shutdown(wait=True, cancel_futures=True)

    # sites

    def _appraise(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        """The server's current EARs, which are no secret: whoever connects appraises the server by them first."""
        try:
            return pack(Lease(ears=self._party.identity().ears))
        except SealwrightError as error:
            context.abort(status_of(error), refusal_details(error))
            raise

    def _attend(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        certificate = _certificate(context)
        with unstalled(context) as progress:
            lease = _first(progress(requests), Lease)
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
                job = self._find(frame.job)
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
        for job in self._all_jobs():
            job.connected(attendance)

    def _site_left(self, attendance: Attendance) -> None:
        for job in self._all_jobs():
            if attendance.lapsed:
                job.away(attendance.name, attendance.why)
            else:
                job.left(attendance.name, attendance.why or "its connection ended")

    def _attending(self, context: grpc.ServicerContext, job_id: str) -> tuple[Attendance, ServerJob]:
        attendance = self.attendances.of_certificate(_certificate(context))
        if attendance is None or attendance.ended:
            raise LeaseLapsed("the caller does not attend", where="connection")
        attendance.check()
        if attendance.cause is not None:
            raise attendance.cause
        job = self._find(job_id)
        if job is None or attendance.name not in job.signed.record.roster:
            raise PeerLost(f"there is no job {job_id} for {attendance.name}", where="job")
        return attendance, job

    def _fetch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        head = _only(request, Fetch)
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
        head = _first(requests, Deliver)
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

    # users

    def _submit(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        user = self._user(context, "submit")
        with unstalled(context) as progress:
            yield from self._receive_job(user, progress(requests))

    def _receive_job(self, user: User, requests: Iterator[bytes]) -> Iterator[bytes]:
        head = _first(requests, Submit)
        charter = self._party.charter()
        signed = read_record(head.record, charter)
        record = signed.record
        if record.submitter != f"{user.member}/{user.name}":
            raise ApprovalRefused(record.job, (f"{user.member}/{user.name} brings a record of {record.submitter}",))
        if not 0 < head.bundle_size <= MAX_BUNDLE or not 0 < head.model_size <= record.model_size + SEALING_OVERHEAD + (
            record.model_size >> 8
        ):
            raise MalformedMessage("the bundle or the first model is larger than it may be", where="submission")
        if self._find(record.job) is not None:
            raise ApprovalRefused(record.job, ("a job of this id was submitted before",))
        yield pack(Pull(offset=0))
        with assemble(requests, size=head.bundle_size, sha256=None, where="bundle") as memory:
            bundle = parse_bundle(bytes(memory.view))
        approve(signed, bundle, charter, self._party.clock(), server=self._name, site=None)
        with assemble(requests, size=head.model_size, sha256=None, where="first model") as memory:
            sealed = bytes(memory.view)
        job = ServerJob(self._party, self._name, signed, bundle, sealed_model=sealed, model_key=self._model_key)
        with self._lock:
            if record.job in self._jobs:
                raise ApprovalRefused(record.job, ("a job of this id was submitted before",))
            self._forget_old()
            self._jobs[record.job] = job
        self._party.tell(f"job {record.job} is submitted by {record.submitter}")
        self._runners.submit(self._run, job)
        yield pack(Verdict(accepted=True))

    def _run(self, job: ServerJob) -> None:
        try:
            job.run(self.attendances.all)
        except Exception as error:
            self._party.tell(f"job {job.id}: a fault of the server: {type(error).__name__}: {error}")
            raise
        finally:
            self._drop_old_results(newest=job)

    def _drop_old_results(self, newest: ServerJob) -> None:
        kept = newest.result_size
        for job in reversed(self._all_jobs()):
            kept += 0 if job is newest else job.result_size
            if job is not newest and kept > KEPT_RESULTS:
                job.result = None

    def _forget_old(self) -> None:
        over = [job_id for job_id, job in self._jobs.items() if job.status.over]
        for job_id in over[: max(0, len(self._jobs) - MAX_JOBS + 1)]:
            del self._jobs[job_id]
        if len(self._jobs) - len(over) >= MAX_OPEN:
            raise ApprovalRefused("(new)", (f"{MAX_OPEN} jobs wait or run already",))

    def _reports(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self._user(context, "view")
        _only(request, List)
        sites = tuple(attendance.name for attendance in self.attendances.all())
        newest = self._all_jobs()[-LISTED_JOBS:]
        yield pack(Reports(jobs=tuple(job.report(details=False) for job in newest), sites=sites[:LISTED_SITES]))

    def _report(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield pack(self._job_for(request, context, "view")[0].report())

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        job, _ = self._job_for(request, context, "view")
        context.add_callback(job.wake)
        for event in job.watch(alive=context.is_active):
            yield pack(Happened(event=event))

    def _download(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        job, user = self._job_for(request, context, "download")
        recipient = f"{user.member}/{user.name}"
        if job.result is None:
            kept = "; its result is not kept any more" if job.status is Status.FINISHED else ""
            raise PeerLost(f"job {job.id} has no result: it is {job.status.value}{kept}", where="job")
        sealed, statement, receipt = job.result
        if recipient not in sealed.keys:
            raise ApprovalRefused(job.id, (f"{recipient} is not among the result's recipients",))
        head = Result(
            record=job.signed.token,
            statement=statement,
            sealed_key=b64(sealed.keys[recipient]),
            size=len(sealed.payload),
            receipt=receipt,
        )
        yield pack(head)
        yield from serve_chunks(sealed.payload)

    def _abort(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        job, user = self._job_for(request, context, "view")
        name = f"{user.member}/{user.name}"
        if not user.may("operate") and job.signed.record.submitter != name:
            raise ApprovalRefused(job.id, (f"{name} neither submitted it nor has the right to operate",))
        job.abort(name)
        yield pack(Verdict(accepted=True))

    def _job_for(self, request: bytes, context: grpc.ServicerContext, right: Right) -> tuple[ServerJob, User]:
        user = self._user(context, right)
        job_id = _only(request, About).job
        job = self._find(job_id)
        if job is None:
            raise PeerLost(f"there is no job {job_id}", where="job")
        return job, user

    def _user(self, context: grpc.ServicerContext, right: Right) -> User:
        user = appraise_user(_certificate(context), self._party.charter(), self._party.clock())
        if not user.may(right):
            raise ApprovalRefused("(any)", (f"{user.member}/{user.name} has no right to {right}",))
        return user

    # both

    def _find(self, job_id: str) -> ServerJob | None:
        with self._lock:
            return self._jobs.get(job_id)

    def _all_jobs(self) -> list[ServerJob]:
        with self._lock:
            return list(self._jobs.values())

    def _answered(
        self, method: Callable[[Any, grpc.ServicerContext], Iterator[bytes]]
    ) -> Callable[..., Iterator[bytes]]:
        """`method`, with refusals told to the caller as a gRPC status whose details are JSON, and to the log."""

        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            try:
                with self._counted(_certificate(context)):
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


@contextmanager
def unstalled(context: grpc.ServicerContext) -> Iterator[Callable[[Iterator[bytes]], Iterator[bytes]]]:
    """Gives a wrapper for the frames that a caller sends: when none comes for STALL_SECONDS, the call is cancelled."""
    waiting_since: list[float | None] = [None]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(STALL_SECONDS / 4):
            since = waiting_since[0]
            if since is not None and time.monotonic() - since > STALL_SECONDS:
                context.cancel()
                return

    def progress(frames: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            waiting_since[0] = time.monotonic()
            try:
                frame = next(frames)
            except StopIteration:
                return
            except grpc.RpcError as error:
                raise MalformedMessage("the caller stopped sending in the middle", where="call") from error
            finally:
                waiting_since[0] = None
            yield frame

    watcher = threading.Thread(target=watch, name="stall", daemon=True)
    watcher.start()
    try:
        yield progress
    finally:
        over.set()


def _while_attending(attendance: Attendance, frames: Iterator[bytes]) -> Iterator[bytes]:
    """`frames` as long as the site attends. Raises what ended its attendance."""
    for frame in frames:
        if attendance.ended:
            raise attendance.cause or PeerLost(f"site {attendance.name} does not attend any more", where="connection")
        yield frame


def status_of(error: SealwrightError) -> grpc.StatusCode:
    """The gRPC status of an error: refused, lapsed (come back with a lease), or unusable."""
    if isinstance(error, (LeaseLapsed, PeerLapsed, LeaseEnded)):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.PERMISSION_DENIED if isinstance(error, Refused) else grpc.StatusCode.INVALID_ARGUMENT


def refusal_details(error: SealwrightError) -> str:
    """An error as the details of a gRPC status: JSON of bounded size."""
    reasons = list(error.reasons[:20]) if isinstance(error, Refused) else []
    body = {"what": error.what[:400], "where": error.where[:100], "do": error.do[:200]}
    return json.dumps({**body, "reasons": [reason[:200] for reason in reasons]})


def _verdict(reasons: tuple[str, ...]) -> Verdict:
    return Verdict(accepted=False, reasons=tuple(reason[:2000] for reason in reasons[:64]))


def _certificate(context: grpc.ServicerContext) -> bytes:
    """The caller's leaf certificate in DER, as TLS proved it."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
    if not isinstance(pem, bytes) or not pem:
        raise PeerLost("the caller has no certificate", where="connection")
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def _first(requests: Iterator[bytes], kind: type[T]) -> T:
    raw = next(requests, None)
    if raw is None:
        raise MalformedMessage("the caller said nothing", where="call")
    return _only(raw, kind)


def _only(raw: bytes, kind: type[T]) -> T:
    frame, payload = unpack(adapter_of(kind), raw, where="call")
    if len(payload):
        raise MalformedMessage("a payload follows a frame that has none", where="call")
    return frame
