"""TLS 1.3 between a server and its clients, by Python's ssl: contexts for both ends of HTTPS.

A guest's clock is its host's, so neither end looks at a certificate's dates here: peers are appraised by the charter at
the brokers' time, right after the handshake has proved their keys.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Final

from fl.transport.memory import SealedMemory

_NO_CHECK_TIME: Final = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME


def client_context(key: str, chain: str, protocols: Sequence[str]) -> ssl.SSLContext:
    """For a client with this key and certificate chain (PEM). Who the server is, is not checked: appraise it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # appraised by the charter, right after
    context.set_alpn_protocols(list(protocols))
    _load_key(context, key, chain)
    return context


def server_context(key: str, chain: str, trusted: str, *, strangers: bool) -> ssl.SSLContext:
    """For a server with this key and chain; clients need a certificate under one of `trusted` (all PEM).

    `strangers`: clients without any are let in, too.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL if strangers else ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME) | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.num_tickets = 0  # a resumed session would not show its certificate again
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cadata=trusted)
    _load_key(context, key, chain)
    return context


def _load_key(context: ssl.SSLContext, key: str, chain: str) -> None:
    with SealedMemory.of((key + chain).encode()) as file:  # ssl reads keys from files alone
        context.load_cert_chain(f"/proc/self/fd/{file.descriptor}")
