"""The transit engine of Vault and OpenBao as its HTTP API documents it, for tests: over TLS, keys in memory.

What is kept to: paths, tokens, key versions with `vault:vN:` ciphertexts, AES-256-GCM with associated data, rotation
and `min_decryption_version`, error bodies and status codes (400 with the engine's words, 403, 404, 503 when sealed).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE = 12


class Refusal(Exception):
    """An answer with errors."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status = status
        self.errors = errors


@dataclass
class TransitServer:
    """A vault with one mounted transit engine. Its fields may be changed while it runs."""

    tokens: set[str]
    keys: dict[str, list[bytes]] = field(default_factory=dict)
    min_decryption: int = 1
    sealed: bool = False
    delay: threading.Event | None = None
    """While set and not released, no call is answered."""
    calls: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://127.0.0.1:{self.port}"

    def rotate(self, name: str) -> None:
        """POST transit/keys/NAME/rotate."""
        self.keys[name].append(os.urandom(32))

    def answer(self, token: str | None, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The data of one call. Raises Refusal."""
        self.calls.append(path)
        if self.delay is not None:
            self.delay.wait(30)
        if self.sealed:
            raise Refusal(503, "Vault is sealed")
        if token not in self.tokens:
            raise Refusal(403, "permission denied")
        parts = path.split("/")
        if parts[:3] != ["", "v1", "transit"] or len(parts) != 5 or parts[3] not in ("encrypt", "decrypt"):
            raise Refusal(404)
        if parts[4] not in self.keys:
            raise Refusal(400, "encryption key not found")
        versions = self.keys[parts[4]]
        bound = _decoded(body.get("associated_data", ""), "associated_data")
        if parts[3] == "encrypt":
            nonce, plain = os.urandom(NONCE), _decoded(body.get("plaintext"), "plaintext")
            sealed = base64.b64encode(nonce + AESGCM(versions[-1]).encrypt(nonce, plain, bound)).decode()
            return {"ciphertext": f"vault:v{len(versions)}:{sealed}", "key_version": len(versions)}
        prefix, version, text = ([*str(body.get("ciphertext")).split(":", 2), "", ""])[:3]
        if prefix != "vault" or not version[1:].isdigit():
            raise Refusal(400, "invalid ciphertext: no prefix")
        number = int(version[1:])
        if number < self.min_decryption or number > len(versions):
            raise Refusal(400, "ciphertext or signature version is disallowed by policy (too old)")
        raw = _decoded(text, "ciphertext")
        try:
            plain = AESGCM(versions[number - 1]).decrypt(raw[:NONCE], raw[NONCE:], bound)
        except InvalidTag as error:
            raise Refusal(400, "cipher: message authentication failed") from error
        return {"plaintext": base64.b64encode(plain).decode()}


def _decoded(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refusal(400, f"failed to base64-decode {name}") from error


@contextmanager
def running_transit(server: TransitServer, certificate: Path, key: Path) -> Iterator[TransitServer]:
    """Serve on loopback with this certificate until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            try:
                data = server.answer(self.headers.get("X-Vault-Token"), self.path, json.loads(raw or b"{}"))
                self._say(200, {"request_id": os.urandom(8).hex(), "lease_id": "", "data": data, "warnings": None})
            except Refusal as refusal:
                self._say(refusal.status, {"errors": list(refusal.errors)})

        do_PUT = do_POST

        def _say(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", server.port), Handler) as http:
        http.daemon_threads = True
        http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join(timeout=10)
