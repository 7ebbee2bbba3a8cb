"""Run the FL server inside its guest."""

from __future__ import annotations

import resource
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fl.party import Party
from fl.server.administration import Steering
from fl.server.certificates import ServerCertificates
from fl.server.grpc_server import GrpcServer
from fl.server.https_server import HttpsServer
from fl.server.job import memory_folder
from fl.server.job_store import JobStore
from fl.server.service import FederationService
from fl.transport.port import Port, Protocol, Server
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
    - `stop`: ends it; running jobs are stopped, or, with `state`, wait there. So does a user of the server's own member
      with the right to operate (`seal site stop`), who can have it start anew as well.
    - `tell`: takes lines for the guest's log. `ready`: called once with the address that is listened on.

    - `listen_https`: a second `host:port`, if HTTPS is not to share the first with gRPC; `ready_https` gets it.
    - `connection_security`: with `tls` or `clear` there are tunnels for those who come by proxies that end TLS, or that
      have none; what is inside a tunnel is the mutual TLS of `mtls`.
    - `state`: a folder in which jobs are kept, sealed: those that are not over go on after the server was killed or
      stopped, results of the others are there still. Without it they end with the server.

    One port for gRPC and HTTPS: what a client offers by ALPN decides. Both speak TLS 1.3 alone, mutually, with clients
    whose certificates come from a broker of the charter or are a user's in the charter.
    Raises PeerLost if the address cannot be had.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a spliced connection has six descriptors
    party = Party(identity, charter, clock, record, tell)
    name = identity().name
    store = None if state is None else JobStore(state, model_key, tell)
    orders: SimpleQueue[Steering] = SimpleQueue()

    def stopped() -> None:
        stop.wait()
        orders.put("stop")

    threading.Thread(target=stopped, name="stop", daemon=True).start()
    known = False

    def opened(first: str, second: str | None) -> None:
        nonlocal listen, listen_https, known
        listen, listen_https = first, second  # a server that starts anew is found where it was
        if not known:
            known = True
            if second is not None:
                ready_https(second)
            ready(first)

    while True:
        service = FederationService(party, name, model_key, store, orders.put)
        if _serve_until(orders, service, party, listen, listen_https, connection_security, opened) == "stop":
            return
        tell(f"server {name} starts anew")


def _serve_until(
    orders: SimpleQueue[Steering],
    service: FederationService,
    party: Party,
    listen: str,
    listen_https: str | None,
    security: Security,
    opened: Callable[[str, str | None], None],
) -> Steering:
    """Serve until there is an order. Raises PeerLost if an address cannot be had."""
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sealwright-", dir=memory_folder())))
        sockets = {protocol: str(folder / protocol) for protocol in ("grpc", "https", "plain")}
        tunnels = {} if security == "mtls" else {name: sockets[name] for name in ("grpc", "https")}
        plain = sockets["plain"] if security == "clear" else None
        certificates = ServerCertificates(party)
        grpc = GrpcServer(service, certificates, sockets["grpc"])
        ends.callback(grpc.close)
        https = HttpsServer(service, certificates, sockets["https"], tunnels=tunnels, plain_path=plain)
        ends.callback(https.close)
        if plain is None:
            del sockets["plain"]
        ends.callback(service.close, "the server stops")
        direct: dict[Protocol, Server] = {**sockets, "https": https.take}
        first = {"grpc": sockets["grpc"]} if listen_https is not None else direct
        port = Port(listen, first, tell=party.tell)
        ends.callback(port.close)
        party.tell(f"the server listens on {port.address}")
        second = None
        if listen_https is not None:
            second = Port(listen_https, {key: to for key, to in direct.items() if key != "grpc"}, tell=party.tell)
            ends.callback(second.close)
            party.tell(f"the server listens on {second.address} for HTTPS")
        opened(port.address, None if second is None else second.address)
        order = orders.get()
        # In this order: jobs end and say so, then the servers, then the port.
        service.close("the server stops" if order == "stop" else "the server starts anew")
        grpc.close()
        return order
