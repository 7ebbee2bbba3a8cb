"""What AMD's key distribution service hands out, in shape: certificates that nobody signed, and a service over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb

NOW = datetime.now(UTC)
TCB = Tcb(4, 0, 24, 219)
CHIP = bytes(range(64))
OID = "1.3.6.1.4.1.3704.1"

Answers = Mapping[str, tuple[int, Mapping[str, str], bytes]]


def certificate(name: str, issuer: str, extensions: Mapping[str, bytes] = {}) -> x509.Certificate:
    """A certificate of the shape that a service hands out; nobody checks its signature here."""
    key = ec.generate_private_key(ec.SECP384R1())

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder(named(issuer), named(name), key.public_key(), 1, NOW, NOW + timedelta(days=9))
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(key, hashes.SHA384())


def vcek(chip_id: bytes = CHIP, tcb: Tcb = TCB, product: Product = Product.MILAN) -> bytes:
    turin = product is Product.TURIN
    levels = {"1": tcb.bootloader, "2": tcb.tee, "3": tcb.snp, "8": tcb.microcode}
    extensions = {
        f"{OID}.1": core.Integer(int(turin)).dump(),
        f"{OID}.2": core.IA5String(product.value).dump(),
        **{f"{OID}.3.{part}": core.Integer(level).dump() for part, level in levels.items()},
        f"{OID}.4": chip_id[:8] if turin else chip_id,
    }
    if turin:
        extensions[f"{OID}.3.9"] = core.Integer(tcb.fmc).dump()
    return certificate("SEV-VCEK", f"SEV-{product.value}", extensions).public_bytes(Encoding.DER)


def chain(product: Product = Product.MILAN) -> bytes:
    ark = certificate(f"ARK-{product.value}", f"ARK-{product.value}")
    ask = certificate(f"SEV-{product.value}", f"ARK-{product.value}")
    return ask.public_bytes(Encoding.PEM) + ark.public_bytes(Encoding.PEM)


def revocation_list(product: Product = Product.MILAN) -> bytes:
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ARK-{product.value}")])
    builder = x509.CertificateRevocationListBuilder(issuer, NOW, NOW + timedelta(days=30))
    return builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA384()).public_bytes(Encoding.DER)


class _Handler(BaseHTTPRequestHandler):
    answers: ClassVar[Answers] = {}

    def do_GET(self) -> None:
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def serving(answers: Answers) -> Iterator[str]:
    """A service over HTTP that answers from a table, by path; gives its address."""
    handler = type("Handler", (_Handler,), {"answers": answers})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
