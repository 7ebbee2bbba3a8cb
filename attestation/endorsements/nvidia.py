"""NVIDIA's certificates: a device's chain to its root, a reference manifest's signer to its own root.

Both roots are pinned by key. Every certificate is on P-384 and signed by ECDSA with SHA-384; the shapes are so narrow
that they are demanded exactly. What does not depend on time is proved here, every broken rule listed; dates are left
for the verifier, which is told the time. A device's chain has five certificates: root, identity CA, provisioner, the
boot ROM's own CA, and the leaf whose key signs reports; the leaf's DICE extension (TCG OID 2.23.133.5.4.1) states the
boot ROM's key and the digest of the firmware that got the leaf's key (FWID).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TypeVar, cast

from asn1crypto import core, keys
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID
from lxml import etree

from attestation.endorsements.certificates import load_positive_certificate, spki_sha256, split_pem
from attestation.endorsements.failure import Failure
from attestation.errors import MalformedEndorsement
from attestation.evidence.gpu.opaque import PDI_SIZE
from attestation.evidence.gpu.rim import (
    Rim,
    parse_rim_tree,
    read_manifest,
    signature_certificates,
    with_names_of_its_own,
)

NVIDIA_DEVICE_ROOT = "a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4"
"""SHA-256 of the key (SPKI) of "NVIDIA Device Identity CA"."""

NVIDIA_RIM_ROOT = "dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3"
"""SHA-256 of the key (SPKI) of "NVIDIA CoRIM signing Root CA"."""

DEVICE_CHAIN_LENGTH = 5
MAX_CHAIN_SIZE = 64 << 10

DICE_COMPOSITE_DEVICE_ID = x509.ObjectIdentifier("2.23.133.5.4.1")
DMTF_DEVICE_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")

_E = TypeVar("_E", bound=x509.ExtensionType)
_P384_SIGNED = SignatureAlgorithmOID.ECDSA_WITH_SHA384
_DEVICE_INFO = re.compile(r"NVIDIA:([A-Z0-9_]{2,16}):([0-9A-F]{16})")
_LEAF_NAME = re.compile(r"([A-Z0-9_]{2,16}) [A-Z][0-9]{2} (?:GSP|FSP) FMC LF")


class _Fwid(core.Sequence):  # type: ignore[misc]  # asn1crypto has no type information
    _fields = [("hash_algorithm", core.ObjectIdentifier), ("digest", core.OctetString)]  # noqa: RUF012


class _CompositeDeviceId(core.Sequence):  # type: ignore[misc]  # asn1crypto has no type information
    _fields = [("version", core.Integer), ("device_id", keys.PublicKeyInfo), ("fwid", _Fwid)]  # noqa: RUF012


@dataclass(frozen=True, slots=True)
class DeviceChain:
    """What was proved of a device's certificates, whatever the time. Of worth only without failures.

    Attributes:
        certificates: As they were given, leaf first.
        key: The key that signs reports, None if there is no such leaf.
        model: The chip, for example `GH100` or `LS_10`.
        ueid: The device's unique id: 16 hex digits of its device information.
        serial: The leaf's serial number in hex, which NVIDIA's tools call the ueid.
        fwid: SHA-384 of the first mutable firmware, as the boot ROM saw it.
        pdi: The device's public identifier (8 bytes), by which switches and GPUs name each other.
        failures: Every rule that is broken.
    """

    certificates: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePublicKey | None
    model: str | None
    ueid: str | None
    serial: str | None
    fwid: bytes | None
    pdi: bytes | None
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class VerifiedRim:
    """A reference manifest after its signature was checked. Of worth only without failures.

    Attributes:
        rim: What the signature covers (what the file states, where the signature is bad).
        certificates: The signer's chain, leaf first.
        failures: Every rule that is broken.
    """

    rim: Rim
    certificates: tuple[x509.Certificate, ...]
    failures: tuple[Failure, ...]


@lru_cache(maxsize=64)
def resolve_device_chain(pem: bytes, roots: tuple[str, ...] = (NVIDIA_DEVICE_ROOT,)) -> DeviceChain:
    """Prove a device's chain (PEM, leaf first, root last) up to one of `roots`, or list every reason why not.

    Raises:
        MalformedEndorsement: no certificates, too many, or some that cannot be read.
    """
    if len(pem) > MAX_CHAIN_SIZE or not pem.lstrip().startswith(b"-----BEGIN"):
        raise MalformedEndorsement(
            "this is no certificate chain in PEM", where="GPU certificate chain", do="Give the chain, leaf first."
        )
    certificates = tuple(load_positive_certificate(block) for block in split_pem(pem, "CERTIFICATE"))
    failures: list[Failure] = []
    if len(certificates) != DEVICE_CHAIN_LENGTH:
        failures.append(
            Failure("gpu-chain-length", f"{len(certificates)} certificates", f"{DEVICE_CHAIN_LENGTH}, leaf to root")
        )
    failures += _walk(certificates, roots, "gpu")
    leaf, issuer = certificates[0], certificates[1] if len(certificates) > 1 else None
    model, ueid = _device_info(leaf, failures)
    fwid = _fwid(leaf, issuer, failures)
    return DeviceChain(
        certificates=certificates,
        key=p384_key(leaf),
        model=model,
        ueid=ueid,
        serial=f"{leaf.serial_number:x}",
        fwid=fwid,
        pdi=None if issuer is None else _pdi(issuer),
        failures=tuple(failures),
    )


def _walk(certificates: tuple[x509.Certificate, ...], roots: tuple[str, ...], prefix: str) -> list[Failure]:
    """Leaf to root: each signed by the next, the last by itself and pinned, all of the one shape."""
    failures: list[Failure] = []
    for position, certificate in enumerate(certificates):
        issuer = certificates[min(position + 1, len(certificates) - 1)]
        if certificate.issuer != issuer.subject or not signed_by(certificate, issuer):
            failures.append(
                Failure(
                    f"{prefix}-chain-signatures",
                    f"{name_of(certificate)} is not signed by {name_of(issuer)}, which follows it",
                    f"signed by {_printable(certificate.issuer.rfc4514_string())}",
                )
            )
        wrong = _leaf_shape(certificate) if position == 0 else _ca_shape(certificate, position - 1)
        failures += [
            Failure(f"{prefix}-chain-profile", f"{name_of(certificate)}: {value}", want) for value, want in wrong
        ]
    if _spki(certificates[-1]) not in roots:
        value = f"{name_of(certificates[-1])}, key {_spki(certificates[-1])}"
        failures.append(Failure(f"{prefix}-trusted-root", value, "one of the profile's roots"))
    return failures


def _leaf_shape(certificate: x509.Certificate) -> list[tuple[str, str]]:
    wrong = _any_shape(certificate)
    extensions = _extensions(certificate)
    if extensions is None:
        return [*wrong, ("unreadable extensions", "extensions that can be read, each once")]
    constraints = _find(extensions, x509.BasicConstraints)
    usage = _find(extensions, x509.KeyUsage)
    if constraints is not None and constraints.value.ca:
        wrong.append(("it is a CA", "an end entity, whose key signs no certificates"))
    if usage is None or not usage.critical or not usage.value.digital_signature or usage.value.key_cert_sign:
        wrong.append(("another key usage", "critical key usage: digitalSignature, no keyCertSign"))
    return wrong


def _ca_shape(certificate: x509.Certificate, below: int) -> list[tuple[str, str]]:
    wrong = _any_shape(certificate)
    extensions = _extensions(certificate)
    if extensions is None:
        return [*wrong, ("unreadable extensions", "extensions that can be read, each once")]
    constraints = _find(extensions, x509.BasicConstraints)
    usage = _find(extensions, x509.KeyUsage)
    if constraints is None or not constraints.critical or not constraints.value.ca:
        wrong.append(("no CA", "critical basic constraints with CA true"))
    elif constraints.value.path_length is not None and constraints.value.path_length < below:
        wrong.append((f"path length {constraints.value.path_length}", f"at least {below}"))
    if usage is None or not usage.critical or not usage.value.key_cert_sign:
        wrong.append(("may not sign certificates", "critical key usage with keyCertSign"))
    return wrong


def _any_shape(certificate: x509.Certificate) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    if certificate.version is not x509.Version.v3:
        wrong.append((f"X.509 {certificate.version.name}", "X.509 v3"))
    if p384_key(certificate) is None:
        wrong.append(("another kind of key", "an EC key on P-384"))
    unknown = {one.oid for one in _extensions(certificate) or () if one.critical} - {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
    }
    if unknown:
        wrong.append(("unknown critical extensions", "basic constraints and key usage alone"))
    return wrong


def _device_info(leaf: x509.Certificate, failures: list[Failure]) -> tuple[str | None, str | None]:
    """Chip and unique id from the DMTF device information, which must agree with the leaf's name."""
    extension = _find(_extensions(leaf) or (), x509.SubjectAlternativeName)
    names = [] if extension is None else [one for one in extension.value if isinstance(one, x509.OtherName)]
    said = [one.value for one in names if one.type_id == DMTF_DEVICE_INFO]
    match = None
    if len(said) == 1 and len(said[0]) < 64 and said[0][:2] == bytes([0x0C, len(said[0]) - 2]):
        match = _DEVICE_INFO.fullmatch(said[0][2:].decode("ascii", "replace"))
    named = _LEAF_NAME.fullmatch(_common_name(leaf.subject))
    if match is None or named is None or match.group(1) != named.group(1):
        failures.append(
            Failure(
                "gpu-device-identity",
                f"name {_common_name(leaf.subject)!r}, device information {match.group(0) if match else None!r}",
                "the same chip in both, in NVIDIA's form",
            )
        )
        return None, None
    return match.group(1), match.group(2).lower()


