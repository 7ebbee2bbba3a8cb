"""What all calls to the server's service have in common: who calls, first frames, a bound on silence, refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.errors import LeaseEnded, PeerLapsed
from fl.errors import LeaseLapsed, MalformedMessage, PeerLost
from fl.transport.frames import adapter_of, unpack
from policies.errors import Refused, SealwrightError

STALL_SECONDS: Final = 10.0
"""A caller that is in the middle of sending something and sends nothing for so long is cut off."""

T = TypeVar("T")


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


def certificate_of(context: grpc.ServicerContext) -> bytes:
    """The caller's leaf certificate in DER, as TLS proved it."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
    if not isinstance(pem, bytes) or not pem:
        raise PeerLost("the caller has no certificate", where="connection")
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


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
