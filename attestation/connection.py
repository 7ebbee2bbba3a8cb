"""Connections to brokers: pinned TLS, bounded answers, signatures checked; and fetching a charter without trust."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, Final
from urllib.parse import quote, urlsplit

import urllib3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.binding import NONCE_SIZE
from attestation.canonical import b64, format_time, parse_time, read_canonical, read_json_object, unb64, unb64url
from attestation.errors import AnswerRefused, BrokerRefused, BrokerUnavailable
from attestation.identity import dns_name
from attestation.jws import ed25519_public_key, sign_jws
from attestation.ledger.checkpoint import ledger_origin, open_checkpoint
from attestation.ledger.cosignature import Ledger, ledger_of
from attestation.ledger.receipt import Receipt, parse_receipt
from attestation.messages import (
    DEPOSIT_TYPE,
    PROOF_HEADER,
    Answer,
    read_answer,
    request_digest,
    value_commitment,
)
from policies.charter import Charter, load_charter
from policies.charter.store import FILE_COUNT_LIMIT, FILE_LIMIT, STORE_LIMIT
from policies.documents import BrokerEntry
from policies.errors import Refused, Unusable

TIMEOUT: Final = 10.0
"""Seconds for one call's connection, and again for each pause in its answer."""
CALL_SECONDS: Final = 60.0
"""Seconds for one call in all."""
MAX_ANSWER: Final = 4 * 1024 * 1024
MAX_STORE_ANSWER: Final = 2 * STORE_LIMIT
_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a guest's clock is its host's; freshness comes from signed answers."""


class _UnpinnedConnection(urllib3.connection.HTTPSConnection):
    """TLS to whoever answers: what is fetched over it verifies itself, so urllib3's warning would mislead."""

    def connect(self) -> None:
        super().connect()
        self.is_verified = True


class _UnpinnedPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _UnpinnedConnection


class Connection:
    """HTTPS to one broker, or to what else `role` says.

    With `issuer` (PEM), only a server under that certificate and with the name of its role is it. Without `issuer`
    nothing that it says may be believed for its own sake: that is for fetching what verifies itself.
    """

    def __init__(
        self, name: str, url: str, issuer: str | None, *, timeout: float = TIMEOUT, role: str = "broker"
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        if issuer is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            context.load_verify_locations(cadata=issuer)
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise Unusable(f"{url[:100]} is no https URL", where=f"{role}'s address", do="Correct it.")
        self.name = name
        self._role = role
        self.url = url
        self._path = parts.path.rstrip("/")
        host_name = dns_name(role, name)
        pool = _UnpinnedPool if issuer is None else urllib3.HTTPSConnectionPool
        self._pool = pool(
            parts.hostname,
            parts.port or 443,
            maxsize=4,
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            retries=False,
            ssl_context=context,
            assert_hostname=False if issuer is None else host_name,
            server_hostname=host_name,
        )

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        proof: str | None = None,
        limit: int = MAX_ANSWER,
        content_type: str = "application/json",
    ) -> tuple[int, bytes]:
        """Make one call; return the status and at most `limit` bytes. Raises BrokerUnavailable."""
        headers = {"Host": dns_name(self._role, self.name), "Accept": content_type}
        if body is not None:
            headers["Content-Type"] = content_type
        if proof is not None:
            headers[PROOF_HEADER] = proof
        ends = time.monotonic() + CALL_SECONDS
        try:
            response = self._pool.request(
                method, self._path + path, body=body, headers=headers, preload_content=False, redirect=False
            )
            try:
                content = bytearray()
                while chunk := response.read1(65536, decode_content=False):
                    content += chunk
                    if len(content) > limit or time.monotonic() > ends:
                        response.close()
                        raise BrokerUnavailable(
                            f"{self._role} {self.name} answers with too much or too slowly", where=self.url
                        )
                return response.status, bytes(content)
            finally:
                response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise BrokerUnavailable(
                f"{self._role} {self.name} cannot be reached: {_reason(error)}", where=self.url
            ) from error

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()


