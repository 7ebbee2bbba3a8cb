"""A GPU vendor of the tests' own: roots, device chains, signed reports, manifests, OCSP responses, service tokens.

Everything has the real form, so that a validly signed piece of evidence can break any one rule; only the roots differ,
which the profile must name.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from attestation.endorsements.certificates import spki_sha256
from attestation.endorsements.nvidia import DICE_COMPOSITE_DEVICE_ID, DMTF_DEVICE_INFO
from attestation.evidence.gpu.document import GpuEvidence
from attestation.evidence.gpu.opaque import FieldType, OpaqueField
from attestation.evidence.gpu.spdm import GpuReport, MeasurementBlock, encode_gpu_report, parse_gpu_report
from attestation.verifier.gpu.profile import GpuProfile

AT = datetime(2026, 6, 1, tzinfo=UTC)
NONCE = bytes(range(32))
FWID = hashlib.sha384(b"firmware").digest()
DRIVER, VBIOS = "600.10.02", "97.00.A1.00.03"
_SINCE, _UNTIL = datetime(2020, 1, 1, tzinfo=UTC), datetime(2046, 1, 1, tzinfo=UTC)

Key = ec.EllipticCurvePrivateKey


@cache
def key(name: str) -> Key:
    """A key by its name, the same throughout a run."""
    assert name
    return ec.generate_private_key(ec.SECP384R1())


@dataclass
class CertificateRules:
    """How a certificate is made; each field can be made wrong."""

    ca: bool = True
    path_length: int | None = None
    sign: bool = True
    since: datetime = _SINCE
    until: datetime = _UNTIL
    extensions: list[tuple[x509.ExtensionType, bool]] = field(default_factory=list)


def name(common: str, serial: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.SERIAL_NUMBER, serial)] if serial else []
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "NVIDIA Corporation")
    return x509.Name([*parts, organization, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def certify(
    subject: x509.Name, subject_key: Any, issuer: x509.Name, issuer_key: Key, rules: CertificateRules | None = None
) -> x509.Certificate:
    rules = rules or CertificateRules()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(subject_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(rules.since)
        .not_valid_after(rules.until)
    )
    if rules.ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=rules.path_length), critical=True)
    usage = x509.KeyUsage(not rules.sign, False, False, False, False, rules.sign, rules.sign, False, False)
    builder = builder.add_extension(usage, critical=True)
    for extension, critical in rules.extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, SHA384())


class _Fwid(core.Sequence):  # type: ignore[misc]  # asn1crypto has no type information
    _fields = [("hash_algorithm", core.ObjectIdentifier), ("digest", core.OctetString)]  # noqa: RUF012


def dice(issuer_key: Key, fwid: bytes) -> x509.UnrecognizedExtension:
    spki = issuer_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    inner = core.Integer(1).dump() + spki + _Fwid({"hash_algorithm": "2.16.840.1.101.3.4.2.2", "digest": fwid}).dump()
    length = len(inner)
    header = bytes([0x30, 0x81, length]) if length < 256 else bytes([0x30, 0x82]) + length.to_bytes(2, "big")
    return x509.UnrecognizedExtension(DICE_COMPOSITE_DEVICE_ID, header + inner)


def device_info(model: str, ueid: str) -> x509.SubjectAlternativeName:
    text = f"NVIDIA:{model}:{ueid.upper()}".encode()
    return x509.SubjectAlternativeName([x509.OtherName(DMTF_DEVICE_INFO, bytes([0x0C, len(text)]) + text)])


@dataclass(frozen=True)
class Device:
    """One device of the tests' vendor: its chain, leaf first, and its keys' names."""

    model: str
    ueid: str
    pdi: bytes
    chain: tuple[x509.Certificate, ...]
    leaf_key: str

    @property
    def pem(self) -> bytes:
        return b"".join(one.public_bytes(Encoding.PEM) for one in self.chain)

    @property
    def switch(self) -> bool:
        return self.model.startswith("LS")


def make_device(
    model: str = "GH100",
    number: int = 0,
    *,
    fwid: bytes = FWID,
    leaf: CertificateRules | None = None,
    provisioner: CertificateRules | None = None,
    info: str | None = None,
    dice_key: str | None = None,
) -> Device:
    """A device and its chain; the keywords break one rule each."""
    responder = "FSP" if model.startswith("LS") else "GSP"
    pdi = hashlib.sha256(f"{model}{number}".encode()).digest()[:8]
    ueid = hashlib.sha256(f"ueid{model}{number}".encode()).digest()[:8].hex()
    root, identity = name("NVIDIA Device Identity CA"), name(f"NVIDIA {model} Identity")
    ica, rom = (
        name(f"NVIDIA {model} Provisioner ICA 1"),
        name(f"{model} A01 {responder} BROM", "41" + pdi.hex().upper()),
    )
    leaf_key = f"leaf {model} {number}"
    rom_key = key(f"rom {model} {number}")
    rules = leaf or CertificateRules(ca=False, sign=False)
    rules.extensions += [
        (device_info(info or model, ueid), False),
        (dice(key(dice_key) if dice_key else rom_key, fwid), False),
    ]
    subject = name(f"{model} A01 {responder} FMC LF", ueid.upper())
    chain = (
        certify(subject, key(leaf_key).public_key(), rom, rom_key, rules),
        certify(rom, rom_key.public_key(), ica, key("ica")),
        certify(ica, key("ica").public_key(), identity, key("identity"), provisioner),
        certify(identity, key("identity").public_key(), root, key("device root")),
        _root("device root", root),
    )
    return Device(model, ueid, pdi, chain, leaf_key)


@cache
def _root(key_name: str, subject: x509.Name) -> x509.Certificate:
    return certify(subject, key(key_name).public_key(), subject, key(key_name))


def digest(text: str) -> bytes:
    return hashlib.sha384(text.encode()).digest()


def measurements(count: int = 64) -> tuple[MeasurementBlock, ...]:
    """Blocks 1 to `count`; block n holds the golden value of index n - 1."""
    return tuple(MeasurementBlock(index + 1, 1, digest(f"m{index}")) for index in range(count))


def gpu_fields(**changes: bytes | None) -> tuple[OpaqueField, ...]:
    """A GPU's opaque fields by the names of `FieldType`; None leaves one out."""
    version = bytes.fromhex(VBIOS.replace(".", ""))
    values: dict[str, bytes | None] = {
        "VBIOS_VERSION": version[:4][::-1] + version[4:5] + bytes(3),
        "CHIP_SKU": b"890\0",
        "PROJECT": b"T100\0",
        "PROJECT_SKU": b"0001\0",
        "DRIVER_VERSION": DRIVER.encode() + b"\0",
        "NVDEC0_STATUS": b"\xaa",
        "FWID": FWID,
        "PROTECTED_PCIE_STATUS": b"\x55",
        "OPAQUE_DATA_VERSION": b"\x01\0",
        "FEATURE_FLAG": b"\0\0",
        **changes,
    }
    return tuple(OpaqueField(int(FieldType[kind]), value) for kind, value in values.items() if value is not None)


