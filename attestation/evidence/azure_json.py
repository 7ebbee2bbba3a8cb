"""Evidence of the CoCo attester on Azure (`az-snp-vtpm`): HCL report, TPM quote and VCEK as JSON.

Two forms are in use: without `version`, byte strings are lists of numbers and the VCEK is PEM; from version 1 on, the
HCL report and the VCEK (DER) are base64url, padded or not, and the quote's parts are hex.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.errors import MalformedEvidence
from attestation.evidence.hcl import MAX_HCL_SIZE, HclEvidence, parse_hcl_report
from attestation.evidence.tpm_quote import MAX_QUOTE_SIZE, PCR_COUNT, parse_tpm_quote

MAX_VEK_TEXT = 16 << 10

_Model = TypeVar("_Model", bound=BaseModel)

_Byte = Annotated[int, Field(ge=0, le=0xFF)]
_Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=2 * MAX_QUOTE_SIZE)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _ListQuote(_Part):
    message: Annotated[list[_Byte], Field(max_length=MAX_QUOTE_SIZE)]
    signature: Annotated[list[_Byte], Field(max_length=512)]
    pcrs: Annotated[list[Annotated[list[_Byte], Field(max_length=64)]], Field(max_length=PCR_COUNT)]


class _ListEvidence(_Part):
    report: Annotated[list[_Byte], Field(max_length=MAX_HCL_SIZE)]
    quote: _ListQuote
    vcek: Annotated[str, Field(max_length=MAX_VEK_TEXT)]


class _HexQuote(_Part):
    message: _Hex
    signature: _Hex
    pcrs: Annotated[list[_Hex], Field(max_length=PCR_COUNT)]


class _TextEvidence(_Part):
    version: Literal[1, 2]
    hcl_report: Annotated[str, Field(max_length=2 * MAX_HCL_SIZE)]
    tpm_quote: _HexQuote
    vcek: Annotated[str, Field(max_length=MAX_VEK_TEXT)]


def parse_azure_evidence(document: Mapping[str, Any]) -> HclEvidence:
    """Read a decoded JSON object of either form.

    Raises:
        MalformedEvidence: an unknown, missing or ill-typed field, or parts that are malformed themselves.
    """
    if "version" not in document:
        lists = _validate(_ListEvidence, document)
        quote = lists.quote
        return HclEvidence(
            hcl=parse_hcl_report(bytes(lists.report)),
            quote=parse_tpm_quote(bytes(quote.message), bytes(quote.signature), tuple(map(bytes, quote.pcrs))),
            vek=lists.vcek.encode(),
        )
    text = _validate(_TextEvidence, document)
    parts = text.tpm_quote
    return HclEvidence(
        hcl=parse_hcl_report(_base64url(text.hcl_report, "hcl_report")),
        quote=parse_tpm_quote(
            bytes.fromhex(parts.message), bytes.fromhex(parts.signature), tuple(map(bytes.fromhex, parts.pcrs))
        ),
        vek=_base64url(text.vcek, "vcek"),
    )


def _validate(model: type[_Model], document: Mapping[str, Any]) -> _Model:
    try:
        return model.model_validate(dict(document))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "evidence"
        raise _malformed(f"{field}: {first['msg']}") from error


def _base64url(text: str, field: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"{field} is no base64url") from error
    padded = base64.urlsafe_b64encode(raw).decode()
    if text not in {padded, padded.rstrip("=")}:
        raise _malformed(f"{field} is not in base64url's canonical form")
    return raw


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="Azure evidence in JSON", do="Send it as the az-snp-vtpm attester does.")