def _fwid(leaf: x509.Certificate, issuer: x509.Certificate | None, failures: list[Failure]) -> bytes | None:
    """The firmware digest in the leaf's DICE extension, which must name the boot ROM that signed the leaf."""
    raw = next((one.value.value for one in _extensions(leaf) or () if one.oid == DICE_COMPOSITE_DEVICE_ID), None)
    expected = "a DICE extension with the issuer's key and a SHA-384 digest"
    if raw is None:
        failures.append(Failure("gpu-device-identity", "the leaf has no DICE extension", expected))
        return None
    try:
        identity = _CompositeDeviceId.load(raw, strict=True)
        version, key, algorithm, digest = (
            identity["version"].native,
            identity["device_id"].dump(),
            identity["fwid"]["hash_algorithm"].dotted,
            bytes(identity["fwid"]["digest"].native),
        )
    except (ValueError, TypeError, KeyError) as error:
        failures.append(Failure("gpu-device-identity", f"the DICE extension cannot be read: {error}"[:200], expected))
        return None
    issuer_key = None if issuer is None else _spki_der(issuer)
    if version != 1 or algorithm != "2.16.840.1.101.3.4.2.2" or len(digest) != 48 or key != issuer_key:
        failures.append(Failure("gpu-device-identity", "the DICE extension names another device or digest", expected))
        return None
    return digest


