"""The KBS protocol 0.4.0 by raw HTTP, written from the protocol's reference alone: no code of ours on this side."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from attestation.evidence.certificate_table import ARK_GUID, ASK_GUID, CRL_GUID, VCEK_GUID, parse_certificate_table
from attestation.evidence.report import Product, parse_report
from attestation.evidence.tcb import decode_tcb
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment

OPEN_KEY, SITE_KEY = "borealis-hospital/key/open", "borealis-hospital/key/data"
ERROR_TYPE = "https://github.com/confidential-containers/kbs/errors/"


def b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def jcs(value: dict[str, Any]) -> bytes:
    """Enough of RFC 8785 for objects of ASCII strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass
class TeeKey:
    """A guest's key pair as a JWK, and how its JWE is opened."""

    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    def jwk(self) -> dict[str, str]:
        if isinstance(self.private, rsa.RSAPrivateKey):
            numbers = self.private.public_key().public_numbers()
            n, e = (number.to_bytes((number.bit_length() + 7) // 8, "big") for number in (numbers.n, numbers.e))
            return {"kty": "RSA", "alg": "RSA-OAEP-256", "n": b64url(n), "e": b64url(e)}
        point = self.private.public_key().public_numbers()
        size = (self.private.curve.key_size + 7) // 8
        name = {256: "P-256", 521: "P-521"}[self.private.curve.key_size]
        x, y = (b64url(value.to_bytes(size, "big")) for value in (point.x, point.y))
        return {"kty": "EC", "crv": name, "alg": "ECDH-ES+A256KW", "x": x, "y": y}

    def open(self, jwe: dict[str, str]) -> bytes:
        assert set(jwe) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
        parsed = json.loads(unb64url(jwe["protected"]))
        # The stock client writes the header anew (alg, enc, then the rest sorted) and takes that as the AAD.
        rest = {name: parsed[name] for name in sorted(parsed) if name not in ("alg", "enc")}
        if "epk" in rest:
            rest["epk"] = {name: rest["epk"][name] for name in sorted(rest["epk"])}
        again = json.dumps({"alg": parsed["alg"], "enc": parsed["enc"], **rest}, separators=(",", ":"))
        assert unb64url(jwe["protected"]).decode() == again
        wrapped = unb64url(jwe["encrypted_key"])
        if isinstance(self.private, rsa.RSAPrivateKey):
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
            key = self.private.decrypt(wrapped, oaep)
        else:
            epk = parsed["epk"]
            x, y = (int.from_bytes(unb64url(epk[name]), "big") for name in ("x", "y"))
            shared = self.private.exchange(
                ec.ECDH(), ec.EllipticCurvePublicNumbers(x, y, self.private.curve).public_key()
            )
            name = b"ECDH-ES+A256KW"
            info = len(name).to_bytes(4, "big") + name + bytes(8) + (256).to_bytes(4, "big")
            assert len(wrapped) == 40
            key = aes_key_unwrap(ConcatKDFHash(hashes.SHA256(), 32, info).derive(shared), wrapped)
        sealed = unb64url(jwe["ciphertext"]) + unb64url(jwe["tag"])
        return AESGCM(key).decrypt(unb64url(jwe["iv"]), sealed, b64url(again.encode()).encode())


def guest_components_evidence(report: bytes, table: bytes, product: Product) -> dict[str, Any]:
    """The JSON that guest components make of a report and its certificates."""
    fields = parse_report(report)

    def tcb(raw: bytes) -> dict[str, Any]:
        level = decode_tcb(raw, product)
        fmc = level.fmc if product is Product.TURIN else None
        return {
            "fmc": fmc,
            "bootloader": level.bootloader,
            "tee": level.tee,
            "snp": level.snp,
            "microcode": level.microcode,
        }

    def version(which: str) -> dict[str, int]:
        return {part: getattr(fields, f"{which}_{part}") for part in ("major", "minor", "build")}

    names = {VCEK_GUID: "VCEK", ASK_GUID: "ASK", ARK_GUID: "ARK", CRL_GUID: "CRL"}
    byte_fields = [
        "family_id",
        "image_id",
        "report_data",
        "measurement",
        "host_data",
        "id_key_digest",
        "author_key_digest",
    ]
    byte_fields += ["report_id", "report_id_ma", "chip_id"]
    return {
        "attestation_report": {
            "version": fields.version,
            "guest_svn": fields.guest_svn,
            "policy": fields.policy,
            "vmpl": fields.vmpl,
            "sig_algo": fields.signature_algo,
            "plat_info": fields.platform_info,
            "key_info": fields.key_info,
            "cpuid_fam_id": fields.cpuid_fam_id,
            "cpuid_mod_id": fields.cpuid_mod_id,
            "cpuid_step": fields.cpuid_step,
            **{name: list(getattr(fields, name)) for name in byte_fields},
            **{
                name: tcb(getattr(fields, name))
                for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
            },
            "current": version("current"),
            "committed": version("committed"),
            "launch_mit_vector": fields.launch_mit_vector,
            "current_mit_vector": fields.current_mit_vector,
            "signature": {
                "r": list(fields.signature_r.to_bytes(72, "little")),
                "s": list(fields.signature_s.to_bytes(72, "little")),
            },
        },
        "cert_chain": [{"cert_type": names[guid], "data": list(der)} for guid, der in parse_certificate_table(table)],
    }


@dataclass
class KbsClient:
    """A stock client: HTTP with a cookie store."""

    url: str
    issuer: str
    cookies: dict[str, str] = field(default_factory=dict)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        host, port = self.url.removeprefix("https://").split(":")
        context = ssl.create_default_context(cadata=self.issuer)
        context.check_hostname = False
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
        sent = dict(headers or {})
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection.request(method, f"/kbs/v0{path}", None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        raw, got = response.read(), {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        if "set-cookie" in got:
            name, _, value = got["set-cookie"].partition(";")[0].partition("=")
            self.cookies[name] = value
        return response.status, json.loads(raw), got


@dataclass
class KbsGuest:
    """One guest speaking the protocol."""

    client: KbsClient
    attester: Any
    product: Product
    init_data: str | None
    key: TeeKey
    nonce: str = ""

    def auth(self, **changes: Any) -> tuple[int, Any]:
        extra = {"supported-hash-algorithms": ["sha384", "sha512"]}
        request = {"version": "0.4.0", "tee": "snp", "extra-params": extra, **changes}
        status, answer, _ = self.client.call("POST", "/auth", request)
        self.nonce = answer.get("nonce", "")
        return status, answer

    def attest(self, *, jwk: dict[str, str] | None = None, nonce: str | None = None, more: str = "") -> tuple[int, Any]:
        runtime = {"nonce": nonce or self.nonce, "tee-pubkey": self.key.jwk()}
        bound = hashlib.sha384(jcs({**runtime, "additional-evidence": more})).digest().ljust(64, b"\0")
        evidence = self.attester.evidence(bound)
        body = {
            "init-data": None if self.init_data is None else {"format": "toml", "body": self.init_data},
            "runtime-data": {**runtime, "tee-pubkey": self.key.jwk() if jwk is None else jwk},
            "tee-evidence": {
                "primary_evidence": guest_components_evidence(evidence.report, evidence.certificates, self.product),
                "additional_evidence": more,
            },
        }
        status, answer, _ = self.client.call("POST", "/attest", body)
        return status, answer

    def resource(self, name: str, *, token: str | None = None) -> tuple[int, Any, dict[str, str]]:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        return self.client.call("GET", f"/resource/{name}", headers=headers)


@pytest.fixture(scope="module")
def rsa_key() -> TeeKey:
    return TeeKey(rsa.generate_private_key(65537, 2048))


Guests = Callable[..., KbsGuest]


@pytest.fixture
def kbs_guest(world: Any, broker: Any) -> Guests:
    def make(key: TeeKey | None = None, *, product: Product = Product.MILAN, **overrides: Any) -> KbsGuest:
        client = KbsClient(broker.entry.url, broker.entry.issuer_certificate)
        attester = world.attester("site", "north", product=product, **overrides)
        chosen = key or TeeKey(ec.generate_private_key(ec.SECP256R1()))
        return KbsGuest(client, attester, product, world.init_data["site/north"].decode(), chosen)

    return make


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()], ids=["P-256", "P-521"])
@pytest.mark.parametrize("product", list(Product))
def test_auth_attest_resource(kbs_guest: Guests, curve: ec.EllipticCurve, product: Product) -> None:
    guest = kbs_guest(TeeKey(ec.generate_private_key(curve)), product=product)
    status, challenge = guest.auth()
    assert (status, challenge["extra-params"]) == (200, "")
    assert len(base64.b64decode(challenge["nonce"], validate=True)) == 32
    assert len(bytes.fromhex(guest.client.cookies["kbs-session-id"])) == 16
    status, answer = guest.attest()
    assert status == 200, answer
    _, payload, _ = answer["token"].split(".")
    claims = json.loads(unb64url(payload))
    assert claims["exp"] > claims["iat"]
    annotated = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert annotated["runtime_data_claims"]["tee-pubkey"] == guest.key.jwk()
    assert claims["submods"]["cpu0"]["ear.status"] == "affirming"
    assert claims["platform"] == "virtual"
    status, jwe, headers = guest.resource(OPEN_KEY)
    assert status == 200
    assert guest.key.open(jwe) == b"opened to the KBS protocol"
    assert json.loads(base64.b64decode(headers["seal-receipt"]))["index"] > 0
    status, jwe, _ = guest.resource(OPEN_KEY, token=answer["token"])
    assert guest.key.open(jwe) == b"opened to the KBS protocol"


def test_rsa_oaep(kbs_guest: Guests, rsa_key: TeeKey) -> None:
    guest = kbs_guest(rsa_key)
    guest.auth()
    assert guest.attest()[0] == 200
    assert rsa_key.open(guest.resource(OPEN_KEY)[1]) == b"opened to the KBS protocol"


def test_what_its_owner_did_not_open_is_refused(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    guest.auth()
    guest.attest()
    status, error, _ = guest.resource(SITE_KEY)
    assert status == 401
    assert error["type"].startswith(ERROR_TYPE)
    assert "does not open this resource to the KBS protocol" in error["detail"]
    status, error, _ = guest.resource("Not/a/Resource")
    assert (status, set(error)) == (404, {"type", "detail"})


def test_versions_and_tees_other_than_ours_are_refused(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    assert guest.auth(**{"extra-params": ""})[0] == 200
    for changes in (
        {"version": "0.1.1"},
        {"version": "0.4.1"},
        {"tee": "sample"},
        {"tee": "tdx"},
        {"more": 1},
        {"tee": 1},
    ):
        status, error = guest.auth(**changes)
        assert (status, set(error)) == (401, {"type", "detail"}), changes


def test_a_nonce_works_once_right_or_wrong(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    guest.auth()
    assert guest.attest(nonce=base64.b64encode(bytes(32)).decode())[0] == 401
    status, error = guest.attest()
    assert status == 401
    assert "used before" in error["detail"]
    guest.auth()
    assert guest.attest()[0] == 200
    assert guest.attest()[0] == 401


def test_a_swapped_key_is_refused(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    guest.auth()
    other = TeeKey(ec.generate_private_key(ec.SECP256R1()))
    status, error = guest.attest(jwk=other.jwk())
    assert status == 401
    assert "freshness" in error["detail"]


def test_a_stolen_cookie_opens_nothing(kbs_guest: Guests) -> None:
    guest, thief = kbs_guest(), kbs_guest()
    guest.auth()
    thief.client.cookies, thief.nonce = guest.client.cookies, guest.nonce
    guest.attest()
    status, jwe, _ = thief.resource(OPEN_KEY)
    assert status == 200
    with pytest.raises(InvalidUnwrap):
        thief.key.open(jwe)
    assert thief.attest()[0] == 401  # and the session cannot be attested anew to the thief's key
    fresh = kbs_guest()
    status, error, _ = fresh.resource(OPEN_KEY)
    assert (status, set(error)) == (401, {"type", "detail"})
    fresh.client.cookies = {"kbs-session-id": "0" * 32}
    assert fresh.resource(OPEN_KEY)[0] == 401


def test_forged_and_foreign_tokens_are_refused(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    guest.auth()
    token = guest.attest()[1]["token"]
    head, payload, signature = token.split(".")
    for bad in (f"{head}.{payload}.{'A' * len(signature)}", f"{b64url(b'{}')}.{payload}.", "x", token + "x"):
        assert guest.resource(OPEN_KEY, token=bad)[0] == 401
    status, _, _ = guest.client.call("GET", f"/resource/{OPEN_KEY}", headers={"Authorization": "Basic eA=="})
    assert status == 401


def test_debug_unknown_init_data_and_further_devices_are_refused(kbs_guest: Guests) -> None:
    debugged = kbs_guest(policy=0xB0000)
    debugged.auth()
    assert "policy-debug" in debugged.attest()[1]["detail"]
    bare = kbs_guest()
    bare.init_data = None
    bare.auth()
    assert "without init-data" in bare.attest()[1]["detail"]
    more = kbs_guest()
    more.auth()
    assert "further devices" in more.attest(more='{"nvidia":{}}')[1]["detail"]


@pytest.mark.parametrize(
    "jwk",
    [
        {"kty": "RSA", "alg": "RSA1_5", "n": "AQAB", "e": "AQAB"},
        {"kty": "EC", "crv": "P-384", "alg": "ECDH-ES+A256KW", "x": "", "y": ""},
        {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": b64url(bytes(32)), "y": b64url(bytes(32))},
        {"kty": "AKP", "alg": "ML-KEM-768+A192KW", "pub": ""},
        {},
    ],
)
def test_other_keys_are_refused(kbs_guest: Guests, jwk: dict[str, str]) -> None:
    guest = kbs_guest()
    guest.auth()
    status, error = guest.attest(jwk=jwk)
    assert (status, set(error)) == (401, {"type", "detail"})


def test_init_data_of_confidential_containers_may_carry_ours(kbs_guest: Guests, world: Any) -> None:
    ours = world.init_data["site/north"].decode()
    whole = f"version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"sealwright.toml\" = '''\n{ours}'''\n"
    digest = hashlib.sha256(whole.encode()).hexdigest()
    enrolment = world.charter().enrolment("site", "north")
    assert isinstance(enrolment, Enrolment)
    changed = enrolment.model_copy(update={"init_data_sha256": digest})
    world.change(Changes(put=files_of([changed])))
    try:
        guest = kbs_guest(host_data=bytes.fromhex(digest))
        guest.init_data = whole
        guest.auth()
        status, answer = guest.attest()
        assert status == 200, answer
        assert guest.key.open(guest.resource(OPEN_KEY)[1]) == b"opened to the KBS protocol"
    finally:
        world.change(Changes(put=files_of([enrolment])))


def test_malformed_bodies_have_the_protocols_error(kbs_guest: Guests) -> None:
    guest = kbs_guest()
    for body in ([], {}, {"version": 1}, "x", {"version": "0.4.0", "tee": "x" * 20_000}):
        status, error, _ = guest.client.call("POST", "/auth", body)
        assert (status, set(error)) == (401, {"type", "detail"})
    status, error, _ = guest.client.call("POST", "/attest", {"runtime-data": os.urandom(4).hex()})
    assert (status, set(error)) == (401, {"type", "detail"})
    status, error, _ = guest.client.call("GET", "/nothing")
    assert (status, set(error)) == (404, {"type", "detail"})
    status, error, _ = guest.client.call("POST", "/resource/a/b/c", {})
    assert (status, set(error)) == (401, {"type", "detail"})


def test_its_tls_certificate_is_the_brokers(broker: Any) -> None:
    host, port = broker.entry.url.removeprefix("https://").split(":")
    pem = ssl.get_server_certificate((host, int(port)))
    x509.load_pem_x509_certificate(pem.encode()).verify_directly_issued_by(
        x509.load_pem_x509_certificate(broker.entry.issuer_certificate.encode())
    )


def test_the_ledger_of_all_this_holds(broker: Any, world: Any, audited: Any) -> None:
    assert audited(broker, world).problems == ()
