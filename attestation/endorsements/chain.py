"""From a VCEK or VLEK to a pinned root: signatures, names, shapes and revocation lists.

`resolve_chain` proves what does not depend on time (and remembers it by digest); dates are left in its result for the
verifier, which is told the time. Every rule that is broken is listed, not only the first.

AMD publication 57230, chapters 2 to 4: ARK (self-signed) signs ASK and ASVK; ASK signs VCEKs, ASVK signs VLEKs. All
signatures are RSASSA-PSS by RSA-4096 with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes; a VEK is a P-384 key.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from attestation.endorsements.certificates import load_certificate, load_crl, serial_number, spki_sha256
from attestation.endorsements.failure import Failure
from attestation.endorsements.roots import RootPin
from attestation.endorsements.vek import VekExtensions, read_vek_extensions
from attestation.errors import MalformedEndorsement
from attestation.evidence.report import Product

MAX_INTERMEDIATES = 64
MAX_CRLS = 16
VIRTUAL_ORGANIZATION = "Sealwright Virtual Platform"

_AMD_NAME = frozenset(
    {
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
        (NameOID.COUNTRY_NAME, "US"),
        (NameOID.LOCALITY_NAME, "Santa Clara"),
        (NameOID.STATE_OR_PROVINCE_NAME, "CA"),
        (NameOID.ORGANIZATION_NAME, "Advanced Micro Devices"),
    }
)
_PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
_SHA384 = hashes.SHA384()


class VekKind(Enum):
    """Which key signed a report: the chip's own, or one lent to a cloud provider."""

    VCEK = "VCEK"
    VLEK = "VLEK"


@dataclass(frozen=True, slots=True)
class Endorsements:
    """What is brought to prove a report's key; none of it is trusted for where it came from.

    Attributes:
        vek: The VCEK or VLEK, DER or PEM.
        intermediates: Candidates for ASK or ASVK and ARK, in any order, of any product.
        crls: Certificate revocation lists, of any product.
    """

    vek: bytes | None = None
    intermediates: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()

    def digest(self) -> bytes:
        """SHA-256 over all parts, each with its length."""
        state = hashlib.sha256()
        for part in (self.vek or b"", b"intermediates", *self.intermediates, b"lists", *self.crls):
            state.update(len(part).to_bytes(8, "big"))
            state.update(part)
        return state.digest()


@dataclass(frozen=True, slots=True)
class Validity:
    """The period in which a certificate or a revocation list speaks; `until` is None where a list names no end."""

    name: str
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Chain:
    """What was proved of a VEK, whatever the time.

    Attributes:
        key: The report key, None if there is no certificate or it holds no P-384 key.
        kind: VCEK or VLEK, by exact names; None if the names are neither's.
        product: The product line that the issuer's name says.
        virtual: The names are those of the virtual platform.
        extensions: AMD's extensions, None if they break a rule.
        root: The pin that the chain ends in, None if it ends in none.
        failures: Every rule that is broken. With none, all of the above is authentic.
        validities: VEK, ASK or ASVK, and ARK, as far as they were found.
        lists: Revocation lists of this root whose signature is good.
        revoked: Names of certificates of this chain that such a list revokes.
    """

    key: ec.EllipticCurvePublicKey | None
    kind: VekKind | None
    product: Product | None
    virtual: bool
    extensions: VekExtensions | None
    root: RootPin | None
    failures: tuple[Failure, ...]
    validities: tuple[Validity, ...]
    lists: tuple[Validity, ...]
    revoked: tuple[str, ...]


def vek_name(kind: VekKind, *, virtual: bool) -> str:
    """The common name of a VEK's subject."""
    return f"SEV-{kind.value}{'-Virtual' if virtual else ''}"


def issuer_name(kind: VekKind, product: Product, *, virtual: bool) -> str:
    """The common name of the ASK (signs VCEKs) or ASVK (signs VLEKs)."""
    return f"SEV-{'VLEK-' if kind is VekKind.VLEK else ''}{'Virtual-' if virtual else ''}{product.value}"


def root_name(product: Product, *, virtual: bool) -> str:
    """The common name of the ARK."""
    return f"ARK-{'Virtual-' if virtual else ''}{product.value}"


