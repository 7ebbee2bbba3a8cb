"""Run the FL server inside its guest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import grpc

from fl.errors import PeerLost
from fl.party import Party
from fl.server.service import FederationService
from fl.transport.channel import TRANSPORT_OPTIONS
from policies.errors import Refused

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter

MAX_CALLS: Final = 1024
"""Calls that are served at the same time; more are refused by gRPC."""


def serve(
    *,
    identity: Callable[[], Identity],
    charter: Callable[[], Charter],
    clock: Callable[[], datetime],
    listen: str,
    model_key: bytes,
    record: Callable[[str, Mapping[str, Any]], str],
    stop: threading.Event,
    tell: Callable[[str], None],
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve federated jobs until `stop` is set.

    - `identity`: the current identity of this guest, whose role is `server`; asked again at each handshake and check.
    - `charter`: the current charter, verified; asked again for each decision.
    - `clock`: the time that the brokers vouch for.
    - `listen`: `host:port`; port 0 takes a free one.
    - `model_key`: the 32 bytes under which submitters seal first models.
    - `record`: writes `(kind, document)` into the ledger and returns the entry with its receipt as JSON text, or "".
      Called with `job` at a job's start and its end without a result, with `result` for a statement. If it raises, what
      was to be recorded does not happen.
    - `stop`: ends it; running jobs are stopped.
    - `tell`: takes lines for the guest's log. `ready`: called once with the address that is listened on.

    Mutual TLS with clients whose certificates come from a broker of the charter or are a user's in the charter. Both
    ends of ours speak 1.3; grpcio itself cannot be told to refuse 1.2.
    Raises PeerLost if the address cannot be had.
    """
    party = Party(identity, charter, clock, record, tell)
    name = identity().name
    service = FederationService(party, name, model_key)
    server = grpc.server(
        ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="call"),
        handlers=[service.handlers()],
        options=TRANSPORT_OPTIONS,
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    try:
        port = server.add_secure_port(listen, _credentials(party))
    except RuntimeError as error:
        raise PeerLost(f"the server cannot listen on {listen}", where="address") from error
    server.start()
    host = listen.rpartition(":")[0]
    tell(f"server {name} listens on {host}:{port}")
    ready(f"{host}:{port}")
    try:
        stop.wait()
    finally:
        service.close("the server stops")
        server.stop(grace=2).wait(10)


def _credentials(party: Party) -> grpc.ServerCredentials:
    """TLS with the guest's current certificate; clients need one of a broker of the charter, or a user's own."""
    current = [_configuration_key(party)]

    def configuration() -> grpc.ServerCertificateConfiguration:
        identity = party.identity()
        return grpc.ssl_server_certificate_configuration(
            [(identity.tls_key_pem.encode(), identity.certificate_pem.encode())],
            root_certificates=_trusted(party.charter()).encode(),
        )

    def changed() -> grpc.ServerCertificateConfiguration | None:
        try:
            newest = _configuration_key(party)
            if newest == current[0]:
                return None
            renewed = configuration()
        except Refused as error:  # no lease: whoever connects finds the old EAR, which has ended, and refuses it
            party.tell(f"the server has no current certificate: {error.what}")
            return None
        current[0] = newest
        return renewed

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        configuration(),
        changed,  # type: ignore[arg-type]  # None means "unchanged" (grpc's documentation), which its stubs leave out
        require_client_authentication=True,
    )
    return credentials


def _configuration_key(party: Party) -> tuple[str, int]:
    return party.identity().certificate_pem, party.charter().version


def _trusted(charter: Charter) -> str:
    """The certificates that a client's may come from; what the client may do is decided later, by the charter."""
    brokers = [broker.issuer_certificate for broker in charter.consortium.brokers]
    return "".join([*brokers, *(user.tls_certificate for user in charter.users())])