class BrokerClient:
    """One broker, known by its entry in a charter: what it says counts only if its keys signed it."""

    def __init__(
        self, entry: BrokerEntry, trust_domain: str, *, url: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self.entry = entry
        self.name = entry.name
        self.key = ed25519_public_key(entry.signing_key)
        self.origin = ledger_origin(trust_domain, entry.name)
        self._connection = Connection(entry.name, url or entry.url, entry.issuer_certificate, timeout=timeout)

    def close(self) -> None:
        """Close idle connections."""
        self._connection.close()

    def time(self) -> Answer:
        """The broker's signed time, charter version and checkpoint, over a fresh nonce."""
        nonce = b64(os.urandom(NONCE_SIZE))
        return self.answer("GET", f"/v1/time?nonce={quote(nonce, safe='')}", None, nonce=nonce)

    def charter_store(self, *, newest: bool = False) -> dict[str, bytes]:
        """The charter's files: verify them with `load_charter`. `newest`: its timestamp may lack signatures."""
        return read_charter_store(self._connection, "/v1/charter/newest" if newest else "/v1/charter")

    def checkpoint(self) -> str:
        """The ledger's head, a signed note, checked."""
        status, raw = self._connection.call("GET", "/v1/ledger/checkpoint")
        if status != 200:
            raise BrokerUnavailable(f"broker {self.name} gives no checkpoint (HTTP {status})", where=self.entry.url)
        note = raw.decode("utf-8", errors="replace")
        open_checkpoint(note, self.origin, self.key)
        return note

    def deposit(
        self,
        resource: str,
        value: bytes,
        key: Ed25519PrivateKey,
        *,
        charter_id: str,
        at: datetime | None = None,
        generation: int = 0,
    ) -> Receipt:
        """Deposit an owner's resource, signed by the owner's member key. Raises BrokerRefused with every reason.

        With a `generation`, `value` is this broker's share of a split resource (attestation.split).
        """
        moment = at or self.time().time
        salt = os.urandom(32)
        content = {
            "broker": self.name,
            "charter": charter_id,
            "commitment": value_commitment(salt, value),
            "resource": resource,
            "serial": max(int(moment.timestamp() * 1000), time.time_ns() // 1_000_000),
            "time": format_time(moment),
            **({"generation": generation} if generation else {}),
        }
        token = sign_jws(content, key, kid=resource.partition("/")[0], typ=DEPOSIT_TYPE)
        body = json.dumps({"deposit": token, "salt": b64(salt), "value": b64(value)}).encode()
        answer = self.answer("PUT", f"/v1/resources/{resource}", body, nonce="")
        receipt = answer.result.get("receipt")
        if not isinstance(receipt, dict):
            raise AnswerRefused(("the answer has no receipt",))
        return parse_receipt(receipt)

    def answer(self, method: str, path: str, body: bytes | None, *, nonce: str, proof: str | None = None) -> Answer:
        """Make one call and check that its answer is this broker's, to this request.

        Raises BrokerRefused (the broker's signed refusal, every reason), AnswerRefused (an answer that proves nothing),
        BrokerUnavailable, Unusable.
        """
        status, raw = self._connection.call(method, path, body, proof=proof)
        try:
            document = read_json_object(raw, where=f"answer of {self.name}", limit=MAX_ANSWER)
        except Unusable as error:
            raise BrokerUnavailable(f"broker {self.name} answers HTTP {status} without JSON", where=path) from error
        token = document.get("answer")
        if not isinstance(token, str):
            raise self._unsigned(status, path, document)
        answer = read_answer(token, self.key, broker=self.name, request=request_digest(body or b"", proof), nonce=nonce)
        if answer.status == "done":
            return answer
        if status == 503:
            raise BrokerUnavailable(f"broker {self.name}: {'; '.join(answer.reasons)}", where=path)
        raise BrokerRefused(answer.reasons, where=f"broker {self.name}")

    def _unsigned(self, status: int, path: str, document: Mapping[str, Any]) -> Exception:
        error = document.get("error")
        what = str(error.get("what"))[:500] if isinstance(error, dict) else f"HTTP {status}"
        if status in (400, 404, 408, 413):
            return Unusable(f"broker {self.name} cannot use the request: {what}", where=path, do="Correct the request.")
        return BrokerUnavailable(f"broker {self.name}: {what}", where=path)


def read_charter_store(connection: Connection, path: str = "/v1/charter") -> dict[str, bytes]:
    """GET /v1/charter: the files of a charter, bounded, unverified."""
    status, raw = connection.call("GET", path, limit=MAX_STORE_ANSWER)
    where = f"charter from {connection.name}"
    if status != 200:
        raise BrokerUnavailable(f"broker {connection.name} gives no charter (HTTP {status})", where=connection.url)
    files = read_json_object(raw, where=where, limit=MAX_STORE_ANSWER).get("files")
    if not isinstance(files, dict) or len(files) > FILE_COUNT_LIMIT:
        raise Unusable("this is no charter's store", where=where, do="Check the broker's version.")
    store = {}
    for name, text in files.items():
        if not isinstance(text, str) or len(text) > 2 * FILE_LIMIT:
            raise Unusable("this is no charter's store", where=where, do="Check the broker's version.")
        store[name] = unb64(text, where=where)
    return store


@dataclass(frozen=True, slots=True)
class FetchedCharter:
    """A charter that was fetched from a broker and holds at the time that the broker signed."""

    charter: Charter
    store: Mapping[str, bytes] = field(repr=False)
    root: bytes = field(repr=False)
    at: datetime
    client: BrokerClient = field(repr=False)


def fetch_charter(
    brokers: Sequence[tuple[str, str]],
    *,
    charter_id: str | None = None,
    root: bytes | None = None,
    known: Charter | None = None,
    not_before: datetime | None = None,
    timeout: float = TIMEOUT,
) -> FetchedCharter:
    """Fetch the charter whose first root is `root` (or has the SHA-256 `charter_id`) from the first broker that has it.

    `brokers` are (name, URL) as the host or the user says; their keys come from the charter. The time is the broker's,
    signed over a fresh nonce; it may not be before `not_before` (the reader's own build), nor the charter older than
    `known`. Raises Refused with what each broker did, or BrokerUnavailable if none could be reached.
    """
    if root is None and charter_id is None:
        raise Unusable("no charter is named", where="charter", do="Give its first root, or its digest.")
    failures: list[Exception] = []
    for name, url in brokers:
        try:
            return fetch_from(name, url, charter_id, root, known, not_before, timeout)
        except (Refused, Unusable) as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    reasons = tuple(f"{name}: {error}" for (name, _), error in zip(brokers, failures, strict=True))
    if failures and all(isinstance(error, BrokerUnavailable) for error in failures):
        raise BrokerUnavailable("; ".join(reasons), where="brokers")
    raise BrokerRefused(reasons or ("no broker is named",), where="brokers")


def fetch_from(
    name: str,
    url: str,
    charter_id: str | None,
    root: bytes | None,
    known: Charter | None,
    not_before: datetime | None,
    timeout: float,
) -> FetchedCharter:
    """Fetch the charter from one broker, as `fetch_charter` does from the first that has it; raises as it does."""
    unpinned = Connection(name, url, None, timeout=timeout)
    try:
        store = read_charter_store(unpinned)
        said = _said_time(unpinned)
    finally:
        unpinned.close()
    trusted = store.get("metadata/1.root.json", b"") if root is None else root
    if charter_id is not None and sha256(trusted).hexdigest() != charter_id:
        raise BrokerRefused((f"broker {name} has another charter than {charter_id[:16]}…",), where=url)
    # Its broker entry is verified by the charter's signatures, which no time changes; what the broker said about the
    # time is then asked again over its pinned key, and the charter judged at that.
    charter = load_charter(store, trusted, said, known=known)
    entry = charter.broker(name)
    if entry is None:
        raise BrokerRefused((f"the charter has no broker {name}",), where=url)
    client = BrokerClient(entry, charter.consortium.trust_domain, url=url, timeout=timeout)
    try:
        answer = client.time()
        charter = load_charter(store, trusted, answer.time, known=known)
        if answer.result.get("charter") != {"id": charter.id, "version": charter.version}:
            raise BrokerRefused((f"broker {name} gave another charter than it follows",), where=url)
        if not_before is not None and answer.time < not_before:
            reason = f"broker {name} says it is {format_time(answer.time)}, before this image was built"
            raise BrokerRefused((reason,), where=url)
    except BaseException:
        client.close()
        raise
    return FetchedCharter(charter, store, trusted, answer.time, client)


def ledger_keys(charter: Charter) -> dict[str, Ledger]:
    """How the charter makes each broker's ledger known, by the ledger's origin."""
    ledgers = (ledger_of(charter.consortium, broker) for broker in charter.consortium.brokers)
    return {ledger.origin: ledger for ledger in ledgers}


def _said_time(connection: Connection) -> datetime:
    """What a server that nobody has verified says about the time: believed only until its key is known."""
    nonce = b64(os.urandom(NONCE_SIZE))
    status, raw = connection.call("GET", f"/v1/time?nonce={quote(nonce, safe='')}")
    token = read_json_object(raw, where="time", limit=MAX_ANSWER).get("answer")
    if status != 200 or not isinstance(token, str) or token.count(".") != 2:
        raise BrokerUnavailable(
            f"broker {connection.name} does not tell the time (HTTP {status})", where=connection.url
        )
    payload = read_canonical(unb64url(token.split(".")[1], where="time"), where="time", limit=MAX_ANSWER)
    return parse_time(str(payload.get("time")), where="time")


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error
    return f"{type(inner).__name__}: {inner}".replace("\n", " ")[:300]