def _pdi(issuer: x509.Certificate) -> bytes | None:
    serials = issuer.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    if len(serials) != 1 or re.fullmatch(r"[0-9A-Fa-f]{18}", str(serials[0].value)) is None:
        return None
    return bytes.fromhex(str(serials[0].value))[-PDI_SIZE:]


@lru_cache(maxsize=32)
@with_names_of_its_own
def verify_rim(raw: bytes, roots: tuple[str, ...] = (NVIDIA_RIM_ROOT,)) -> VerifiedRim:
    """Check a manifest's XML signature and its signer's chain up to one of `roots`; list every reason why not.

    Raises:
        MalformedEndorsement: the manifest, or a certificate in it, cannot be read.
    """
    # signxml takes a tenth of a second to import, which a verification without manifests need not pay.
    from signxml.algorithms import DigestAlgorithm, SignatureMethod
    from signxml.exceptions import SignXMLException
    from signxml.verifier import SignatureConfiguration, XMLVerifier

    root = parse_rim_tree(raw)
    encoded = signature_certificates(root)
    rim = read_manifest(root, encoded)
    certificates = tuple(load_positive_certificate(der) for der in encoded)
    failures = _walk(certificates, roots, "rim")
    signer = certificates[0]
    # Dates are the verifier's: here the signature is checked as of a moment at which its certificate was valid.
    moment = max(signer.not_valid_before_utc, signer.not_valid_after_utc - timedelta(seconds=1))
    config = SignatureConfiguration(
        location="./",
        expect_references=1,
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
        verification_time=moment,
    )
    try:
        result = XMLVerifier().verify(root, x509_cert=signer, expect_config=config)
        if isinstance(result, list):
            raise ValueError("more than one reference")
        signed = read_manifest(result.signed_xml, encoded)
    except (SignXMLException, InvalidSignature, UnsupportedAlgorithm, ValueError, etree.LxmlError) as error:
        failures.append(
            Failure("rim-signature", f"{str(error)[:120] or 'it does not verify'}", "an XML signature that verifies")
        )
        return VerifiedRim(rim, certificates, tuple(failures))
    return VerifiedRim(signed, certificates, tuple(failures))


def outside_validity(certificates: tuple[x509.Certificate, ...], at: datetime) -> tuple[str, ...]:
    """Those of the certificates that are not valid at `at`, each with its period, in words."""
    return tuple(
        f"{name_of(one)} from {one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}"
        for one in certificates
        if not one.not_valid_before_utc <= at <= one.not_valid_after_utc
    )


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's P-384 key made the certificate's signature, ECDSA with SHA-384."""
    return certificate.signature_algorithm_oid == _P384_SIGNED and verifies(
        issuer, certificate.signature, certificate.tbs_certificate_bytes
    )


def verifies(issuer: x509.Certificate, signature: bytes, signed: bytes) -> bool:
    """Whether this is an ECDSA signature (DER) with SHA-384 by the certificate's P-384 key."""
    key = p384_key(issuer)
    if key is None:
        return False
    try:
        key.verify(signature, signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def p384_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    """The certificate's key, if it is one on P-384."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1) else None


def name_of(certificate: x509.Certificate) -> str:
    """The common name of the subject, or all of its name, for people: printable and at most 100 characters."""
    return _printable(_common_name(certificate.subject) or certificate.subject.rfc4514_string())


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])


def _common_name(name: x509.Name) -> str:
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _extensions(certificate: x509.Certificate) -> x509.Extensions | None:
    try:
        return certificate.extensions
    except (ValueError, x509.DuplicateExtension, UnsupportedAlgorithm):
        return None


def _find(extensions: x509.Extensions | tuple[()], kind: type[_E]) -> x509.Extension[_E] | None:
    return next((cast("x509.Extension[_E]", one) for one in extensions if isinstance(one.value, kind)), None)


def _spki(certificate: x509.Certificate) -> str:
    try:
        return spki_sha256(certificate)
    except MalformedEndorsement:
        return "unreadable key"


def _spki_der(certificate: x509.Certificate) -> bytes | None:
    key = p384_key(certificate)
    return None if key is None else key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
