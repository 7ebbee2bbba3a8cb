"""An application served over TLS 1.3, its certificate renewed while it runs: for brokers, and for witnesses alone."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_der_x509_certificate

from attestation.broker.keys import Issuer
from policies.errors import Unusable

HANDSHAKE_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 20.0
"""How long a connection may take to send a request's head, the first or the next."""
SHUTDOWN_SECONDS: Final = 5.0
CERTIFICATE_RENEWAL: Final = timedelta(days=1)


class ServerTls:
    """A server's TLS context, with a certificate under its own issuer that is renewed while it runs.

    `roles` are what it is by its name: `broker`, `witness`, or both.
    """

    def __init__(self, issuer: Issuer, name: str, roles: Sequence[str]) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(["http/1.1"])
        self._issuer = issuer
        self._name = name
        self._roles = roles
        self._renewed: datetime | None = None

    def follow(self, issuer: Issuer, at: datetime) -> None:
        """Take a certificate under another issuer, at once."""
        self._issuer, self._renewed = issuer, None
        self.renew(at)

    def renew(self, at: datetime) -> None:
        """Take a fresh key and certificate for new connections, if the last is older than CERTIFICATE_RENEWAL."""
        if self._renewed is not None and at - self._renewed < CERTIFICATE_RENEWAL:
            return
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issuer.server_certificate(key.public_key(), self._name, self._roles, at)
        pem = (
            load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
            + self._issuer.certificate_pem.encode("ascii")
            + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)  # OpenSSL wants a file: this one is never on a disk
        try:
            os.write(descriptor, pem)
            self.context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        self._renewed = at


@asynccontextmanager
async def listening(app: web.Application, tls: ServerTls, listen: str) -> AsyncIterator[str]:
    """Serve `app` at `listen` (host:port) until the block ends; gives `host:port` as it is bound. Raises Unusable."""
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=IDLE_SECONDS,
        max_line_size=4096,
        max_field_size=16384,
        auto_decompress=False,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    await runner.setup()
    if runner.server is None:
        raise Unusable("the server did not start", where=listen, do="Look at the log.")
    host, _, port = listen.rpartition(":")
    try:
        server = await asyncio.get_running_loop().create_server(
            runner.server,
            host.strip("[]"),
            int(port),
            ssl=tls.context,
            backlog=1024,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            reuse_address=True,
        )
    except OSError as error:
        await runner.cleanup()
        raise Unusable(
            f"the address cannot be listened on: {error.strerror}", where=listen, do="Choose another in `listen`."
        ) from error
    try:
        bound = server.sockets[0].getsockname()
        yield f"{host}:{bound[1]}"
    finally:
        server.close()
        await runner.cleanup()
