"""One guest's dealings with one broker: a session, the evidence for it, the EAR, and calls that prove possession.

A renewal opens a new session and takes its place only when the broker has affirmed it: until then the older one, with
its EAR, stands.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.agreement import Said
from attestation.binding import NONCE_SIZE, device_nonce, report_data
from attestation.canonical import b64, unb64
from attestation.connection import BrokerClient
from attestation.ear import Ear, verify_ear
from attestation.errors import AnswerRefused, BrokerUnavailable, LedgerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.guest_keys import GuestKeys
from attestation.hybrid import seal
from attestation.ledger.cosignature import Ledger
from attestation.ledger.receipt import Receipt, check_receipt, parse_receipt
from attestation.messages import Answer, Call, release_info, request_digest, sign_proof
from attestation.vault_messages import deposit_info
from attestation.vaults import VAULT_KIND, Deal, Mark, VaultState, read_state
from policies.charter import Charter
from policies.errors import Unusable
from policies.init_data import InitData

BUSY_SECONDS: Final = 10.0
"""How long a call waits for an earlier one to the same broker."""


class Attester(Protocol):
    """Where evidence comes from (attestation.attester). Called by one thread at a time."""

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """A report over these 64 bytes, with its certificates."""


class DeviceAttester(Protocol):
    """Where evidence of further devices comes from (attestation.attester.gpu). Called by one thread at a time."""

    @property
    def seconds(self) -> float:
        """How long it may take."""

    def evidence(self, nonce: bytes) -> str:
        """The evidence of every further device, asked with these 32 bytes, as it travels beside the CPU's."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What a guest is, whatever broker it talks to. `devices`: its GPUs and switches, if its image is made for some."""

    attester: Attester
    attesting: threading.Lock
    init_data: bytes
    init: InitData
    keys: GuestKeys
    randomness: Callable[[int], bytes]
    devices: DeviceAttester | None = None


@dataclass(slots=True)
class Opened:
    """A session that was opened: the broker's signed time and charter version are in `said`."""

    said: Said
    charter_id: str
    session: str
    nonce: bytes
    guest_nonce: str
    counter: int = 0