def switch_fields(device: Device, gpus: Sequence[Device], **changes: bytes | None) -> tuple[OpaqueField, ...]:
    """A switch's opaque fields."""
    linked = b"".join(one.pdi for one in gpus).ljust(64, b"\xff") + b"\xff" * 64
    values: dict[str, bytes | None] = {
        "VBIOS_VERSION": VBIOS.encode(),
        "SWITCH_PDI": device.pdi,
        "SWITCH_GPU_PDI": linked,
        "LOCK_SWITCH_STATUS": b"\x01\0",
        **changes,
    }
    return tuple(OpaqueField(int(FieldType[kind]), value) for kind, value in values.items() if value is not None)


def linked_to(switches: Sequence[Device]) -> bytes:
    """SWITCH_PDI of a GPU that is linked to these switches."""
    return b"".join(one.pdi[::-1] for one in switches)


def sign_report(
    device: Device,
    opaque: tuple[OpaqueField, ...],
    *,
    blocks: tuple[MeasurementBlock, ...] | None = None,
    nonce: bytes = NONCE,
    signing_key: str | None = None,
) -> bytes:
    """A validly signed report."""
    report = GpuReport(nonce, 0, 0, 0, blocks or measurements(), digest("device nonce")[:32], opaque, bytes(96))
    unsigned = encode_gpu_report(report)
    r, s = decode_dss_signature(key(signing_key or device.leaf_key).sign(unsigned[:-96], ec.ECDSA(SHA384())))
    signed = encode_gpu_report(replace(report, signature=r.to_bytes(48, "big") + s.to_bytes(48, "big")))
    assert parse_gpu_report(signed).raw == signed
    return signed


def evidence(device: Device, opaque: tuple[OpaqueField, ...] | None = None, **options: Any) -> GpuEvidence:
    """One device's evidence, good unless told otherwise."""
    fields = opaque if opaque is not None else gpu_fields()
    return GpuEvidence(report=sign_report(device, fields, **options), chain=device.pem)


