"""Each way to misuse a session, an answer or the service itself, played against a real broker over real TLS."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.canonical import b64
from attestation.client import BrokerClient
from attestation.connection import Connection
from attestation.errors import AnswerRefused, BrokerRefused, LedgerRefused
from attestation.identity import dns_name
from attestation.ledger.checkpoint import parse_checkpoint
from attestation.ledger.entry import parse_entry
from attestation.messages import Call, sign_proof
from policies.charter import write_store
from policies.errors import Unusable

RawGuests = Callable[..., Any]
SITE_KEY = "borealis-hospital/key/data"
RELEASE = json.dumps({"job": None, "resource": SITE_KEY}).encode()


def test_a_replayed_call_is_refused_and_logged(raw_guests: RawGuests) -> None:
    guest = raw_guests()
    guest.attest()
    proof = guest.proof("POST", "/v1/release", RELEASE)
    guest.post("/v1/release", RELEASE, proof=proof)
    with pytest.raises(BrokerRefused, match="counter 2 was used before"):
        guest.post("/v1/release", RELEASE, proof=proof)


def test_a_proof_of_another_call_key_or_broker_is_refused(raw_guests: RawGuests) -> None:
    guest, other = raw_guests(), raw_guests("site", "south")
    guest.attest()
    other.attest()
    wrong = {
        "another body": guest.proof("POST", "/v1/release", b"{}"),
        "another path": guest.proof("POST", "/v1/records", RELEASE),
        "another key": guest.proof("POST", "/v1/release", RELEASE, key=other.sign_key),
        "another broker": sign_proof(Call("two", "POST", "/v1/release", RELEASE, guest.session, 99), guest.sign_key),
    }
    for proof in wrong.values():
        with pytest.raises(BrokerRefused):
            guest.post("/v1/release", RELEASE, proof=proof)
    assert guest.post("/v1/release", RELEASE)["resource"] == SITE_KEY


def test_a_stolen_session_without_its_key_gets_nothing(raw_guests: RawGuests) -> None:
    guest, thief = raw_guests(), raw_guests()
    guest.attest()
    thief.session, thief.guest_nonce = guest.session, guest.guest_nonce
    for path, body in (("/v1/release", RELEASE), ("/v1/records", b'{"document":{},"kind":"job"}')):
        with pytest.raises(BrokerRefused, match="signature does not verify"):
            thief.post(path, body)


def test_a_session_that_has_not_attested_gets_nothing(raw_guests: RawGuests) -> None:
    with pytest.raises(BrokerRefused, match="has not attested"):
        raw_guests().post("/v1/release", RELEASE)
    lost = raw_guests()
    lost.session = "0" * 32
    with pytest.raises(BrokerRefused, match="no such session"):
        lost.post("/v1/release", RELEASE)


def test_a_certificate_is_issued_over_the_attested_key_alone(raw_guests: RawGuests) -> None:
    guest = raw_guests()
    guest.attest()
    for key in (ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())):
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        with pytest.raises(BrokerRefused):
            guest.post("/v1/credentials", json.dumps({"csr": b64(csr.public_bytes(Encoding.DER))}).encode())


def test_a_swapped_answer_is_not_taken(raw_guests: RawGuests, guests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sits between them answers one request with the broker's genuine answer to another."""
    guest = guests("site", "north")
    guest.attest()
    answers: list[tuple[int, bytes]] = []
    genuine = Connection.call

    def recording(self: Connection, *words: Any, **more: Any) -> tuple[int, bytes]:
        answers.append(genuine(self, *words, **more))
        return answers[-1]

    monkeypatch.setattr(Connection, "call", recording)
    assert guest.release(SITE_KEY) == b"north's data key"
    monkeypatch.setattr(Connection, "call", lambda self, *words, **more: answers[0])
    with pytest.raises(AnswerRefused, match="another request"):
        guest.release(SITE_KEY)
    with pytest.raises(AnswerRefused):
        guest.record("job", {})
    status, body = answers[0]
    token = json.loads(body)["answer"]
    forged = token[:-8] + ("AAAAAAAA" if token[-8:] != "AAAAAAAA" else "BBBBBBBB")
    monkeypatch.setattr(Connection, "call", lambda self, *w, **m: (status, json.dumps({"answer": forged}).encode()))
    with pytest.raises((AnswerRefused, Unusable)):
        guest.release(SITE_KEY)


