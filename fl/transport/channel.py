"""A connection to an attested server: its credential is fetched and appraised before anything is said to it.

gRPC gives a client no way to see the server's certificate. So it is fetched by a handshake of its own and is then the
only certificate with which the gRPC connection can come about. The server's current EARs are asked for, and it is
appraised by the charter over that certificate's key before anything else is said.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
from cryptography import x509

from attestation.errors import PeerRefused
from attestation.identity import dns_name
from fl.errors import LeaseLapsed, PeerLost
from fl.transport.frames import MAX_FRAME, METHOD_PREFIX, Frame, Lease, adapter_of, pack, unpack
from fl.transport.lease import PeerLease
from fl.transport.memory import SealedMemory
from policies.errors import Refused, SealwrightError, Unusable

if TYPE_CHECKING:
    from attestation.identity import Peer
    from policies.charter import Charter
    from policies.questions import Place

CONNECT_SECONDS: Final = 10.0
_LEASE: Final = adapter_of(Lease)

TRANSPORT_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
"""The one liveness rule: a peer that answers no ping for ten seconds is gone."""


def fetch_certificate(address: str, *, tls_key: str, certificate_pem: str) -> bytes:
    """The certificate (DER) that the server at `address` (host:port) shows. It is not checked. Raises PeerLost."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # appraised by the charter, right after
    context.set_alpn_protocols(["h2"])
    with SealedMemory.of((tls_key + certificate_pem).encode()) as chain:  # ssl reads keys from files alone
        context.load_cert_chain(f"/proc/self/fd/{chain.descriptor}")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as plain,
            context.wrap_socket(plain) as secure,
        ):
            certificate = secure.getpeercert(binary_form=True)
    except (OSError, ValueError) as error:
        raise PeerLost(f"the server at {address} cannot be reached: {error}", where=address) from error
    if not certificate:
        raise PeerLost(f"the server at {address} shows no certificate", where=address)
    return certificate


class FrameCall(Protocol):
    """A call under way: the frames that come, and a way to end it."""

    def __iter__(self) -> Iterator[bytes]:
        """The frames that come. Raises grpc.RpcError when the call fails."""

    def cancel(self) -> bool:
        """End the call."""


@dataclass(frozen=True, slots=True)
class ServerConnection:
    """A channel to an appraised server."""

    channel: Any  # grpc.Channel; its stubs know no methods without serializers
    lease: PeerLease

    @property
    def peer(self) -> Peer:
        """The server, as it was appraised last."""
        return self.lease.peer

    def call(self, method: str, frames: Iterable[bytes], *, timeout: float | None) -> FrameCall:
        """Call a method that takes a stream of frames."""
        call: FrameCall = self.channel.stream_stream(METHOD_PREFIX + method)(iter(frames), timeout=timeout)
        return call

    def ask(self, method: str, frame: Frame, *, timeout: float | None) -> FrameCall:
        """Call a method that takes one frame."""
        call: FrameCall = self.channel.unary_stream(METHOD_PREFIX + method)(pack(frame), timeout=timeout)
        return call


@contextlib.contextmanager
def connect(
    address: str,
    *,
    server: str,
    tls_key: str,
    certificate_pem: str,
    charter: Callable[[], Charter],
    clock: Callable[[], datetime],
    here: Place | None = None,
) -> Iterator[ServerConnection]:
    """A connection to the attested server named `server` at `address` (host:port).

    `here` is the guest that connects, whose consortium may demand more of its peers; None for a user.

    The server's current EARs are the first and only thing asked for before it is appraised. Raises PeerRefused if what
    is there is not that server, PeerLapsed or LeaseLapsed if its lease has ended, PeerLost if nothing is there.
    """
    certificate = fetch_certificate(address, tls_key=tls_key, certificate_pem=certificate_pem)
    if _dns_names(certificate) != [dns_name("server", server)]:
        raise PeerRefused((f"what answers there is not the server {server}: {_dns_names(certificate)}",), who=address)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=ssl.DER_cert_to_PEM_cert(certificate).encode(),
        private_key=tls_key.encode(),
        certificate_chain=certificate_pem.encode(),
    )
    options = (*TRANSPORT_OPTIONS, ("grpc.ssl_target_name_override", dns_name("server", server)))
    channel = grpc.secure_channel(address, credentials, options)
    try:
        lease, _ = unpack(_LEASE, _one(channel, "Appraise", address), where=address)
        peer = PeerLease(certificate, lease, role="server", here=here, charter=charter, clock=clock)
        yield ServerConnection(channel, peer)
    finally:
        channel.close()


def _dns_names(certificate: bytes) -> list[str]:
    """The DNS names of a certificate that nobody has checked yet; none if it cannot be read."""
    try:
        found = x509.load_der_x509_certificate(certificate).extensions
        return found.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)[:8]
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return []


def _one(channel: Any, method: str, where: str) -> bytes:
    try:
        answer: bytes = channel.unary_unary(METHOD_PREFIX + method)(b"", timeout=CONNECT_SECONDS)
    except grpc.RpcError as error:
        raise peer_error(error, where=where) from error
    return answer


def peer_error(error: grpc.RpcError, *, where: str) -> SealwrightError:
    """What a failed call says: the peer's own refusal with its reasons, or that the connection ended."""
    code: grpc.StatusCode = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
    details: str = getattr(error, "details", lambda: "")() or ""
    if code in {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
    }:
        try:
            body = json.loads(details)
            words = {key: str(body[key]) for key in ("what", "where", "do")}
            reasons = tuple(str(reason) for reason in body["reasons"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return PeerLost(f"the peer refused: {details[:200]!r}", where=where)
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return LeaseLapsed(words["what"], where=words["where"])
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return Refused(words["what"], where=words["where"], do=words["do"], reasons=reasons)
        return Unusable(words["what"], where=words["where"], do=words["do"])
    return PeerLost(f"the connection ended ({code.name.lower()}: {details[:200]})", where=where)