class BrokerSession:
    """A guest at one broker. Safe to use from many threads; calls go one at a time.

    `ledger`: how the charter that the guest follows makes this broker's ledger known, and who must have cosigned it.
    """

    def __init__(self, guest: Guest, client: BrokerClient, ledger: Ledger) -> None:
        self._guest = guest
        self.client = client
        self.ledger = ledger
        self._lock = threading.Lock()
        self._attested: Opened | None = None
        self._size = 0
        self.ear: Ear | None = None
        """The EAR of the last attestation that this broker affirmed."""

    @property
    def name(self) -> str:
        """The broker's name."""
        return self.client.name

    def close(self) -> None:
        """Close idle connections."""
        self.client.close()

    def open(self) -> Opened:
        """Open a session. Raises BrokerRefused, BrokerUnavailable, AnswerRefused."""
        guest_nonce = b64(self._guest.randomness(NONCE_SIZE))
        body = json.dumps({"nonce": guest_nonce}).encode()
        with self._turn():
            asked = time.monotonic()
            answer = self.client.answer("POST", "/v1/sessions", body, nonce=guest_nonce)
            heard = time.monotonic()
        identifier, version = charter_of(answer)
        said = Said(self.name, answer.time, version, asked, heard)
        nonce = unb64(_text(answer, "nonce"), where="nonce")
        return Opened(said, identifier, _text(answer, "session"), nonce, guest_nonce)

    def told(self) -> tuple[Said, str]:
        """The broker's signed time and charter version, and the charter's id. Raises as `open` does."""
        with self._turn():
            asked = time.monotonic()
            answer = self.client.time()
            heard = time.monotonic()
        identifier, version = charter_of(answer)
        return Said(self.name, answer.time, version, asked, heard), identifier

    def attest(self, opened: Opened, charter: Charter) -> Ear:
        """Hand over evidence under `charter`, which is what the broker follows; keep and return its EAR.

        Raises BrokerRefused with every reason, BrokerUnavailable, AnswerRefused, EarRefused, LedgerRefused.
        """
        guest, keys = self._guest, self._guest.keys
        with guest.attesting:
            here = (self.name, charter.id, charter.version, opened.nonce)
            devices = "" if guest.devices is None else guest.devices.evidence(device_nonce(*here, keys.digests))
            evidence = guest.attester.evidence(report_data(*here, keys.public, devices))
        message: dict[str, Any] = {
            "evidence": {"certificates": b64(evidence.certificates), "report": b64(evidence.report)},
            "init_data": b64(guest.init_data),
            "keys": {purpose: b64(key) for purpose, key in keys.public.items()},
            "session": opened.session,
            **({"devices": devices} if devices else {}),
        }
        with self._turn():
            answer, _ = self._prove(opened, "POST", "/v1/attest", json.dumps(message).encode())
            ear = verify_ear(_text(answer, "ear"), charter, answer.time)
            if (ear.document.nonce, ear.broker) != (opened.guest_nonce, self.name) or dict(ear.keys) != keys.digests:
                raise AnswerRefused(("the EAR is not about this guest's nonce and keys",))
            if (ear.subject.role, ear.subject.name) != (guest.init.role, guest.init.name):
                raise AnswerRefused(("the EAR is about another place",))
            self._logged(answer, "appraisal")
            self._attested, self.ear = opened, ear
        return ear

    def credential(self, ears: Sequence[str]) -> str:
        """A certificate over the TLS key that carries this broker's EAR and `ears` of others; PEM, with its issuer."""
        keys = self._guest.keys
        body = json.dumps({"csr": b64(keys.certificate_request()), "ears": list(ears)}).encode()
        with self._turn():
            answer, _ = self._prove(self._standing(), "POST", "/v1/credentials", body)
            self._logged(answer, "credential")
        try:
            leaf = x509.load_der_x509_certificate(unb64(_text(answer, "certificate"), where="certificate"))
            if leaf.public_key() != keys.tls.public_key():
                raise AnswerRefused(("the certificate is over another key",))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise AnswerRefused(("the answer holds no certificate",)) from error
        return leaf.public_bytes(Encoding.PEM).decode("ascii") + self.client.entry.issuer_certificate

    def release(self, resource: str, job: Mapping[str, Any] | None) -> bytes:
        """A resource's value. Raises BrokerRefused with every reason, BrokerUnavailable, AnswerRefused."""
        body = json.dumps({"job": None if job is None else dict(job), "resource": resource}).encode()
        with self._turn():
            answer, request = self._prove(self._standing(), "POST", "/v1/release", body)
            return self._opened(answer, resource, request)

    def look(self, vault: str) -> tuple[VaultState, bytes]:
        """What this broker knows of a vault, and its key for what is deposited there (attestation.hybrid)."""
        body = json.dumps({"vault": vault}).encode()
        with self._turn():
            answer, _ = self._prove(self._standing(), "POST", "/v1/vaults/look", body)
        return _state(answer, vault), unb64(_text(answer, "kem"), where="kem")

    def open_vault(self, vault: str, epoch: int) -> tuple[bytes, VaultState]:
        """A vault's key, or this broker's share of it, and the vault's state, which this boot holds in this epoch."""
        body = json.dumps({"epoch": epoch, "vault": vault}).encode()
        with self._turn():
            answer, request = self._prove(self._standing(), "POST", "/v1/vaults/open", body)
            return self._opened(answer, vault, request), _state(answer, vault, "resource")

    def deposit_share(self, vault: str, epoch: int, deal: Deal, share: bytes, kem: bytes) -> VaultState:
        """Deposit this broker's share of a vault's key, sealed to the key that it has told (`look`)."""
        sealed = seal(share, kem, info=deposit_info(self.name, vault, deal.number))
        asked = {"deal": deal.model_dump(mode="json"), "epoch": epoch, "sealed": b64(sealed), "vault": vault}
        return self._vault_step("deposit", vault, asked)

    def mark(self, step: Literal["prepare", "commit"], vault: str, mark: Mark) -> VaultState:
        """Prepare or commit a vault's store."""
        return self._vault_step(step, vault, {"mark": mark.model_dump(mode="json"), "vault": vault})

    def recorded(self, kind: str, document: Mapping[str, Any]) -> tuple[str, Receipt]:
        """Have something written down; the entry as it stands in this broker's ledger, and its receipt."""
        body = json.dumps({"document": dict(document), "kind": kind}).encode()
        with self._turn():
            answer, _ = self._prove(self._standing(), "POST", "/v1/records", body)
            return str(answer.result.get("entry")), self._logged(answer, kind)

    # --- within -----------------------------------------------------------------------------------------------------

    def _opened(self, answer: Answer, resource: str, request: str) -> bytes:
        """The value in the answer to a request for a resource, once its entry is seen to be in the ledger."""
        result = answer.result
        serial, sealed = result.get("serial"), result.get("sealed")
        if result.get("resource") != resource or type(serial) is not int or not isinstance(sealed, str):
            raise AnswerRefused((f"the answer is not about {resource}",))
        info = release_info(self.name, resource, serial, request)
        value = self._guest.keys.kem.open(unb64(sealed, where="sealed resource"), info=info)
        self._logged(answer, "release")
        return value

    def _vault_step(self, step: str, vault: str, asked: Mapping[str, Any]) -> VaultState:
        with self._turn():
            answer, _ = self._prove(self._standing(), "POST", f"/v1/vaults/{step}", json.dumps(asked).encode())
            self._logged(answer, VAULT_KIND)
        return _state(answer, vault)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time; an earlier one that hangs makes this broker unavailable, not its caller hang."""
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            raise BrokerUnavailable(f"broker {self.name} has not answered an earlier call yet", where="brokers")
        try:
            yield
        finally:
            self._lock.release()

    def _standing(self) -> Opened:
        if self._attested is None:
            raise Unusable(f"the guest has not attested to {self.name}", where="session", do="Call attest() first.")
        return self._attested

    def _prove(self, opened: Opened, method: str, path: str, body: bytes) -> tuple[Answer, str]:
        """Make one call with its proof; return the answer and the request's digest."""
        opened.counter += 1
        call = Call(self.name, method, path, body, opened.session, opened.counter)
        proof = sign_proof(call, self._guest.keys.sign)
        answer = self.client.answer(method, path, body, nonce=opened.guest_nonce, proof=proof)
        return answer, request_digest(body, proof)

    def _logged(self, answer: Answer, kind: str) -> Receipt:
        """Check that the answer's entry is in the broker's ledger, and that the ledger does not shrink."""
        entry, receipt = answer.result.get("entry"), answer.result.get("receipt")
        if not isinstance(entry, str) or not isinstance(receipt, dict) or f'"kind":"{kind}"' not in entry:
            raise AnswerRefused(("the answer does not show its ledger entry",))
        parsed = parse_receipt(receipt)
        checkpoint = check_receipt(parsed, entry.encode("utf-8"), self.ledger)
        if checkpoint.size < self._size:
            raise LedgerRefused((f"the ledger has {checkpoint.size} entries, it had {self._size}",), where=self.name)
        self._size = checkpoint.size
        return parsed


def charter_of(answer: Answer) -> tuple[str, int]:
    """The charter that a broker says it follows: its id and version. Raises AnswerRefused."""
    charter = answer.result.get("charter")
    identifier, version = (charter.get("id"), charter.get("version")) if isinstance(charter, dict) else (None, None)
    if not isinstance(identifier, str) or type(version) is not int:
        raise AnswerRefused(("the answer names no charter",))
    return identifier, version


def _state(answer: Answer, vault: str, name: str = "vault") -> VaultState:
    """A vault's state in an answer that names the vault."""
    if answer.result.get(name) != vault:
        raise AnswerRefused((f"the answer is not about {vault}",))
    return read_state(answer.result.get("state"))


def _text(answer: Answer, name: str) -> str:
    """A member of an answer's result that must be a text."""
    value = answer.result.get(name)
    if not isinstance(value, str):
        raise AnswerRefused((f"the answer has no {name}",))
    return value
