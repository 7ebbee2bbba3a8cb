"""A broker with nothing but HTTPS and a flow's cryptography left in: what `attestation.broker` is measured beside.

It answers the three calls of a flow under the same keys, TLS settings and HTTP server as the real one, in the same
messages: it verifies the report's P-384 signature and each call's proof, signs EAR, checkpoint and answers, seals by
HPKE. It decides nothing, keeps nothing, writes nothing down: no charter, no chain, no policy, no database, no log.
`python -m benchmarks.bare_broker FOLDER`: a broker's folder. Prints its port; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from attestation.broker.config import load_config
from attestation.broker.keys import load_issuer
from attestation.broker.listening import ServerTls, listening
from attestation.canonical import b64, unb64
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.report import parse_report
from attestation.hybrid import seal
from attestation.jws import sign_jws
from attestation.ledger.checkpoint import Checkpoint, sign_checkpoint
from attestation.messages import (
    PROOF_HEADER,
    Answer,
    AttestRequest,
    ReleaseRequest,
    SessionRequest,
    check_proof,
    parse_message,
    proof_session,
    release_info,
    request_digest,
    sign_answer,
)
from policies.documents import BrokerEntry
from policies.forms import parse_document
from policies.keys import load_private_key

LIMIT = 512 * 1024
SECRET = b"a key of 32 bytes, as it may be."
EAR_SIZE = 1500
"""Bytes of a payload like an EAR's."""


class BareBroker:
    """The three calls. `sessions` has each guest's nonce and, once it has attested, its keys."""

    def __init__(self, folder: Path) -> None:
        config = load_config(folder / "broker.toml")
        entry = parse_document(BrokerEntry, (folder / "entry.json").read_bytes(), "entry")
        self.name = config.name
        self.key = load_private_key(folder / config.signing_key)
        self.issuer = load_issuer(folder / config.issuer_key, entry.issuer_certificate)
        self.sessions: dict[str, tuple[str, dict[str, str]]] = {}
        self.chips: dict[bytes, ec.EllipticCurvePublicKey] = {}

    async def open(self, request: web.Request) -> web.Response:
        """Open a session."""
        body = await request.read()
        message = parse_message(SessionRequest, body, limit=LIMIT)
        session = uuid.uuid4().hex
        self.sessions[session] = message.nonce, {}
        charter = {"id": "0" * 64, "version": 1}
        result = {"charter": charter, "nonce": b64(os.urandom(32)), "platform": "virtual", "session": session}
        return self.done(request_digest(body, None), message.nonce, result)

    async def attest(self, request: web.Request) -> web.Response:
        """Verify the report's signature and the proof; sign an EAR."""
        body = await request.read()
        message = parse_message(AttestRequest, body, limit=LIMIT)
        report = parse_report(unb64(message.evidence.report, where="report"))
        signature = encode_dss_signature(report.signature_r, report.signature_s)
        self.chip(unb64(message.evidence.certificates, where="certificates")).verify(
            signature, report.signed, ec.ECDSA(hashes.SHA384())
        )
        nonce = self.sessions[message.session][0]
        self.sessions[message.session] = nonce, dict(message.keys)
        digest = self.prove(request, body)
        ear = sign_jws({"claims": "0" * EAR_SIZE}, self.key, kid=self.name, typ="eat+jwt")
        return self.done(digest, nonce, {"ear": ear, "receipt": self.head()})

    async def release(self, request: web.Request) -> web.Response:
        """Verify the proof; seal a value."""
        body = await request.read()
        message = parse_message(ReleaseRequest, body, limit=LIMIT)
        digest = self.prove(request, body)
        nonce, keys = self.sessions.pop(proof_session(request.headers[PROOF_HEADER]))
        info = release_info(self.name, message.resource, 1, digest)
        sealed = seal(SECRET, unb64(keys["kem"], where="keys"), info=info)
        return self.done(digest, nonce, {"sealed": b64(sealed), "serial": 1, "receipt": self.head()})

    def prove(self, request: web.Request, body: bytes) -> str:
        """Check the call's proof; return the request's digest."""
        proof = request.headers[PROOF_HEADER]
        key = load_der_public_key(unb64(self.sessions[proof_session(proof)][1]["sign"], where="keys"))
        if not isinstance(key, Ed25519PublicKey):
            raise TypeError("a guest signs by Ed25519")
        check_proof(proof, key, broker=self.name, method=request.method, path=request.path, body=body)
        return request_digest(body, proof)

    def chip(self, table: bytes) -> ec.EllipticCurvePublicKey:
        """The key of a chip's certificate, read once."""
        if table not in self.chips:
            key = x509.load_der_x509_certificate(from_certificate_table(table).vek or b"").public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise TypeError("a chip signs by ECDSA")
            self.chips[table] = key
        return self.chips[table]

    def head(self) -> str:
        """A signed checkpoint."""
        return sign_checkpoint(Checkpoint("bare.bench", 1, bytes(32)), self.key)

    def done(self, digest: str, nonce: str, result: dict[str, Any]) -> web.Response:
        """The signed answer."""
        answer = Answer(self.name, digest, nonce, datetime.now(UTC), "done", result)
        return web.json_response({"answer": sign_answer(answer, self.key)})


async def _serve(folder: Path) -> None:
    bare = BareBroker(folder)
    app = web.Application(client_max_size=LIMIT)
    app.router.add_post("/v1/sessions", bare.open)
    app.router.add_post("/v1/attest", bare.attest)
    app.router.add_post("/v1/release", bare.release)
    tls = ServerTls(bare.issuer, bare.name, ["broker"])
    tls.renew(datetime.now(UTC))
    async with listening(app, tls, "127.0.0.1:0") as address:
        print(address.rpartition(":")[2], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1])))
