"""What all calls to the server's service have in common: who calls, first frames, a bound on silence, refusals."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from cryptography import x509

from attestation.errors import LeaseEnded, PeerLapsed
from fl.errors import LeaseLapsed, MalformedMessage, RoundOver
from fl.transport.frames import adapter_of, unpack
from policies.errors import Refused, SealwrightError

STALL_SECONDS: Final = 10.0
"""A caller that is in the middle of sending or taking something and does not go on for so long is cut off."""

T = TypeVar("T")


class Caller(Protocol):
    """Who makes a call, as its driver knows it."""

    @property
    def certificate(self) -> bytes:
        """The leaf certificate in DER, as TLS proved it. Raises PeerLost if there is none."""

    @property
    def who(self) -> str:
        """For the log: what the connection is."""

    def cancel(self) -> None:
        """End the call: whatever waits for its frames ends with CallerGone."""

    def active(self) -> bool:
        """Whether the caller still waits for the answer."""

    def when_over(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when the call is over, however it ends."""


Call: TypeAlias = Callable[[Any, Caller], Iterator[bytes]]
"""A call's method: of the caller's frames (one, or an iterator of them) and the caller; the frames of the answer."""


class Service(Protocol):
    """What a driver serves: calls by name."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """The calls that take a stream of frames."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The calls that take one frame."""

    def appraise(self) -> bytes:
        """The frame by which whoever connects appraises this guest. Raises Refusal."""

    def answer(self, name: str, request: Iterator[bytes] | bytes, caller: Caller) -> Iterator[bytes]:
        """Answer the call `name`: frames, made as they are taken. Raises Refusal."""


class CallerGone(Exception):
    """The caller's frames end here because its connection does, or because it was cut off."""


class StoppedSending(MalformedMessage):
    """A caller that ended, or was cut off, in the middle of what it had to send."""


class Refusal(Exception):
    """What a refused caller is told: a status by gRPC's name, and details, which are JSON of bounded size."""

    def __init__(self, status: str, details: str) -> None:
        super().__init__(status)
        self.status = status
        self.details = details


class _Stalls:
    """Cuts off callers that are waited for too long. One thread for all calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[int, tuple[float, Caller]] = {}
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, caller: Caller) -> Iterator[None]:
        """What is done inside waits for `caller`."""
        number = next(self._numbers)
        with self._lock:
            self._since[number] = (time.monotonic(), caller)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._since.pop(number, None)

    def _watch(self) -> None:
        while True:
            time.sleep(STALL_SECONDS / 4)
            oldest = time.monotonic() - STALL_SECONDS
            with self._lock:
                stalled = [number for number, (since, _) in self._since.items() if since < oldest]
                callers = [self._since.pop(number)[1] for number in stalled]
            for caller in callers:
                caller.cancel()


_STALLS: Final = _Stalls()


def unstalled(frames: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
    """The frames that a caller sends; if none comes for STALL_SECONDS it is cut off. Raises MalformedMessage then."""
    while True:
        try:
            with _STALLS.waiting_for(caller):
                frame = next(frames)
        except StopIteration:
            return
        except CallerGone as error:
            raise StoppedSending("the caller stopped sending in the middle", where="call") from error
        yield frame


def untaken(frames: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
    """`frames`; a caller that does not take one for STALL_SECONDS is cut off."""
    for frame in frames:
        with _STALLS.waiting_for(caller):
            yield frame


def subject_of(certificate: bytes) -> str:
    """For the log: whom a certificate (DER) names."""
    try:
        found = x509.load_der_x509_certificate(certificate).extensions
        names = found.get_extension_for_class(x509.SubjectAlternativeName).value
        return repr(names.get_values_for_type(x509.UniformResourceIdentifier)[:2])[:200]
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return "an unreadable certificate"


def refusal_of(error: SealwrightError) -> Refusal:
    """What a caller is told of an error: refused, lapsed (come back with a lease), or unusable."""
    if isinstance(error, (LeaseLapsed, PeerLapsed, LeaseEnded)):
        status = "FAILED_PRECONDITION"
    elif isinstance(error, RoundOver):
        status = "OUT_OF_RANGE"
    else:
        status = "PERMISSION_DENIED" if isinstance(error, Refused) else "INVALID_ARGUMENT"
    reasons = list(error.reasons[:20]) if isinstance(error, Refused) else []
    body = {"what": error.what[:400], "where": error.where[:100], "do": error.do[:200]}
    return Refusal(status, json.dumps({**body, "reasons": [reason[:200] for reason in reasons]}))


def first_frame(requests: Iterator[bytes], kind: type[T]) -> T:
    """The first of a call's frames, which is of this kind and has no payload. Raises MalformedMessage."""
    raw = next(requests, None)
    if raw is None:
        raise MalformedMessage("the caller said nothing", where="call")
    return only_frame(raw, kind)


def only_frame(raw: bytes, kind: type[T]) -> T:
    """A frame of this kind without a payload. Raises MalformedMessage."""
    frame, payload = unpack(adapter_of(kind), raw, where="call")
    if len(payload):
        raise MalformedMessage("a payload follows a frame that has none", where="call")
    return frame
