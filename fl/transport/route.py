"""How a client gets to the server: at which addresses, by which driver, through which proxies.

`connection_security` says where TLS ends. With `mtls` it ends at the server, whatever forwards the bytes. With `tls`
(TLS to a proxy, whose certificate is checked by `custom_ca_cert` or the system's roots) and `clear` (a proxy without
TLS) a WebSocket leads through the proxies to the server, and the same mutual TLS between the attested keys runs inside
it: the proxies see what any network sees.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from fl.errors import PeerLost
from fl.transport.tunnel import Tunnels
from policies.errors import Unusable
from policies.init_data import ServerAddress

CONNECT_SECONDS: Final = 10.0
Driver = Literal["grpc", "https"]
Security = Literal["mtls", "tls", "clear"]

_TUNNELS: Final = Tunnels()
_LEAVE: Final = "Leave it out."


@dataclass(frozen=True, slots=True)
class Route:
    """A way to one server."""

    addresses: tuple[str, ...]
    """host:port of each place where it, or the proxy before it, can be reached; tried in this order."""
    driver: Driver = "grpc"
    security: Security = "mtls"
    proxy: str | None = None
    """An HTTP proxy (http://host:port) that connects to the address (CONNECT, RFC 9110, section 9.3.6)."""
    custom_ca_cert: str | None = None
    """With `tls`: PEM of the authority of the proxy's certificate; None: the system's."""

    def __post_init__(self) -> None:
        """Raises Unusable for what is no way."""
        if self.proxy is not None:
            parts = urlsplit(self.proxy)
            if parts.scheme != "http" or not parts.hostname or parts.username is not None:
                raise Unusable("a proxy is written http://host:port", where="proxy", do="Correct it.")
            if self.security == "clear":
                raise Unusable("with connection_security = clear the address is the proxy", where="proxy", do=_LEAVE)
        if self.custom_ca_cert is not None and self.security != "tls":
            raise Unusable("custom_ca_cert is for connection_security = tls", where="custom_ca_cert", do=_LEAVE)

    @classmethod
    def of(cls, server: ServerAddress | Route | str) -> Self:
        """The way that a document names; a bare address is a direct one."""
        if isinstance(server, Route):
            return cls(server.addresses, server.driver, server.security, server.proxy, server.custom_ca_cert)
        if isinstance(server, str):
            return cls((server,))
        return cls(
            (server.address, *server.more_addresses),
            server.driver,
            server.connection_security,
            server.proxy,
            server.custom_ca_cert,
        )

    @property
    def direct(self) -> bool:
        """Whether nothing is between but a network."""
        return self.security == "mtls" and self.proxy is None

    def dialler(self, address: str) -> Callable[[], socket.socket]:
        """What makes connections to the server at `address`, on which its own TLS begins. They raise PeerLost."""
        return lambda: self._dial(address)

    def _dial(self, address: str) -> socket.socket:
        try:
            if self.security == "mtls":
                return self._connected(address)
            outer = self._outer_context() if self.security == "tls" else None
            return _TUNNELS.open(address, protocol=self.driver, outer=outer, proxy=self.proxy)
        except (OSError, ValueError, http.client.HTTPException) as error:
            by = "" if self.proxy is None else f" by the proxy {self.proxy}"
            raise PeerLost(f"the server at {address} cannot be reached{by}: {error}", where=address) from error

    def _connected(self, address: str) -> socket.socket:
        host, port = _host_and_port(address)
        if self.proxy is None:
            return socket.create_connection((host, port), CONNECT_SECONDS)
        parts = urlsplit(self.proxy)
        asked = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=CONNECT_SECONDS)
        asked.set_tunnel(host, port)
        asked.connect()
        connection: socket.socket = asked.sock
        return connection

    def _outer_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.custom_ca_cert)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        return context


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
