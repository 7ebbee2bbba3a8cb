"""NVIDIA's reference integrity manifests (RIM): a SWID tag (ISO/IEC 19770-2:2015) with golden measurements, signed.

Form: TCG "Reference Integrity Manifest Information Model" 1.01, direct payload, enveloped XML signature (ECDSA P-384
with SHA-384 over canonical XML 1.1). The reader is much narrower than XML: no document type, no entities, no comments,
no processing instructions, no network, one signature of one known shape. `read_manifest` reads a tree whose signature
was verified (`attestation.endorsements.nvidia.verify_rim`) and one whose was not alike; only the first is worth
anything.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from lxml import etree

from attestation.errors import MalformedEndorsement

MAX_RIM_SIZE = 256 << 10
"""Bytes of a manifest that are read; the real ones have 20 KiB."""

MAX_ELEMENTS = 2048
MAX_MEASUREMENTS = 254
MAX_ALTERNATIVES = 64
MAX_CERTIFICATES = 8

SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
SHA384 = "http://www.w3.org/2001/04/xmlenc#sha384"
DSIG = "http://www.w3.org/2000/09/xmldsig#"
C14N11 = "http://www.w3.org/2006/12/xml-c14n11"
ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
DIGEST_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"
ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"

P = ParamSpec("P")
T = TypeVar("T")
_INDEX = re.compile(r"0|[1-9][0-9]{0,2}")
_DIGEST = re.compile(r"(?:[0-9a-fA-F]{2}){1,64}")
_VBIOS = re.compile(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}")
_DRIVER = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){1,3}")
_DECLARATION = re.compile(
    r"""\A<\?xml version=["']1\.0["']( encoding=["'](?i:utf-8)["'])?( standalone=["']no["'])?\s*\?>"""
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}")


class RimKind(Enum):
    """What a manifest vouches for."""

    DRIVER = "driver"
    VBIOS = "vbios"


@dataclass(frozen=True, slots=True)
class Rim:
    """One manifest.

    Attributes:
        kind: By the form of its version: five hex groups are a VBIOS or switch BIOS, else a driver.
        product: For example `GH100`.
        version: The version it vouches for, as a report writes it.
        tag_id: The tag's own identifier.
        golden: Active measurements: index from 0 (a report's block index less one) to the values it may have.
        certificates: The signer's chain, leaf first, DER.
    """

    kind: RimKind
    product: str
    version: str
    tag_id: str
    golden: Mapping[int, tuple[bytes, ...]]
    certificates: tuple[bytes, ...]


def with_names_of_its_own(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, run in a thread of its own, for whatever parses XML.

    libxml2 keeps each name that it has met (and each short text) as long as the thread that met it lives. So a peer
    that sends manifests with ever new names would fill the memory of a service whose threads live for months.
    """

    @wraps(work)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1, "xml") as thread:
            return thread.submit(work, *args, **kwargs).result()

    return alone