@cache
def rim_signer(since: datetime = _SINCE, until: datetime = _UNTIL, root_key: str = "rim root") -> tuple[Any, ...]:
    """The signer's chain, leaf first."""
    root, middle = name("NVIDIA CoRIM signing Root CA"), name("NVIDIA Reference Value CA")
    issuer = name("NVIDIA Reference Value L3")
    rules = CertificateRules(ca=False, sign=False, since=since, until=until)
    return (
        certify(name("RIM Signer"), key("rim signer").public_key(), issuer, key("rim l3"), rules),
        certify(issuer, key("rim l3").public_key(), middle, key("rim ca"), CertificateRules(path_length=0)),
        certify(middle, key("rim ca").public_key(), root, key(root_key)),
        _root(root_key, root),
    )


def make_rim(
    version: str,
    golden: Mapping[int, Sequence[bytes]],
    *,
    product: str = "GH100",
    chain: tuple[Any, ...] | None = None,
) -> bytes:
    """A signed manifest in NVIDIA's form."""
    from lxml import etree
    from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod
    from signxml.signer import XMLSigner

    swid = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
    digests = "http://www.w3.org/2001/04/xmlenc#sha384"
    root = etree.Element(f"{{{swid}}}SoftwareIdentity", nsmap={None: swid, "h": digests})
    root.set("tagId", "0011")
    etree.SubElement(root, f"{{{swid}}}Entity", name="NVIDIA Corporation", role="softwareCreator tagCreator")
    etree.SubElement(root, f"{{{swid}}}Meta", colloquialVersion=version, product=product, PayloadType="direct")
    payload = etree.SubElement(root, f"{{{swid}}}Payload")
    for index in range(64):
        values = list(golden.get(index, [bytes(48)]))
        resource = etree.SubElement(payload, f"{{{swid}}}Resource", type="Measurement", index=str(index))
        resource.set("active", str(index in golden))
        resource.set("alternatives", str(len(values)))
        for number, value in enumerate(values):
            resource.set(f"{{{digests}}}Hash{number}", value.hex())
        resource.set("name", f"Measurement_{index}")
        resource.set("size", "48")
    signer = XMLSigner(
        signature_algorithm=SignatureMethod.ECDSA_SHA384,
        digest_algorithm=DigestAlgorithm.SHA384,
        c14n_algorithm=CanonicalizationMethod.CANONICAL_XML_1_1,
    )
    signed = signer.sign(root, key=key("rim signer"), cert=list(chain or rim_signer()))
    return bytes(etree.tostring(signed))


DRIVER_GOLDEN = {index: (digest(f"m{index}"),) for index in range(20, 40)}
VBIOS_GOLDEN = {index: (digest("an older one"), digest(f"m{index}")) for index in range(12)}


@cache
def driver_rim() -> bytes:
    return make_rim(DRIVER, DRIVER_GOLDEN)


@cache
def vbios_rim() -> bytes:
    return make_rim(VBIOS, VBIOS_GOLDEN)


@cache
def switch_rim() -> bytes:
    return make_rim(VBIOS, VBIOS_GOLDEN, product="LS_10")


def good_rims() -> tuple[bytes, ...]:
    return (driver_rim(), vbios_rim(), switch_rim())


@dataclass
class OcspRules:
    """How an OCSP response is made."""

    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD
    reason: x509.ReasonFlags | None = None
    since: datetime = AT - timedelta(hours=1)
    until: datetime = AT + timedelta(days=1)
    responder: str = "appointed"
    algorithm: Any = field(default_factory=SHA384)


def ocsp_response(certificate: x509.Certificate, issuer: x509.Certificate, issuer_key: str, rules: OcspRules) -> bytes:
    """What a responder says of a certificate; `responder`: issuer, appointed, unappointed or stranger."""
    revoked = rules.status is ocsp.OCSPCertStatus.REVOKED
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=certificate,
        issuer=issuer,
        algorithm=rules.algorithm,
        cert_status=rules.status,
        this_update=rules.since,
        next_update=rules.until,
        revocation_time=rules.since if revoked else None,
        revocation_reason=rules.reason,
    )
    signing_key = issuer_key
    responder = issuer
    if rules.responder != "issuer":
        signing_key = "ocsp"
        appointed_by = "stranger" if rules.responder == "stranger" else issuer_key
        usage = [] if rules.responder == "unappointed" else [ExtendedKeyUsageOID.OCSP_SIGNING]
        extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.ExtendedKeyUsage(usage), False)] if usage else []
        made = CertificateRules(ca=False, sign=False, extensions=extensions)
        responder = certify(name("OCSP"), key("ocsp").public_key(), issuer.subject, key(appointed_by), made)
        builder = builder.certificates([responder])
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, responder)
    return builder.sign(key(signing_key), SHA256()).public_bytes(Encoding.DER)


