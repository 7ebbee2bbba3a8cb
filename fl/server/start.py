"""Run the FL server inside its guest."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl.party import Party
from fl.server.certificates import ServerCertificates
from fl.server.grpc_server import GrpcServer
from fl.server.https_server import HttpsServer
from fl.server.job import memory_folder
from fl.server.job_store import JobStore
from fl.server.service import FederationService
from fl.transport.port import Port
from fl.transport.route import Security

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter


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
    listen_https: str | None = None,
    connection_security: Security = "mtls",
    ready_https: Callable[[str], None] = lambda _: None,
    state: Path | None = None,
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

    - `listen_https`: a second `host:port`, if HTTPS is not to share the first with gRPC; `ready_https` gets it.
    - `connection_security`: with `tls` or `clear` there are tunnels for those who come by proxies that end TLS, or that
      have none; what is inside a tunnel is the mutual TLS of `mtls`.
    - `state`: a folder in which jobs that are not over are kept, sealed, so that they go on after the server was
      killed. Without it they end with the server.

    One port for gRPC and HTTPS: what a client offers by ALPN decides. Both speak TLS 1.3 alone, mutually, with clients
    whose certificates come from a broker of the charter or are a user's in the charter.
    Raises PeerLost if the address cannot be had.
    """
    party = Party(identity, charter, clock, record, tell)
    name = identity().name
    service = FederationService(party, name, model_key, None if state is None else JobStore(state, model_key, tell))
    certificates = ServerCertificates(party)
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sealwright-", dir=memory_folder())))
        sockets = {protocol: str(folder / protocol) for protocol in ("grpc", "https", "plain")}
        tunnels = {} if connection_security == "mtls" else {name: sockets[name] for name in ("grpc", "https")}
        plain = sockets["plain"] if connection_security == "clear" else None
        grpc = GrpcServer(service, certificates, sockets["grpc"])
        ends.callback(grpc.close)
        https = HttpsServer(service, certificates, sockets["https"], tunnels=tunnels, plain_path=plain)
        ends.callback(https.close)
        if plain is None:
            del sockets["plain"]
        ends.callback(service.close, "the server stops")
        first = {"grpc": sockets["grpc"]} if listen_https is not None else sockets
        port = Port(listen, first, tell=tell)
        ends.callback(port.close)
        tell(f"server {name} listens on {port.address}")
        if listen_https is not None:
            second = Port(listen_https, {key: path for key, path in sockets.items() if key != "grpc"}, tell=tell)
            ends.callback(second.close)
            tell(f"server {name} listens on {second.address} for HTTPS")
            ready_https(second.address)
        ready(port.address)
        stop.wait()
        # In this order: jobs end and say so, then the servers, then the port.
        service.close("the server stops")
        grpc.close()