def parse_rim_tree(raw: bytes) -> Any:
    """The manifest's XML tree (an lxml element), hardened and bounded.

    Raises:
        MalformedEndorsement: not UTF-8 XML of at most 256 KiB with elements and text alone.
    """
    if len(raw) > MAX_RIM_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_RIM_SIZE} that are read")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed("this is not UTF-8") from error
    body = _DECLARATION.sub("", text, count=1)
    if "<!" in body or "<?" in body or body.count("<") > 2 * MAX_ELEMENTS:
        raise _malformed("a document type, a comment, an instruction, another encoding, or too many elements")
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        encoding="utf-8",
    )
    try:
        root = etree.fromstring(raw, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise _malformed(f"this is no well-formed XML: {error}") from error
    for count, node in enumerate(root.iter()):
        if count > MAX_ELEMENTS or not isinstance(node.tag, str):
            raise _malformed("too many elements, or a node that is no element")
    return root


@with_names_of_its_own
def parse_rim(raw: bytes) -> Rim:
    """Read a manifest without judging its signature. Raises MalformedEndorsement."""
    root = parse_rim_tree(raw)
    return read_manifest(root, signature_certificates(root))


def read_manifest(root: Any, certificates: tuple[bytes, ...]) -> Rim:
    """The manifest that this tree states.

    Raises:
        MalformedEndorsement: another structure than a direct payload of measurements, an index twice, no active one.
    """
    if root.tag != f"{{{SWID}}}SoftwareIdentity":
        raise _malformed("this is no SWID tag")
    parts = {f"{{{SWID}}}Entity": "Entity", f"{{{SWID}}}Meta": "Meta", f"{{{SWID}}}Payload": "Payload"}
    found: dict[str, Any] = {}
    for child in root:
        name = parts.get(child.tag)
        if name is None and child.tag == f"{{{DSIG}}}Signature":
            continue
        if name is None or name in found:
            raise _malformed("an element that does not belong in a SWID tag, or one that is there twice")
        found[name] = child
    if len(found) != len(parts):
        raise _malformed("Entity, Meta or Payload is missing")
    version = _attribute(found["Meta"], "colloquialVersion").upper()
    product = _attribute(found["Meta"], "product")
    if _NAME.fullmatch(product) is None or found["Meta"].get("PayloadType", "direct") != "direct":
        raise _malformed("the product's name or the payload's type is not one known here")
    if _VBIOS.fullmatch(version):
        kind = RimKind.VBIOS
    elif _DRIVER.fullmatch(version):
        kind = RimKind.DRIVER
    else:
        raise _malformed("the version is neither a VBIOS's nor a driver's")
    return Rim(kind, product, version, root.get("tagId", "")[:256], _golden(found["Payload"]), certificates)


def _golden(payload: Any) -> Mapping[int, tuple[bytes, ...]]:
    seen: set[int] = set()
    golden: dict[int, tuple[bytes, ...]] = {}
    for resource in payload:
        if resource.tag != f"{{{SWID}}}Resource" or resource.get("type") != "Measurement":
            raise _malformed("the payload holds something other than measurements")
        index_text = _attribute(resource, "index")
        if _INDEX.fullmatch(index_text) is None or not 0 <= (index := int(index_text)) < MAX_MEASUREMENTS:
            raise _malformed("a measurement's index is out of range")
        if index in seen:
            raise _malformed(f"measurement {index} twice")
        seen.add(index)
        active = {"True": True, "False": False}.get(_attribute(resource, "active"))
        values = _values(resource, index)
        if active is None:
            raise _malformed(f"measurement {index} is neither active nor inactive")
        if active:
            golden[index] = values
    if not golden:
        raise _malformed("no active measurement")
    return MappingProxyType(golden)


def _values(resource: Any, index: int) -> tuple[bytes, ...]:
    count_text, size_text = _attribute(resource, "alternatives"), _attribute(resource, "size")
    if _INDEX.fullmatch(count_text) is None or _INDEX.fullmatch(size_text) is None:
        raise _malformed(f"measurement {index}: alternatives or size is no number")
    count, size = int(count_text), int(size_text)
    names = [f"{{{SHA384}}}Hash{number}" for number in range(count)]
    known = {"type", "index", "active", "alternatives", "name", "size", *names}
    if not 1 <= count <= MAX_ALTERNATIVES or set(resource.attrib) - known:
        raise _malformed(f"measurement {index}: attributes that are not known, or too many alternatives")
    values: list[bytes] = []
    for name in names:
        text = _attribute(resource, name)
        if _DIGEST.fullmatch(text) is None or len(text) != 2 * size:
            raise _malformed(f"measurement {index}: a value is no hex of the size stated")
        values.append(bytes.fromhex(text))
    return tuple(values)


def signature_certificates(root: Any) -> tuple[bytes, ...]:
    """The signer's certificates in the manifest's one signature, leaf first, after its shape was found right.

    Raises:
        MalformedEndorsement: no signature or several, or one that could cover less than the whole tag.
    """
    signatures = list(root.iter(f"{{{DSIG}}}Signature"))
    if len(signatures) != 1 or signatures[0].getparent() is not root:
        raise _malformed("there is not exactly one signature, directly inside the tag")
    signature = signatures[0]
    if [child.tag for child in signature] != [
        f"{{{DSIG}}}{name}" for name in ("SignedInfo", "SignatureValue", "KeyInfo")
    ]:
        raise _malformed("the signature has not exactly SignedInfo, SignatureValue and KeyInfo")
    shape = [(element.tag.removeprefix(f"{{{DSIG}}}"), dict(element.attrib)) for element in signature[0].iter()]
    if shape != _SIGNED_INFO:
        raise _malformed("the signature does not cover the whole tag by ECDSA P-384 and SHA-384")
    _decode(signature[1], "the signature's value", size=96)
    _decode(signature[0][2][2], "the digest", size=48)
    key_info = signature[2]
    if [child.tag for child in key_info] != [f"{{{DSIG}}}X509Data"] or not 1 <= len(key_info[0]) <= MAX_CERTIFICATES:
        raise _malformed("the signature does not name its certificates")
    certificates: list[bytes] = []
    for element in key_info[0]:
        if element.tag != f"{{{DSIG}}}X509Certificate" or len(element):
            raise _malformed("the signature holds something other than certificates")
        certificates.append(_decode(element, "a certificate"))
    return tuple(certificates)


def _decode(element: Any, name: str, *, size: int | None = None) -> bytes:
    try:
        raw = base64.b64decode("".join((element.text or "").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"{name} is no base64") from error
    if not raw or (size is not None and len(raw) != size):
        raise _malformed(f"{name} has {len(raw)} bytes")
    return raw


_SIGNED_INFO: list[tuple[str, dict[str, str]]] = [
    ("SignedInfo", {}),
    ("CanonicalizationMethod", {"Algorithm": C14N11}),
    ("SignatureMethod", {"Algorithm": ECDSA_SHA384}),
    ("Reference", {"URI": ""}),
    ("Transforms", {}),
    ("Transform", {"Algorithm": ENVELOPED}),
    ("Transform", {"Algorithm": C14N11}),
    ("DigestMethod", {"Algorithm": DIGEST_SHA384}),
    ("DigestValue", {}),
]


def _attribute(element: Any, name: str) -> str:
    value = element.get(name)
    if not isinstance(value, str) or not value:
        raise _malformed(f"the attribute {name.rpartition('}')[2]} is missing")
    return value


def _malformed(what: str) -> MalformedEndorsement:
    return MalformedEndorsement(what, where="reference manifest (RIM)", do="Give the SWID tag as NVIDIA signed it.")
