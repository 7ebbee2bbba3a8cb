"""What AMD certifies about a chip: the extensions of a VCEK or VLEK, under 1.3.6.1.4.1.3704.1.

Source: AMD publication 57230, tables "VCEK certificate extensions" and "VLEK certificate extensions". Read strictly: an
extension that is missing, unknown, twice there or out of range is refused, because the verifier compares what it reads
here with what the report says, and a lenient reader would compare something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryptography import x509

from attestation.errors import MalformedEndorsement
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb

ARC = "1.3.6.1.4.1.3704.1"
_STRUCT_VERSION, _PRODUCT_NAME, _HWID, _CSP_ID = f"{ARC}.1", f"{ARC}.2", f"{ARC}.4", f"{ARC}.5"
_BOOTLOADER, _TEE, _SNP = f"{ARC}.3.1", f"{ARC}.3.2", f"{ARC}.3.3"
_RESERVED = tuple(f"{ARC}.3.{index}" for index in (4, 5, 6, 7))
_MICROCODE, _FMC = f"{ARC}.3.8", f"{ARC}.3.9"
_KNOWN = frozenset(
    (_STRUCT_VERSION, _PRODUCT_NAME, _HWID, _CSP_ID, _BOOTLOADER, _TEE, _SNP, *_RESERVED, _MICROCODE, _FMC)
)

_PRODUCT = re.compile(r"(?P<virtual>Virtual-)?(?P<line>Milan|Genoa|Turin)(-[A-Z][0-9])?")


@dataclass(frozen=True, slots=True)
class VekExtensions:
    """What the certificate says of its chip.

    Attributes:
        struct_version: 0; 1 on Turin.
        product_name: As written, e.g. "Milan-B0".
        product: The product line of that name.
        virtual: The name says that the chip is one of the virtual platform.
        tcb: The TCB that the key was derived for.
        hwid: The chip's id, 64 bytes (8 on Turin); None in a VLEK.
        csp_id: The cloud provider that a VLEK was issued to; None in a VCEK.
    """

    struct_version: int
    product_name: str
    product: Product
    virtual: bool
    tcb: Tcb
    hwid: bytes | None
    csp_id: str | None


def read_vek_extensions(certificate: x509.Certificate) -> VekExtensions:
    """Read AMD's extensions of a VCEK or VLEK.

    Raises:
        MalformedEndorsement: with what is wrong, in the words of the first rule that is broken.
    """
    values = _values(certificate)
    struct_version = _integer(values, _STRUCT_VERSION)
    name = _ia5_string(values, _PRODUCT_NAME)
    match = _PRODUCT.fullmatch(name)
    if match is None:
        raise _malformed(f"product name {name!r} is not known", _PRODUCT_NAME)
    product = Product(match["line"])
    turin = product is Product.TURIN
    if struct_version != int(turin):
        raise _malformed(f"structure version {struct_version} does not belong to {product.value}", _STRUCT_VERSION)
    if turin != (_FMC in values):
        raise _malformed("Turin's certificates have an FMC level, and only they", _FMC)
    for oid in _RESERVED:
        if oid in values:
            _integer(values, oid)
    if (_HWID in values) == (_CSP_ID in values):
        raise _malformed("a VCEK has a hardware id, a VLEK has a provider id, and none has both", _HWID)
    return VekExtensions(
        struct_version=struct_version,
        product_name=name,
        product=product,
        virtual=match["virtual"] is not None,
        tcb=Tcb(
            bootloader=_integer(values, _BOOTLOADER),
            tee=_integer(values, _TEE),
            snp=_integer(values, _SNP),
            microcode=_integer(values, _MICROCODE),
            fmc=_integer(values, _FMC) if turin else None,
        ),
        hwid=_hwid(values[_HWID], 8 if turin else 64) if _HWID in values else None,
        csp_id=_ia5_string(values, _CSP_ID) if _CSP_ID in values else None,
    )


def _values(certificate: x509.Certificate) -> dict[str, bytes]:
    try:
        extensions = list(certificate.extensions)
    except (ValueError, x509.DuplicateExtension) as error:
        raise _malformed("an extension is twice there or cannot be read", ARC) from error
    values: dict[str, bytes] = {}
    for extension in extensions:
        oid = extension.oid.dotted_string
        if not oid.startswith(f"{ARC}."):
            continue
        if oid not in _KNOWN or not isinstance(extension.value, x509.UnrecognizedExtension):
            raise _malformed("this extension is not known", oid)
        values[oid] = extension.value.value
    return values


def _integer(values: dict[str, bytes], oid: str) -> int:
    """A DER INTEGER of 0 to 255 in its shortest form; 128 to 255 take a leading zero byte."""
    content = _tagged(values, oid, 0x02, "INTEGER")
    shortest = len(content) == 1 or (len(content) == 2 and content[0] == 0 and content[1] >= 0x80)
    if not content or not shortest or content[0] >= 0x80:
        raise _malformed(f"{content.hex()} is no number from 0 to 255", oid)
    return int.from_bytes(content, "big")


def _ia5_string(values: dict[str, bytes], oid: str) -> str:
    content = _tagged(values, oid, 0x16, "IA5String")
    if not content or not content.isascii() or not content.decode("ascii").isprintable():
        raise _malformed("the text is empty or has characters outside ASCII", oid)
    return content.decode("ascii")


def _tagged(values: dict[str, bytes], oid: str, tag: int, kind: str) -> bytes:
    if oid not in values:
        raise _malformed("the extension is missing", oid)
    value = values[oid]
    if len(value) < 2 or value[0] != tag or value[1] >= 0x80 or value[1] != len(value) - 2:
        raise _malformed(f"the value is not one {kind}", oid)
    return value[2:]


def _hwid(value: bytes, size: int) -> bytes:
    """AMD writes the bytes as they are; some issue them in an OCTET STRING."""
    if len(value) == size:
        return value
    if len(value) == size + 2 and value[:2] == bytes((0x04, size)):
        return value[2:]
    raise _malformed(f"a hardware id has {size} bytes, not {len(value)}", _HWID)


def _malformed(what: str, oid: str) -> MalformedEndorsement:
    return MalformedEndorsement(
        what, where=f"VEK certificate, extension {oid}", do="Take the certificate from AMD's KDS."
    )
