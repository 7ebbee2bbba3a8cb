"""What the server's TLS shows and whom it lets in: read again at each handshake, since both change while it runs."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fl.party import Party
from fl.transport.tls import server_context
from policies.errors import Refused

if TYPE_CHECKING:
    from policies.charter import Charter


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """Key, certificate chain and trusted certificates, each in PEM."""

    key: str = field(repr=False, compare=False)
    chain: str
    trusted: str
    """The certificates that a client's may come from; what the client may do is decided later, by the charter."""


class Certificates(Protocol):
    """Whoever knows the newest credentials, from any thread."""

    def current(self) -> TlsCredentials:
        """The newest."""


class ServerCertificates:
    """The guest's TLS credentials as they are now. Safe to use from many threads."""

    def __init__(self, party: Party) -> None:
        """Raises Refused while the guest has no lease."""
        self._party = party
        self._lock = threading.Lock()
        identity, charter = party.identity(), party.charter()
        self._version = charter.version
        self._current = TlsCredentials(identity.tls_key_pem, identity.certificate_pem, _trusted(charter))

    def current(self) -> TlsCredentials:
        """The newest; the last that were, while there is no lease: whoever connects finds an EAR that has ended."""
        try:
            identity, charter = self._party.identity(), self._party.charter()
        except Refused as error:
            self._party.tell(f"the server has no current certificate: {error.what}")
            return self._current
        with self._lock:
            if (identity.certificate_pem, charter.version) != (self._current.chain, self._version):
                self._version = charter.version
                self._current = TlsCredentials(identity.tls_key_pem, identity.certificate_pem, _trusted(charter))
            return self._current


class TlsContexts:
    """TLS contexts for the current credentials; a new one when they change."""

    def __init__(self, certificates: Certificates, *, strangers: bool) -> None:
        self._certificates = certificates
        self._strangers = strangers
        self._lock = threading.Lock()
        self._seen: TlsCredentials | None = None
        self._context: ssl.SSLContext | None = None

    def switching(self) -> ssl.SSLContext:
        """A context that hands each handshake to the one for the current credentials."""

        def choose(secure: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            secure.context = self._current()

        context = self._made(self._certificates.current())
        context.sni_callback = choose
        return context

    def _current(self) -> ssl.SSLContext:
        newest = self._certificates.current()
        with self._lock:
            if self._context is None or newest != self._seen:
                self._context, self._seen = self._made(newest), newest
            return self._context

    def _made(self, credentials: TlsCredentials) -> ssl.SSLContext:
        return server_context(credentials.key, credentials.chain, credentials.trusted, strangers=self._strangers)


def _trusted(charter: Charter) -> str:
    brokers = [broker.issuer_certificate for broker in charter.consortium.brokers]
    return "".join([*brokers, *(user.tls_certificate for user in charter.users())])
