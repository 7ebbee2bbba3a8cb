"""The form of a document: strict, frozen, canonical; and the kinds of text that its fields hold.

Every document is a frozen Pydantic model that refuses unknown fields and values of another type. In the charter each
is one JSON file in canonical form (RFC 8785, JCS): `parse_document` refuses bytes that are not the canonical form of
what they say, so that one document has one digest. Times are UTC in whole seconds, `2026-01-31T12:00:00Z`.
"""

from __future__ import annotations

import json
import tomllib
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlsplit

import rfc8785
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    StringConstraints,
    ValidationError,
)

from policies.errors import MalformedDocument
from policies.keys import load_public_pem

DOCUMENT_LIMIT: Final = 1024 * 1024
"""Bytes of any one document."""
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
RESOURCE_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62}){2}$"


def format_time(moment: datetime) -> str:
    """Return `moment` as RFC 3339 in UTC with `Z`, whole seconds (a fraction is cut off)."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone: write it in UTC with a Z")
    if moment.microsecond:
        raise ValueError("a time is in whole seconds")
    return moment.astimezone(UTC)


def _one_line(text: str) -> str:
    if any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in text):
        raise ValueError("one line of text, without control characters")
    return text


def _public_key(text: str) -> str:
    load_public_pem(text)
    return text


def _certificate(text: str) -> str:
    load_certificate(text)
    return text


def _https_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("an https URL of a host, without user, query or fragment")
    if parts.port == 0:
        raise ValueError("port 0 is no address")
    return text


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Resource = Annotated[str, StringConstraints(pattern=RESOURCE_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Measurement = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
ChipId = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16}|[0-9a-f]{128})$")]
"""64 bytes (Milan, Genoa) or 8 bytes (Turin), as hex."""
Jurisdiction = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}(-[A-Z0-9]{1,3})?$")]
"""A country (ISO 3166-1 alpha-2) or a part of one (ISO 3166-2): `DE`, `US-CA`."""
TrustDomain = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$")
]
Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$")]
"""`host:port`; an IPv6 host in brackets."""
Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(_one_line)]
PublicKey = Annotated[str, StringConstraints(max_length=512), AfterValidator(_public_key)]
"""Ed25519, PEM."""
CertificatePem = Annotated[str, StringConstraints(max_length=16384), AfterValidator(_certificate)]
Url = Annotated[str, StringConstraints(max_length=512), AfterValidator(_https_url)]
Instant = Annotated[
    datetime, AfterValidator(_whole_utc), PlainSerializer(format_time, return_type=str, when_used="json")
]


def load_certificate(text: str) -> x509.Certificate:
    """Return the one certificate in the PEM `text`. Raises ValueError for anything else, or PEM in another form."""
    certificate = x509.load_pem_x509_certificate(text.encode("ascii"))
    try:
        certificate.public_key()
    except UnsupportedAlgorithm as error:  # what it is asked later, it would raise in the middle
        raise ValueError(f"its key cannot be used: {error}") from error
    if certificate.public_bytes(Encoding.PEM).decode("ascii") != text:
        raise ValueError("PEM in another form than its own (several certificates, comments or trailing bytes)")
    return certificate


class Document(BaseModel):
    """A document of the charter: frozen, strict, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical members: what differs from its default, so that a field that a later version adds (with
        a default that means what its absence meant) changes no document that was signed before it."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_bytes(self) -> bytes:
        """Return the canonical JSON (RFC 8785) of this document: what is stored, hashed and signed."""
        return rfc8785.dumps(self.to_json())


D = TypeVar("D", bound=Document)


def complaints(error: ValidationError) -> list[str]:
    """Return Pydantic's complaints, ten at most, without the values (they may be secret, and long)."""
    parts = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:10]:
        place = ".".join(str(step) for step in item["loc"])
        parts.append(f"{place}: {item['msg']}" if place else item["msg"])
    return parts


def parse_document(kind: type[D], raw: bytes, where: str) -> D:
    """Return the document of `kind` in `raw`.

    Raises MalformedDocument if `raw` is larger than DOCUMENT_LIMIT, is no such document, or is not the canonical form
    of it (which also refuses duplicate members, trailing bytes and spelt-out defaults).
    """
    do = "Write it with Sealwright's own commands; do not edit it by hand."
    if len(raw) > DOCUMENT_LIMIT:
        raise MalformedDocument(f"the document is larger than {DOCUMENT_LIMIT} bytes", where=where, do=do)
    try:
        document = kind.model_validate_json(raw)
    except ValidationError as error:
        raise MalformedDocument(
            f"not a valid {kind.__name__}: {'; '.join(complaints(error))}", where=where, do=do
        ) from error
    if document.to_bytes() != raw:
        raise MalformedDocument(f"this {kind.__name__} is not in canonical form (RFC 8785)", where=where, do=do)
    return document


def parse_toml(kind: type[D], raw: bytes, where: str, limit: int = DOCUMENT_LIMIT) -> D:
    """Return the document of `kind` that a person wrote as TOML. Raises MalformedDocument, saying what is wrong."""
    do = "Correct the file; docs/reference/charter.md lists its fields."
    if len(raw) > limit:
        raise MalformedDocument(f"the file is larger than {limit} bytes", where=where, do=do)
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedDocument(f"not valid TOML: {error}", where=where, do=do) from error
    return from_table(kind, table, where)


def from_table(kind: type[D], table: dict[str, Any], where: str) -> D:
    """Return the document of `kind` with the members of `table` (as tomllib gives them). Raises MalformedDocument."""
    do = "Correct the file; docs/reference/charter.md lists its fields."
    try:  # by way of JSON, where a list may fill a tuple and a text a time, as in the charter's own files
        return kind.model_validate_json(json.dumps(table, default=_toml_time))
    except (ValidationError, TypeError, ValueError) as error:
        words = "; ".join(complaints(error)) if isinstance(error, ValidationError) else str(error)
        raise MalformedDocument(f"not a valid {kind.__name__}: {words}", where=where, do=do) from error


def _toml_time(value: object) -> str:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return format_time(value)
    raise ValueError("a time needs its date and its zone")


def must_be_unique(values: tuple[str, ...], what: str) -> None:
    """Raise ValueError if one of `values` is there twice; `what` says what they are."""
    doubles = sorted({value for value in values if values.count(value) > 1})
    if doubles:
        raise ValueError(f"{what} named twice: {', '.join(doubles)}")
