"""A device's way to gateways: HTTP/1.1 over TLS, bounded in size and time. Nothing that it brings is believed."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from hashlib import sha256
from typing import Final
from urllib.parse import urlsplit

import urllib3

from fl.edge.messages import MAX_WORDS, Blob, ProofRequest
from fl.edge.protocol import Message
from fl.edge.routes import PREFIX, SEALED
from policies.charter.store import STORE_LIMIT
from policies.errors import Refused, Unusable

TIMEOUT: Final = 30.0
"""Seconds for a connection, and again for each pause in an answer; a task may be held back for 20."""
CALL_SECONDS: Final = 600.0
MAX_PROOF: Final = 128 << 10
PIECE: Final = 1 << 20


class GatewayUnavailable(Refused):
    """No gateway answers, or none has room: `seconds` is how long it asks to be left alone (0: it does not say)."""

    def __init__(self, what: str, where: str, seconds: float = 0.0) -> None:
        super().__init__(what, where=where, do="Try again later.")
        self.seconds = seconds


class KeyRotated(Refused):
    """The group key is gone: ask for the gateway's proof again."""

    def __init__(self, where: str) -> None:
        super().__init__("the gateways have another group key now", where=where, do="Ask for the proof again.")


class _UnpinnedConnection(urllib3.connection.HTTPSConnection):
    """TLS to whoever answers: what comes over it verifies itself, so urllib3's warning would mislead."""

    def connect(self) -> None:
        super().connect()
        self.is_verified = True


class _UnpinnedPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _UnpinnedConnection


class GatewayConnection:
    """HTTPS to the gateways behind `url`. For one thread."""

    def __init__(self, url: str, *, context: ssl.SSLContext | None = None, timeout: float = TIMEOUT) -> None:
        """`context`: a TLS context if the app wants the balancer's certificate checked; it needs none for its trust."""
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment:
            raise Unusable(f"{url[:100]} is no https URL", where="gateway's address", do="Correct it.")
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            pool: type[urllib3.HTTPSConnectionPool] = _UnpinnedPool
        else:
            pool = urllib3.HTTPSConnectionPool
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._where = url
        self._path = parts.path.rstrip("/") + PREFIX
        self._pool = pool(
            parts.hostname,
            parts.port or 443,
            maxsize=2,
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            retries=False,
            ssl_context=context,
        )

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def charter(self, above: int | None) -> bytes | None:
        """The charter's files; None if there is none above version `above`. Raises GatewayUnavailable."""
        query = "" if above is None else f"?above={above}"
        status, _, body = self._call("GET", f"/charter{query}", limit=2 * STORE_LIMIT)
        return None if status == 204 else self._done(status, body)

    def proof(self, nonce: str) -> bytes:
        """The gateway's introduction over `nonce`. Raises GatewayUnavailable."""
        asked = ProofRequest(nonce=nonce).to_bytes()
        status, _, body = self._call("POST", "/proof", asked, {"Content-Type": "application/json"}, limit=MAX_PROOF)
        return self._done(status, body)

    def send(self, message: Message, sealed: bytes) -> bytes:
        """The sealed answer to a sealed request. Raises GatewayUnavailable, KeyRotated, Refused."""
        status, _, body = self._call("POST", f"/{message}", sealed, {"Content-Type": SEALED})
        return self._done(status, body)

    def blob(self, blob: Blob, have: bytes = b"") -> bytes:
        """More of a sealed blob of which `have` is here: one byte at least. Raises GatewayUnavailable, Refused."""
        most = blob.size + 16
        headers = {"Range": f"bytes={len(have)}-"} if have else {}
        status, told, body = self._call("GET", f"/blobs/{blob.id}", None, headers, limit=most, whole=False)
        if status == 200:
            return body
        if status != 206 or not told.get("Content-Range", "").startswith(f"bytes {len(have)}-") or not body:
            self._done(status if status != 206 else 400, body)
        return have + body[: most - len(have)]

    def upload(self, sealed: bytes, ticket: str, piece: int = PIECE) -> bytes:
        """Send a sealed `result` in pieces, from where it was broken off; its sealed answer.

        Raises GatewayUnavailable (call again: it goes on), KeyRotated, Refused (the ticket is good no more).
        """
        digest = sha256(sealed).hexdigest()
        path, headers = f"/uploads/{digest}", {"Upload-Ticket": ticket}
        status, _, body = self._call("GET", path, None, headers)
        at = _offset(self._done(status, body), len(sealed))
        while True:
            told = {**headers, "Upload-Offset": str(at), "Upload-Length": str(len(sealed)), "Content-Type": SEALED}
            status, _, body = self._call("PUT", path, sealed[at : at + piece], told)
            if status not in (202, 409):
                return self._done(status, body)
            before, at = at, _offset(body, len(sealed))
            if at <= before and status == 202:
                raise GatewayUnavailable("the gateway takes no further pieces", self._where)

    def _done(self, status: int, body: bytes) -> bytes:
        if status == 200:
            return body
        if status == 410:
            raise KeyRotated(self._where)
        try:
            what = str(json.loads(body)["error"]["what"])[:200]
        except (ValueError, TypeError, KeyError, RecursionError):
            what = "without saying why"
        raise Refused(f"the gateway answers HTTP {status}: {what}", where=self._where, do="Begin anew.")

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        limit: int = MAX_WORDS + 64,
        whole: bool = True,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One call: status, headers and at most `limit` bytes; not `whole`: what came before a cut, if anything did."""
        ends = time.monotonic() + CALL_SECONDS
        content = bytearray()
        try:
            response = self._pool.request(
                method, self._path + path, body=body, headers=headers, preload_content=False, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise GatewayUnavailable(f"no gateway answers: {type(error).__name__}", self._where) from error
        try:
            while chunk := response.read1(1 << 16, decode_content=False):
                content += chunk
                if len(content) > limit or time.monotonic() > ends:
                    response.close()
                    raise GatewayUnavailable("the gateway answers with too much or too slowly", self._where)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            response.close()
            if whole or not content:
                raise GatewayUnavailable(f"the answer broke off: {type(error).__name__}", self._where) from error
        finally:
            response.release_conn()
        if response.status == 503:
            after = response.headers.get("Retry-After", "0")
            raise GatewayUnavailable("the gateway has no room", self._where, float(after) if after.isdecimal() else 0.0)
        return response.status, response.headers, bytes(content)


def _offset(body: bytes, most: int) -> int:
    try:
        offset = json.loads(body)["offset"]
    except (ValueError, TypeError, KeyError, RecursionError):
        offset = None
    if type(offset) is not int or not 0 <= offset <= most:
        raise GatewayUnavailable("the gateway names no offset", "upload")
    return offset