def device_ocsp(device: Device, **changes: Any) -> tuple[bytes, ...]:
    """Good responses for the three certificates between leaf and root, the changes applied to the boot ROM's."""
    keys = ("ica", "identity", "device root")
    rules = [OcspRules(**(changes if number == 0 else {})) for number in range(3)]
    return tuple(
        ocsp_response(device.chain[number + 1], device.chain[number + 2], keys[number], rules[number])
        for number in range(3)
    )


def rim_ocsp() -> tuple[bytes, ...]:
    """Good responses for the manifests' signers; the responder uses SHA-1 for its ids, as many do."""
    chain, keys = rim_signer(), ("rim l3", "rim ca", "rim root")
    rules = OcspRules(algorithm=SHA1())  # noqa: S303 (it names a certificate and protects nothing)
    return tuple(ocsp_response(chain[number], chain[number + 1], keys[number], rules) for number in range(3))


def revocation_list(
    issuer: x509.Certificate, issuer_key: str, revoked: Sequence[x509.Certificate] = (), *, made: datetime = AT
) -> bytes:
    """A list signed by this key, an hour old and for a week."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(made - timedelta(hours=1))
        .next_update(made + timedelta(days=7))
    )
    for one in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(one.serial_number).revocation_date(made).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key(issuer_key), SHA384()).public_bytes(Encoding.PEM)


def profile(**changes: Any) -> GpuProfile:
    """The strict profile over the tests' roots, with changes in TOML's form."""
    document: dict[str, Any] = {
        "device-roots": [spki_sha256(_root("device root", name("NVIDIA Device Identity CA")))],
        "rim-roots": [spki_sha256(rim_signer()[-1])],
        **changes,
    }
    return GpuProfile.model_validate(document)


def b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwk(key_name: str, kid: str) -> dict[str, str]:
    numbers = key(key_name).public_key().public_numbers()
    x, y = (b64url(value.to_bytes(48, "big")) for value in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-384", "kid": kid, "x": x, "y": y, "use": "sig", "alg": "ES384"}


def jwks() -> bytes:
    return json.dumps({"keys": [jwk("nras", "nras-1")]}).encode()


def token(claims: Mapping[str, Any], *, key_name: str = "nras", **header: Any) -> str:
    """A compact ES384 JWS."""
    head = {"alg": "ES384", "kid": "nras-1", "typ": "JWT", **header}
    signed = f"{b64url(json.dumps(head).encode())}.{b64url(json.dumps(claims).encode())}"
    r, s = decode_dss_signature(key(key_name).sign(signed.encode(), ec.ECDSA(SHA384())))
    return f"{signed}.{b64url(r.to_bytes(48, 'big') + s.to_bytes(48, 'big'))}"


def device_claims(**changes: Any) -> dict[str, Any]:
    """A device's claims as the service makes them, good unless changed."""
    chain = {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "good"}
    when = int(AT.timestamp())
    return {
        "iss": "https://nras.attestation.nvidia.com",
        "iat": when - 10,
        "nbf": when - 10,
        "exp": when + 3600,
        "eat_nonce": NONCE.hex().upper(),
        "ueid": "1234",
        "measres": "success",
        "dbgstat": "disabled",
        "secboot": True,
        "x-nvidia-gpu-attestation-report-parsed": True,
        "x-nvidia-gpu-attestation-report-nonce-match": True,
        "x-nvidia-gpu-attestation-report-signature-verified": True,
        "x-nvidia-gpu-arch-check": True,
        "x-nvidia-gpu-driver-version": DRIVER,
        "x-nvidia-gpu-attestation-report-cert-chain": chain,
        "x-nvidia-gpu-driver-rim-signature-verified": True,
        "x-nvidia-attestation-warning": None,
        **changes,
    }


def nras_bundle(
    devices: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    key_name: str = "nras",
    swap: Mapping[str, str] | None = None,
    **overall: Any,
) -> bytes:
    """A service's answer; `swap` puts other tokens in after the digests were made."""
    tokens = {
        name: token(claims, key_name=key_name) for name, claims in (devices or {"GPU-0": device_claims()}).items()
    }
    digests = {name: ["DIGEST", ["SHA-256", hashlib.sha256(one.encode()).hexdigest()]] for name, one in tokens.items()}
    base = device_claims()
    claims = {claim: base[claim] for claim in ("iss", "iat", "nbf", "exp", "eat_nonce")}
    claims |= {"x-nvidia-overall-att-result": True, "submods": digests, **overall}
    return json.dumps([["JWT", token(claims, key_name=key_name)], {**tokens, **(swap or {})}]).encode()
