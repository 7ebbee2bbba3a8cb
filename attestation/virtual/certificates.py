"""Certificates in the exact shape of AMD's, for roots of our own.

AMD's chain breaks rules that certificate libraries insist on (serial number zero, extensions without criticality, no
key identifiers on the leaf), so the structure is put together field by field with asn1crypto and signed by hand.
Profile: AMD publication 57230 (VCEK certificate and KDS interface specification), sections 3 and 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from asn1crypto import algos, core, crl, keys, x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ORGANIZATION = "Sealwright Virtual Platform"

_SALT = 48
_Extension = tuple[str, bool, bytes]


def distinguished_name(common_name: str) -> x509.Name:
    """Return the name with this common name; everything else in it says `Virtual`, in the order that AMD uses."""
    parts = (("organizational_unit_name", "Virtual"), ("organization_name", ORGANIZATION), ("common_name", common_name))
    return x509.Name(
        "",
        x509.RDNSequence(
            [
                x509.RelativeDistinguishedName(
                    [
                        x509.NameTypeAndValue(
                            {"type": kind, "value": x509.DirectoryString("utf8_string", core.UTF8String(value))}
                        )
                    ]
                )
                for kind, value in parts
            ]
        ),
    )


def issue_certificate(
    *,
    subject: str,
    issuer: str,
    serial: int,
    valid_from: datetime,
    years: int,
    public_key: bytes,
    extensions: Iterable[_Extension],
    issuer_key: rsa.RSAPrivateKey,
) -> bytes:
    """Return the DER certificate for `public_key` (SPKI DER), signed RSASSA-PSS with SHA-384 and a salt of 48 bytes.

    `subject` and `issuer` are common names; an extension is its OID, whether it is critical, and its content.
    """
    body = x509.TbsCertificate(
        {
            "version": "v3",
            "serial_number": serial,
            "signature": _signature_algorithm(),
            "issuer": distinguished_name(issuer),
            "validity": {"not_before": _time(valid_from), "not_after": _time(_years_later(valid_from, years))},
            "subject": distinguished_name(subject),
            "subject_public_key_info": keys.PublicKeyInfo.load(public_key),
            "extensions": [
                {"extn_id": oid, "critical": critical, "extn_value": core.ParsableOctetString(content)}
                for oid, critical, content in extensions
            ],
        }
    )
    certificate = x509.Certificate(
        {
            "tbs_certificate": body,
            "signature_algorithm": _signature_algorithm(),
            "signature_value": core.OctetBitString(_sign(issuer_key, body.dump())),
        }
    )
    encoded: bytes = certificate.dump()
    return encoded


def issue_revocation_list(
    *,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    issuer_public_key: bytes,
    serials: Sequence[int],
    at: datetime,
    years: int,
) -> bytes:
    """Return the DER revocation list of an ARK over the `serials` of its intermediates, valid for `years` from `at`."""
    body = crl.TbsCertList(
        {
            "version": "v2",
            "signature": _signature_algorithm(),
            "issuer": distinguished_name(issuer),
            "this_update": _time(at),
            "next_update": _time(_years_later(at, years)),
            "crl_extensions": [
                {
                    "extn_id": "authority_key_identifier",
                    "extn_value": core.ParsableOctetString(
                        x509.AuthorityKeyIdentifier({"key_identifier": key_identifier(issuer_public_key)}).dump()
                    ),
                },
                {
                    "extn_id": "crl_number",
                    "extn_value": core.ParsableOctetString(core.Integer(1 + len(serials)).dump()),
                },
            ],
        }
    )
    if serials:
        body["revoked_certificates"] = [
            {"user_certificate": serial, "revocation_date": _time(at)} for serial in serials
        ]
    signed = crl.CertificateList(
        {
            "tbs_cert_list": body,
            "signature_algorithm": _signature_algorithm(),
            "signature": core.OctetBitString(_sign(issuer_key, body.dump())),
        }
    )
    encoded: bytes = signed.dump()
    return encoded


def authority_extensions(public_key: bytes, issuer_public_key: bytes | None) -> tuple[_Extension, ...]:
    """Return the extensions of an ARK (no `issuer_public_key`) or of an ASK, in AMD's order."""
    subject_identifier = ("2.5.29.14", False, core.OctetString(key_identifier(public_key)).dump())
    if issuer_public_key is None:
        usage = x509.KeyUsage({"key_cert_sign", "crl_sign"}).dump()
        constraints = x509.BasicConstraints({"ca": True}).dump()
        return (("2.5.29.15", True, usage), subject_identifier, ("2.5.29.19", True, constraints))
    authority = x509.AuthorityKeyIdentifier({"key_identifier": key_identifier(issuer_public_key)}).dump()
    usage = x509.KeyUsage({"key_cert_sign"}).dump()
    constraints = x509.BasicConstraints({"ca": True, "path_len_constraint": 0}).dump()
    return (
        subject_identifier,
        ("2.5.29.35", False, authority),
        ("2.5.29.19", True, constraints),
        ("2.5.29.15", True, usage),
    )


def key_identifier(public_key: bytes) -> bytes:
    """Return the 20-byte identifier of an SPKI (RFC 5280, section 4.2.1.2, method 1): a name, no protection."""
    content: bytes = bytes(keys.PublicKeyInfo.load(public_key)["public_key"])
    return hashlib.sha1(content, usedforsecurity=False).digest()


def _signature_algorithm() -> algos.SignedDigestAlgorithm:
    digest = {"algorithm": "sha384", "parameters": core.Null()}
    return algos.SignedDigestAlgorithm(
        {
            "algorithm": "rsassa_pss",
            "parameters": algos.RSASSAPSSParams(
                {
                    "hash_algorithm": digest,
                    "mask_gen_algorithm": {"algorithm": "mgf1", "parameters": digest},
                    "salt_length": _SALT,
                }
            ),
        }
    )


def _sign(key: rsa.RSAPrivateKey, data: bytes) -> bytes:
    return key.sign(data, padding.PSS(padding.MGF1(hashes.SHA384()), _SALT), hashes.SHA384())


def _time(moment: datetime) -> x509.Time:
    """Return the moment as RFC 5280 wants it: UTCTime through 2049, GeneralizedTime from 2050 on."""
    whole = moment.astimezone(UTC).replace(microsecond=0)
    return x509.Time("utc_time", whole) if whole.year < 2050 else x509.Time("general_time", whole)


def _years_later(moment: datetime, years: int) -> datetime:
    """Return the same day `years` later (29 February becomes the 28th)."""
    try:
        return moment.replace(year=moment.year + years)
    except ValueError:
        return moment.replace(year=moment.year + years, day=28)