def test_a_ledger_that_shrinks_is_noticed(guests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guests("site", "north")
    guest.attest()
    monkeypatch.setattr(guest._sessions["one"], "_size", 10**9)
    with pytest.raises(LedgerRefused, match="it had"):
        guest.record("job", {})


def test_bodies_beyond_their_bounds_or_forms_are_unusable(broker: Any, raw_guests: RawGuests) -> None:
    client = BrokerClient(broker.entry, "virtual.trial")
    call = client._connection.call
    big = json.dumps({"nonce": "A" * 100_000}).encode()
    assert call("POST", "/v1/sessions", big)[0] == 413
    assert call("POST", "/v1/attest", b"{" + b" " * 600_000 + b"}")[0] == 413
    nonce = b64(bytes(32))
    for body in (
        b"",
        b"[]",
        b"not json",
        b"\xff\xfe",
        b"[" * 4000,
        json.dumps({"nonce": nonce, "more": 1}).encode(),
        json.dumps({"nonce": 7}).encode(),
        json.dumps({"nonce": nonce[:-2]}).encode(),
        f'{{"nonce":"{nonce}","nonce":"{nonce}"}}'.encode(),
    ):
        status, raw = call("POST", "/v1/sessions", body)
        assert status == 400, body[:40]
        assert json.loads(raw)["error"]["do"]
    guest = raw_guests()
    for body in (guest.attest_body(guest.evidence(), more=1), guest.attest_body(guest.evidence(), keys={}), b"{}"):
        with pytest.raises(Unusable):
            guest.post("/v1/attest", body)
    with pytest.raises(Unusable):
        client.answer("POST", "/v1/release", RELEASE, nonce="", proof=None)
    assert call("GET", "/v1/nothing")[0] == 404
    assert call("DELETE", "/v1/sessions")[0] == 405
    assert call("GET", "/v1/ledger/entries?start=x&end=1")[0] == 400
    assert call("GET", "/v1/ledger/proof?index=999999")[0] == 400
    client.close()


def test_old_tls_and_plain_http_are_refused(broker: Any) -> None:
    host, port = broker.entry.url.removeprefix("https://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), timeout=5) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/1.1 200")


def test_slow_and_half_open_clients_do_not_stop_a_good_one(broker: Any, raw_guests: RawGuests) -> None:
    host, port = broker.entry.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cadata=broker.entry.issuer_certificate)
    half = [socket.create_connection((host, int(port)), timeout=5) for _ in range(150)]
    slow = []
    for _ in range(50):
        plain = socket.create_connection((host, int(port)), timeout=5)
        wrapped = context.wrap_socket(plain, server_hostname=dns_name("broker", "one"))
        wrapped.sendall(b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n{")
        slow.append(wrapped)
    start = time.monotonic()
    guest = raw_guests()
    guest.attest()
    assert guest.post("/v1/release", RELEASE)["resource"] == SITE_KEY
    assert time.monotonic() - start < 10
    for one in (*half, *slow):
        one.close()


@pytest.mark.long
def test_ten_thousand_half_open_clients_do_not_stop_a_good_one(broker: Any, raw_guests: RawGuests) -> None:
    count, (soft, hard) = 10_000, resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    host, port = broker.entry.url.removeprefix("https://").split(":")
    half = []
    try:
        for number in range(count):
            half.append(socket.create_connection((host, int(port)), timeout=10))
            if number % 2:
                half[-1].sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        start = time.monotonic()
        guest = raw_guests()
        guest.attest()
        assert guest.post("/v1/release", RELEASE)["resource"] == SITE_KEY
        assert time.monotonic() - start < 15
    finally:
        for one in half:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_resource_is_its_owners_alone(broker: Any, world: Any) -> None:
    client = BrokerClient(broker.entry, "virtual.trial")
    charter = world.charter().id
    stranger = world.member_keys["cygnus-bio"]
    owner = world.member_keys["borealis-hospital"]
    resource = "borealis-hospital/key/new"
    with pytest.raises(BrokerRefused, match="signature is not borealis-hospital's"):
        client.deposit(resource, b"x", stranger, charter_id=charter)
    with pytest.raises(BrokerRefused, match="another charter"):
        client.deposit(resource, b"x", owner, charter_id="0" * 64)
    with pytest.raises(BrokerRefused, match="belongs to nobody-here"):
        client.deposit("nobody-here/key/new", b"x", owner, charter_id=charter)
    client.close()


def test_an_old_deposit_does_not_come_back(
    broker: Any, world: Any, guests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = BrokerClient(broker.entry, "virtual.trial")
    owner, charter = world.member_keys["cygnus-bio"], world.charter().id
    sent: list[Any] = []
    genuine = Connection.call

    def recording(self: Connection, *words: Any, **more: Any) -> tuple[int, bytes]:
        sent.append((words, more))
        return genuine(self, *words, **more)

    monkeypatch.setattr(Connection, "call", recording)
    client.deposit("cygnus-bio/key/data", b"first", owner, charter_id=charter)
    words, more = sent[-1]
    client.deposit("cygnus-bio/key/data", b"second", owner, charter_id=charter)
    status, raw = genuine(client._connection, *words, **more)
    assert status == 403
    assert "is not above the last" in json.loads(raw)["error"]["reasons"][0]
    changed = json.loads(words[2])
    changed["value"] = b64(b"other")
    status, raw = genuine(client._connection, words[0], words[1], json.dumps(changed).encode())
    assert "not the one that was signed" in " ".join(json.loads(raw)["error"]["reasons"])
    client.close()
    guest = guests("site", "south")
    guest.attest()
    assert guest.release("cygnus-bio/key/data") == b"second"


def test_an_older_charter_is_not_followed(broker: Any, world: Any, guests: Any) -> None:
    from policies.charter.making import Changes

    old = dict(world.store)
    text = world.charter().files["policies/floor.rego"]
    world.change(Changes(put={"policies/floor.rego": text + b"\n# once more\n"}))
    guest = guests("site", "north")
    newer = guest.refresh_charter().version
    write_store(broker.folder / "charter", old)
    assert guest.refresh_charter().version == newer
    client = BrokerClient(broker.entry, "virtual.trial")
    health = json.loads(client._connection.call("GET", "/healthz")[1])
    assert health["ready"]
    assert "known" in health["warnings"][0]
    client.close()
    write_store(broker.folder / "charter", world.store)
    guest.attest()


def test_secrets_are_neither_in_the_log_nor_readable_in_the_database(broker: Any, guests: Any) -> None:
    guest = guests("site", "north")
    guest.attest()
    guest.release(SITE_KEY)
    assert b"north's data key" not in (broker.folder / "state/broker.sqlite").read_bytes()
    assert b"north's data key" not in (broker.folder / "state/broker.sqlite-wal").read_bytes()
    assert "north's data key" not in json.dumps(broker.lines)
    assert all(line["request"] for line in broker.lines if line["event"] == "request")


def test_health_metrics_ledger_and_proofs(broker: Any) -> None:
    client = BrokerClient(broker.entry, "virtual.trial")
    call = client._connection.call
    assert json.loads(call("GET", "/healthz")[1])["ready"]
    assert b'seal_broker_decisions_total{decision="deposited"}' in call("GET", "/metrics")[1]
    size = parse_checkpoint(client.checkpoint()).size
    entries = json.loads(call("GET", f"/v1/ledger/entries?start=0&end={size}")[1])["entries"]
    assert len(entries) == min(size, 256)
    from attestation.canonical import unb64
    from attestation.ledger.cosignature import Ledger
    from attestation.ledger.receipt import check_receipt, parse_receipt

    first = unb64(entries[0], where="t")
    assert parse_entry(first).kind == "charter"
    receipt = parse_receipt(json.loads(call("GET", "/v1/ledger/proof?index=0")[1]))
    check_receipt(receipt, first, Ledger(client.origin, client.key, {}, 0))
    assert json.loads(call("GET", "/v1/ledger/proof?old=1")[1])["old"] == 1
    client.close()


def test_the_ledger_of_all_this_holds(broker: Any, world: Any, audited: Any) -> None:
    assert audited(broker, world).problems == ()
