"""What a guest uses to talk to brokers. Synchronous; every wait has a bound.

A guest believes nothing that its host tells it. The charter's root comes from its init-data (which HOST_DATA binds),
the charter from whoever has it, since it verifies itself; a broker's keys come from the charter; the time and the
charter's version come from the broker's signed answers to nonces of the guest's own; the host's clock is used for
nothing but measuring how long something took.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from attestation.binding import NONCE_SIZE, report_data
from attestation.canonical import b64, digests, unb64
from attestation.connection import TIMEOUT, FetchedCharter
from attestation.connection import BrokerClient as BrokerClient
from attestation.connection import fetch_charter as fetch_charter
from attestation.ear import Ear, verify_ear
from attestation.errors import AnswerRefused, CharterMoved, LedgerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.hybrid import HybridPrivateKey
from attestation.identity import Identity, spiffe_id
from attestation.ledger.receipt import Receipt, check_receipt, parse_receipt
from attestation.messages import Answer, Call, release_info, request_digest, sign_proof
from policies.charter import Charter
from policies.documents import InitData, parse_init_data
from policies.errors import Unusable


class Attester(Protocol):
    """Where evidence comes from (attestation.attester)."""

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """A report over these 64 bytes, with its certificates."""


class GuestSession:
    """An attested guest's dealings with one broker: evidence, credential, resources, records.

    Use it from one thread. The broker's clock is `now()`: the time that the broker signed last, and what has passed
    since by a clock that the host cannot turn back.
    """

    def __init__(
        self,
        attester: Attester,
        init_data: bytes,
        *,
        root: bytes | None = None,
        not_before: datetime | None = None,
        timeout: float = TIMEOUT,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._attester = attester
        self._init_data = init_data
        self.init: InitData = parse_init_data(init_data)
        self._root = root
        self._not_before = not_before
        self._timeout = timeout
        self._randomness = randomness
        self._tls_key = ec.generate_private_key(ec.SECP256R1())
        self._sign_key = Ed25519PrivateKey.generate()
        self._kem_key = HybridPrivateKey.generate()
        self._fetched: FetchedCharter | None = None
        self._clock = (datetime.fromtimestamp(0, UTC), 0.0)
        self._session = ""
        self._nonce = ""
        self._counter = 0
        self._size = 0
        self._ear: Ear | None = None

    # --- what the guest knows ---------------------------------------------------------------------------------------

    @property
    def charter(self) -> Charter:
        """The charter as it was fetched last."""
        return self._known().charter

    @property
    def ear(self) -> Ear:
        """The EAR of the last attestation."""
        if self._ear is None:
            raise Unusable("the guest has not attested yet", where="session", do="Call attest() first.")
        return self._ear

    def now(self) -> datetime:
        """The broker's time."""
        said, mark = self._clock
        return said + timedelta(seconds=time.monotonic() - mark)

    def close(self) -> None:
        """Close connections."""
        if self._fetched is not None:
            self._fetched.client.close()

    def refresh_charter(self) -> Charter:
        """Fetch the charter anew; nothing older than the known one is taken."""
        known = self._fetched
        fetched = fetch_charter(
            [(broker.name, broker.url) for broker in self.init.brokers],
            charter_id=self.init.charter,
            root=self._root,
            known=known.charter if known else None,
            not_before=self._not_before,
            timeout=self._timeout,
        )
        self._fetched = fetched
        self._tell_time(fetched.at)
        if known is not None:
            known.client.close()
        return fetched.charter

    # --- what the guest does ----------------------------------------------------------------------------------------

    def attest(self) -> Identity:
        """Attest to a broker and take a credential over this guest's own keys.

        Raises BrokerRefused with every reason, BrokerUnavailable, AnswerRefused.
        """
        self.refresh_charter()
        try:
            self._appraised()
        except CharterMoved:
            self.refresh_charter()
            self._appraised()
        return self._credential()

    def renew(self) -> Identity:
        """Attest afresh with the same keys: a new EAR and a new certificate. Raises as `attest` does."""
        return self.attest()

    def release(self, resource: str, job: Mapping[str, Any] | None = None) -> bytes:
        """A resource's value, if its owner and the charter's floor release it. Raises BrokerRefused (every reason)."""
        body = json.dumps({"job": None if job is None else dict(job), "resource": resource}).encode()
        answer, request = self._prove("POST", "/v1/release", body)
        result = answer.result
        serial, sealed = result.get("serial"), result.get("sealed")
        if result.get("resource") != resource or type(serial) is not int or not isinstance(sealed, str):
            raise AnswerRefused((f"the answer is not about {resource}",))
        info = release_info(self._known().client.name, resource, serial, request)
        value = self._kem_key.open(unb64(sealed, where="sealed resource"), info=info)
        self._logged(answer, "release")
        return value

    def record(self, kind: str, document: Mapping[str, Any]) -> Receipt:
        """Have something written down in the ledger. Raises BrokerRefused with every reason."""
        return self.recorded(kind, document)[1]

    def recorded(self, kind: str, document: Mapping[str, Any]) -> tuple[str, Receipt]:
        """As `record`; returns the entry as it stands in the ledger too, for those who show it to others."""
        answer, _ = self._prove("POST", "/v1/records", json.dumps({"document": dict(document), "kind": kind}).encode())
        return str(answer.result.get("entry")), self._logged(answer, kind)

    # --- within -----------------------------------------------------------------------------------------------------

    def _known(self) -> FetchedCharter:
        if self._fetched is None:
            raise Unusable("the guest has no charter yet", where="session", do="Call attest() first.")
        return self._fetched

    def _tell_time(self, said: datetime) -> None:
        self._clock = (said, time.monotonic())

    def _keys(self) -> dict[str, bytes]:
        spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        return {
            "kem": self._kem_key.public_bytes(),
            "sign": self._sign_key.public_key().public_bytes(*spki),
            "tls": self._tls_key.public_key().public_bytes(*spki),
        }

    def _appraised(self) -> None:
        """Open a session, hand over evidence, keep the EAR."""
        known, keys = self._known(), self._keys()
        client, charter = known.client, known.charter
        self._nonce = b64(self._randomness(NONCE_SIZE))
        opened = client.answer("POST", "/v1/sessions", json.dumps({"nonce": self._nonce}).encode(), nonce=self._nonce)
        self._tell_time(opened.time)
        if opened.result.get("charter") != {"id": charter.id, "version": charter.version}:
            raise CharterMoved((f"broker {client.name} follows another version of the charter now",))
        self._session, self._counter = _text(opened, "session"), 0
        nonce = unb64(_text(opened, "nonce"), where="nonce")
        evidence = self._attester.evidence(report_data(client.name, charter.id, charter.version, nonce, keys))
        message = {
            "evidence": {"certificates": b64(evidence.certificates), "report": b64(evidence.report)},
            "init_data": b64(self._init_data),
            "keys": {purpose: b64(key) for purpose, key in keys.items()},
            "session": self._session,
        }
        answer, _ = self._prove("POST", "/v1/attest", json.dumps(message).encode())
        ear = verify_ear(_text(answer, "ear"), charter, answer.time)
        if ear.document.nonce != self._nonce or dict(ear.keys) != digests(keys) or ear.broker != client.name:
            raise AnswerRefused(("the EAR is not about this guest's nonce and keys",))
        if (ear.subject.role, ear.subject.name) != (self.init.role, self.init.name):
            raise AnswerRefused(("the EAR is about another place",))
        self._logged(answer, "appraisal")
        self._ear = ear

    def _credential(self) -> Identity:
        """Take a certificate over the TLS key, and put the identity together."""
        ear, known = self.ear, self._known()
        name = x509.Name([])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self._tls_key, hashes.SHA256())
        body = json.dumps({"csr": b64(csr.public_bytes(Encoding.DER))}).encode()
        answer, _ = self._prove("POST", "/v1/credentials", body)
        self._logged(answer, "credential")
        try:
            leaf = x509.load_der_x509_certificate(unb64(_text(answer, "certificate"), where="certificate"))
            if leaf.public_key() != self._tls_key.public_key():
                raise AnswerRefused(("the certificate is over another key",))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise AnswerRefused(("the answer holds no certificate",)) from error
        chain = leaf.public_bytes(Encoding.PEM).decode("ascii") + known.client.entry.issuer_certificate
        private = self._tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        subject = ear.subject
        return Identity(
            spiffe_id=spiffe_id(known.charter.consortium.trust_domain, subject.role, subject.name),
            role=subject.role,
            name=subject.name,
            tls_key_pem=private.decode("ascii"),
            certificate_pem=chain,
            sign_key=self._sign_key,
            kem_key=self._kem_key,
            ear=ear.token,
            ear_expires=ear.expires_at,
        )

    def _prove(self, method: str, path: str, body: bytes) -> tuple[Answer, str]:
        """Make one call with its proof; return the answer and the request's digest."""
        client = self._known().client
        self._counter += 1
        proof = sign_proof(Call(client.name, method, path, body, self._session, self._counter), self._sign_key)
        answer = client.answer(method, path, body, nonce=self._nonce, proof=proof)
        self._tell_time(answer.time)
        return answer, request_digest(body, proof)

    def _logged(self, answer: Answer, kind: str) -> Receipt:
        """Check that the answer's entry is in the broker's ledger, and that the ledger does not shrink."""
        client = self._known().client
        entry, receipt = answer.result.get("entry"), answer.result.get("receipt")
        if not isinstance(entry, str) or not isinstance(receipt, dict) or f'"kind":"{kind}"' not in entry:
            raise AnswerRefused(("the answer does not show its ledger entry",))
        parsed = parse_receipt(receipt)
        checkpoint = check_receipt(parsed, entry.encode("utf-8"), client.origin, client.key)
        if checkpoint.size < self._size:
            raise LedgerRefused((f"the ledger has {checkpoint.size} entries, it had {self._size}",), where=client.name)
        self._size = checkpoint.size
        return parsed


def _text(answer: Answer, name: str) -> str:
    """A member of an answer's result that must be a text."""
    value = answer.result.get(name)
    if not isinstance(value, str):
        raise AnswerRefused((f"the answer has no {name}",))
    return value