# ASVK and VLEK, like ASK and VCEK, have look-alike names: only exact pairs of subject and issuer are looked up.
_KINDS = {
    (vek_name(kind, virtual=virtual), issuer_name(kind, product, virtual=virtual)): (kind, product, virtual)
    for kind in VekKind
    for product in Product
    for virtual in (False, True)
}


class _Memory:
    """Proved chains by digest, the least recently used forgotten first; never failed ones, which anybody can make."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._chains: OrderedDict[tuple[bytes, tuple[RootPin, ...]], Chain] = OrderedDict()

    def get(self, key: tuple[bytes, tuple[RootPin, ...]]) -> Chain | None:
        with self._lock:
            chain = self._chains.get(key)
            if chain is not None:
                self._chains.move_to_end(key)
            return chain

    def put(self, key: tuple[bytes, tuple[RootPin, ...]], chain: Chain) -> None:
        with self._lock:
            self._chains[key] = chain
            if len(self._chains) > self._size:
                self._chains.popitem(last=False)


_PROVED = _Memory(4096)


def resolve_chain(endorsements: Endorsements, roots: tuple[RootPin, ...]) -> Chain:
    """Prove the VEK's chain up to one of `roots`, or list every reason why it does not hold.

    Raises:
        MalformedEndorsement: a certificate or a list cannot be read at all, or there are too many.
    """
    key = (endorsements.digest(), roots)
    chain = _PROVED.get(key)
    if chain is None:
        chain = _Resolution(endorsements, roots).chain()
        if not chain.failures:
            _PROVED.put(key, chain)
    return chain


class _Resolution:
    """One walk from VEK to root, collecting failures on the way."""

    def __init__(self, endorsements: Endorsements, roots: tuple[RootPin, ...]) -> None:
        if len(endorsements.intermediates) > MAX_INTERMEDIATES or len(endorsements.crls) > MAX_CRLS:
            raise MalformedEndorsement(
                "there are too many certificates or revocation lists",
                where="endorsements",
                do=f"Give at most {MAX_INTERMEDIATES} certificates and {MAX_CRLS} lists.",
            )
        self.vek = None if endorsements.vek is None else load_certificate(endorsements.vek)
        self.candidates = [load_certificate(raw) for raw in endorsements.intermediates]
        self.crls = [load_crl(raw) for raw in endorsements.crls]
        self.roots = {pin.spki_sha256: pin for pin in roots}
        self.failures: list[Failure] = []

    def fail(self, check: str, value: str, expected: str) -> None:
        self.failures.append(Failure(check, value, expected))

    def chain(self) -> Chain:
        if self.vek is None:
            self.fail("vek-profile", "no VCEK or VLEK at hand", "the certificate of the key that signed the report")
            return Chain(None, None, None, False, None, None, tuple(self.failures), (), (), ())
        vek = self.vek
        kind, product, virtual = self._classify(vek)
        key = self._vek_key(vek)
        extensions = self._vek_extensions(vek, kind, product, virtual)
        issuer = self._issuer_of(vek, "the VEK")
        root = None if issuer is None else self._issuer_of(issuer, "the ASK or ASVK")
        pin = self._pin(root, product, virtual)
        if kind is not None and product is not None:
            if issuer is not None:
                self._ca(issuer, issuer_name(kind, product, virtual=virtual), virtual, path_length=0)
            if root is not None:
                self._ca(root, root_name(product, virtual=virtual), virtual, path_length=None)
        if root is not None and not _signed_by(root, root):
            self.fail("chain-signatures", "the ARK's own signature does not verify", "a self-signed ARK")
        lists, revoked = self._revocation(root, issuer) if root is not None and pin is not None else ((), ())
        found = (("VEK", vek), ("ASK or ASVK", issuer), ("ARK", root))
        return Chain(
            key=key,
            kind=kind,
            product=product,
            virtual=virtual,
            extensions=extensions,
            root=pin,
            failures=tuple(self.failures),
            validities=tuple(
                Validity(name, certificate.not_valid_before_utc, certificate.not_valid_after_utc)
                for name, certificate in found
                if certificate is not None
            ),
            lists=lists,
            revoked=revoked,
        )

    def _classify(self, vek: x509.Certificate) -> tuple[VekKind | None, Product | None, bool]:
        subject, issuer = _common_name(vek.subject), _common_name(vek.issuer)
        kind, product, virtual = _KINDS.get((subject, issuer), (None, None, "Virtual" in subject))
        if kind is None:
            self.fail("vek-profile", f"subject {subject!r}, issuer {issuer!r}", "exact names of a VCEK or VLEK")
        elif not (_name_is(vek.subject, subject, virtual) and _name_is(vek.issuer, issuer, virtual)):
            self.fail("vek-profile", vek.subject.rfc4514_string(), f"the full name that belongs to {subject}")
        return kind, product, virtual

    def _vek_key(self, vek: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
        if vek.version is not x509.Version.v3:
            self.fail("vek-profile", f"X.509 {vek.version.name}", "X.509 v3")
        critical = _critical(vek)
        if critical is None or critical:
            self.fail("vek-profile", "critical or unreadable extensions", "none in a VEK")
        try:
            key = vek.public_key()
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
            return key
        self.fail("vek-profile", "another kind of key", "an EC key on P-384")
        return None

    def _vek_extensions(
        self, vek: x509.Certificate, kind: VekKind | None, product: Product | None, virtual: bool
    ) -> VekExtensions | None:
        try:
            extensions = read_vek_extensions(vek)
        except MalformedEndorsement as error:
            self.fail("vek-extensions", f"{error.what} ({error.where})", "AMD's extensions, each once and in range")
            return None
        if product is not None and (extensions.product, extensions.virtual) != (product, virtual):
            said = f"product name {extensions.product_name!r} under issuer {_common_name(vek.issuer)!r}"
            self.fail("vek-extensions", said, "the issuer's product")
        if kind is not None and (extensions.hwid is None) != (kind is VekKind.VLEK):
            self.fail(
                "vek-extensions", f"a {kind.value} with the other kind's id", "hardware id in VCEKs, provider in VLEKs"
            )
        return extensions

    def _issuer_of(self, certificate: x509.Certificate, name: str) -> x509.Certificate | None:
        candidates = [one for one in self.candidates if one.subject == certificate.issuer]
        if not candidates:
            self.fail(
                "chain-signatures", f"no certificate at hand for the issuer of {name}", _rfc4514(certificate.issuer)
            )
            return None
        # Two candidates may share a name (a forged one beside the real): a pinned key, then a good signature, is it.
        candidates.sort(key=lambda one: (not _signed_by(certificate, one), self._spki(one) not in self.roots))
        if not _signed_by(certificate, candidates[0]):
            self.fail(
                "chain-signatures",
                f"the signature on {name} does not verify",
                f"signed by {_rfc4514(certificate.issuer)}",
            )
        return candidates[0]

    def _spki(self, certificate: x509.Certificate) -> str:
        try:
            return spki_sha256(certificate)
        except MalformedEndorsement:
            return "unreadable key"

    def _pin(self, root: x509.Certificate | None, product: Product | None, virtual: bool) -> RootPin | None:
        if root is None:
            self.fail("trusted-root", "the chain reaches no root", "one of the profile's roots")
            return None
        digest = self._spki(root)
        pin = self.roots.get(digest)
        if pin is None:
            self.fail("trusted-root", f"{_rfc4514(root.subject)}, key {digest}", "one of the profile's roots")
        elif pin.virtual != virtual:
            worlds = {False: "hardware", True: "virtual"}
            self.fail(
                "trusted-root", f"{worlds[virtual]} names under a {worlds[pin.virtual]} root", "one world throughout"
            )
        elif pin.product is not product:
            self.fail(
                "trusted-root", f"the root of {pin.product.value}", f"the root of {product.value if product else '?'}"
            )
        return pin

    def _ca(self, certificate: x509.Certificate, name: str, virtual: bool, *, path_length: int | None) -> None:
        if not _name_is(certificate.subject, name, virtual):
            self.fail("chain-profile", _rfc4514(certificate.subject), f"the full name that belongs to {name}")
        try:
            key = certificate.public_key()
            extensions = certificate.extensions
            constraints = extensions.get_extension_for_class(x509.BasicConstraints)
            usage = extensions.get_extension_for_class(x509.KeyUsage)
        except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.ExtensionNotFound):
            self.fail(
                "chain-profile",
                f"{name}: key, basic constraints or key usage missing or unreadable",
                "a CA certificate",
            )
            return
        if certificate.version is not x509.Version.v3:
            self.fail("chain-profile", f"{name}: X.509 {certificate.version.name}", "X.509 v3")
        if not (isinstance(key, rsa.RSAPublicKey) and key.key_size == 4096 and key.public_numbers().e == 65537):
            self.fail("chain-profile", f"{name}: another kind of key", "RSA with 4096 bits and exponent 65537")
        if not constraints.critical or not constraints.value.ca:
            self.fail("chain-profile", f"{name}: no CA", "critical basic constraints with CA true")
        if constraints.value.path_length != path_length:
            self.fail("chain-profile", f"{name}: path length {constraints.value.path_length}", f"{path_length}")
        if not usage.critical or not usage.value.key_cert_sign:
            self.fail("chain-profile", f"{name}: may not sign certificates", "critical key usage with keyCertSign")
        unknown = (_critical(certificate) or set()) - {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}
        if unknown:
            self.fail("chain-profile", f"{name}: unknown critical extensions", "basic constraints and key usage alone")

    def _revocation(
        self, root: x509.Certificate, issuer: x509.Certificate | None
    ) -> tuple[tuple[Validity, ...], tuple[str, ...]]:
        lists: list[Validity] = []
        revoked: list[str] = []
        for crl in self.crls:
            if crl.issuer != root.subject:
                continue  # another product's list says nothing of this chain
            if not _crl_signed_by(crl, root):
                self.fail(
                    "revocation-list", "a list whose signature does not verify", f"signed by {_rfc4514(root.subject)}"
                )
                continue
            try:
                scoped = any(extension.critical for extension in crl.extensions)
            except (ValueError, x509.DuplicateExtension):
                scoped = True
            if scoped:
                self.fail("revocation-list", "critical or unreadable extensions (a partial list?)", "a complete list")
                continue
            lists.append(Validity("revocation list", crl.last_update_utc, crl.next_update_utc))
            for name, certificate in (("ASK or ASVK", issuer), ("ARK", root)):
                if certificate is not None and _revokes(crl, certificate):
                    revoked.append(name)
        return tuple(lists), tuple(dict.fromkeys(revoked))


def _common_name(name: x509.Name) -> str:
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _name_is(name: x509.Name, common_name: str, virtual: bool) -> bool:
    """Whether every part of the name is what its world demands: all of AMD's, or the virtual platform's."""
    if any(len(rdn) != 1 for rdn in name.rdns):
        return False
    parts = [(attribute.oid, attribute.value) for attribute in name]
    if not virtual:
        return len(parts) == len(_AMD_NAME) + 1 and set(parts) == _AMD_NAME | {(NameOID.COMMON_NAME, common_name)}
    of_it = [part for part in parts if part[0] in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)]
    expected = {(NameOID.ORGANIZATION_NAME, VIRTUAL_ORGANIZATION), (NameOID.COMMON_NAME, common_name)}
    return len(of_it) == 2 and set(of_it) == expected


def _rfc4514(name: x509.Name) -> str:
    return name.rfc4514_string()


def _critical(certificate: x509.Certificate) -> set[x509.ObjectIdentifier] | None:
    try:
        return {extension.oid for extension in certificate.extensions if extension.critical}
    except (ValueError, x509.DuplicateExtension):
        return None


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    return certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS and _pss_verifies(
        issuer, certificate.signature, certificate.tbs_certificate_bytes
    )


def _crl_signed_by(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    return crl.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS and _pss_verifies(
        issuer, crl.signature, crl.tbs_certlist_bytes
    )


def _pss_verifies(issuer: x509.Certificate, signature: bytes, signed: bytes) -> bool:
    """Whether it verifies with the one set of parameters allowed; those that the certificate names do not matter."""
    try:
        key = issuer.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            return False
        key.verify(signature, signed, _PSS, _SHA384)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _revokes(crl: x509.CertificateRevocationList, certificate: x509.Certificate) -> bool:
    return crl.get_revoked_certificate_by_serial_number(serial_number(certificate)) is not None
