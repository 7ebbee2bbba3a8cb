"""A connection to an attested server: its credential is fetched and appraised before anything is said to it.

gRPC gives a client no way to see the server's certificate. So it is fetched by a handshake of its own and is then the
only certificate with which the connection can come about, whichever driver makes it. The server's current EARs are
asked for, and it is appraised by the charter over that certificate's key before anything else is said.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol

from cryptography import x509

from attestation.errors import PeerRefused
from attestation.identity import dns_name
from fl.errors import CallFailed, LeaseLapsed, PeerLost, RoundOver
from fl.transport.frames import Frame, Lease, adapter_of, pack, unpack
from fl.transport.grpc_channel import GrpcChannel
from fl.transport.https_channel import HttpsChannel
from fl.transport.lease import PeerLease
from fl.transport.relay import Relay
from fl.transport.route import CONNECT_SECONDS, Route
from fl.transport.tls import client_context
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import ServerAddress

if TYPE_CHECKING:
    from attestation.identity import Peer
    from policies.charter import Charter
    from policies.questions import Place

_LEASE: Final = adapter_of(Lease)


def fetch_certificate(
    address: str, dial: Callable[[], socket.socket], *, protocol: str, host: str, tls_key: str, certificate_pem: str
) -> bytes:
    """The certificate (DER) that the server shows which `dial` reaches. It is not checked. Raises PeerLost.

    `protocol`: by ALPN; `host`: the name to ask for.
    """
    context = client_context(tls_key, certificate_pem, [protocol])
    try:
        plain = dial()
        plain.settimeout(CONNECT_SECONDS)
        with plain, context.wrap_socket(plain, server_hostname=host) as secure:
            certificate = secure.getpeercert(binary_form=True)
    except (OSError, ValueError) as error:
        raise PeerLost(f"the server at {address} cannot be reached: {error}", where=address) from error
    if not certificate:
        raise PeerLost(f"the server at {address} shows no certificate", where=address)
    return certificate


class FrameCall(Protocol):
    """A call under way: the frames that come, and a way to end it."""

    def __iter__(self) -> Iterator[bytes]:
        """The frames that come. Raises CallFailed when the call fails."""

    def cancel(self) -> None:
        """End the call."""


class Channel(Protocol):
    """What a driver does, whichever it is."""

    def call(self, method: str, frames: Iterable[bytes], *, timeout: float | None) -> FrameCall:
        """Call a method that takes a stream of frames."""

    def ask(self, method: str, frame: bytes, *, timeout: float | None) -> FrameCall:
        """Call a method that takes one frame."""

    def appraise(self, *, timeout: float) -> bytes:
        """The server's frame about itself. Raises CallFailed."""

    def close(self) -> None:
        """End the connection."""


@dataclass(frozen=True, slots=True)
class ServerConnection:
    """A channel to an appraised server."""

    channel: Channel
    lease: PeerLease

    @property
    def peer(self) -> Peer:
        """The server, as it was appraised last."""
        return self.lease.peer

    def call(self, method: str, frames: Iterable[bytes], *, timeout: float | None) -> FrameCall:
        """Call a method that takes a stream of frames."""
        return self.channel.call(method, frames, timeout=timeout)

    def ask(self, method: str, frame: Frame, *, timeout: float | None) -> FrameCall:
        """Call a method that takes one frame."""
        return self.channel.ask(method, pack(frame), timeout=timeout)


@contextlib.contextmanager
def connect(
    to: Route | ServerAddress | str,
    *,
    server: str,
    tls_key: str,
    certificate_pem: str,
    charter: Callable[[], Charter],
    clock: Callable[[], datetime],
    here: Place | None = None,
    roles: Sequence[str] = ("server",),
) -> Iterator[ServerConnection]:
    """A connection to the attested server named `server`, by the way `to` (host:port, if it is a direct one).

    `roles`: what it may be: a server, or an inner node of a tree.

    `here` is the guest that connects, whose consortium may demand more of its peers; None for a user.

    The server's current EARs are the first and only thing asked for before it is appraised. Raises PeerRefused if what
    is there is not that server, PeerLapsed or LeaseLapsed if its lease has ended, PeerLost if nothing is there.
    """
    route, hosts = Route.of(to), {dns_name(role, server): role for role in roles}
    protocol = "h2" if route.driver == "grpc" else "http/1.1"
    lost: list[PeerLost] = []
    for address in route.addresses:
        dial = route.dialler(address)
        try:
            certificate = fetch_certificate(
                address,
                dial,
                protocol=protocol,
                host=next(iter(hosts)),
                tls_key=tls_key,
                certificate_pem=certificate_pem,
            )
        except PeerLost as error:
            lost.append(error)
            continue
        break
    else:
        raise lost[0] if len(lost) == 1 else PeerLost("; ".join(one.what for one in lost), where=route.addresses[0])
    host = next(iter(names := dns_names(certificate)), "")
    if len(names) != 1 or host not in hosts:
        raise PeerRefused((f"what answers there is not the server {server}: {names}",), who=address)
    with contextlib.ExitStack() as ends:
        identity = {"host": host, "tls_key": tls_key, "certificate_pem": certificate_pem}
        channel: Channel
        if route.driver == "https":
            channel = HttpsChannel(dial, certificate=certificate, **identity)
        elif route.direct:
            channel = GrpcChannel(address, certificate=certificate, **identity)
        else:
            relay = Relay(dial)
            ends.callback(relay.close)
            channel = GrpcChannel(f"unix:{relay.path}", certificate=certificate, **identity)
        ends.callback(channel.close)
        try:
            shown = channel.appraise(timeout=CONNECT_SECONDS)
        except CallFailed as error:
            raise peer_error(error, where=address) from error
        lease, _ = unpack(_LEASE, shown, where=address)
        peer = PeerLease(certificate, lease, role=hosts[host], here=here, charter=charter, clock=clock)
        yield ServerConnection(channel, peer)


def dns_names(certificate: bytes) -> list[str]:
    """The DNS names of a certificate that nobody has checked yet; none if it cannot be read."""
    try:
        found = x509.load_der_x509_certificate(certificate).extensions
        return found.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)[:8]
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return []


def peer_error(error: CallFailed, *, where: str) -> SealwrightError:
    """What a failed call says: the peer's own refusal with its reasons, or that the connection ended."""
    if error.status in {"PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE"}:
        try:
            body = json.loads(error.details)
            words = {key: str(body[key]) for key in ("what", "where", "do")}
            reasons = tuple(str(reason) for reason in body["reasons"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return PeerLost(f"the peer refused: {error.details[:200]!r}", where=where)
        if error.status == "FAILED_PRECONDITION":
            return LeaseLapsed(words["what"], where=words["where"])
        if error.status == "OUT_OF_RANGE":
            return RoundOver(words["what"])
        if error.status == "PERMISSION_DENIED":
            return Refused(words["what"], where=words["where"], do=words["do"], reasons=reasons)
        return Unusable(words["what"], where=words["where"], do=words["do"])
    return PeerLost(f"the connection ended ({error.status.lower()}: {error.details[:200]})", where=where)
