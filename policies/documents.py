"""The documents that a charter holds.

Their form (strict, frozen, canonical) is `policies.forms`; docs/reference/charter.md lists them with every field.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, Field, model_validator

from policies.forms import (
    DOCUMENT_LIMIT,
    NAME_PATTERN,
    RESOURCE_PATTERN,
    Address,
    CertificatePem,
    ChipId,
    Digest,
    Document,
    Instant,
    Jurisdiction,
    Measurement,
    Name,
    PublicKey,
    Resource,
    Text,
    TrustDomain,
    Url,
    complaints,
    format_time,
    from_table,
    load_certificate,
    must_be_unique,
    parse_document,
    parse_toml,
)

RESULTS_KEY_SIZE: Final = 1216
"""Bytes of an HPKE MLKEM768_X25519 public key: 1,184 of ML-KEM-768 (FIPS 203) and 32 of X25519 (RFC 7748)."""

Role = Literal["broker", "server", "site", "inner", "gateway"]
ROLES: Final[tuple[Role, ...]] = ("broker", "server", "site", "inner", "gateway")
Right = Literal["submit", "approve", "operate", "view", "download"]
RIGHTS: Final[tuple[Right, ...]] = ("submit", "approve", "operate", "view", "download")
RIGHTS_SETS: Final[dict[str, tuple[Right, ...]]] = {
    "project-admin": ("submit", "approve", "operate", "view", "download"),
    "org-admin": ("approve", "operate", "view"),
    "lead": ("submit", "operate", "view", "download"),
    "member": ("view",),
}
"""Ready-made rights, named after NVIDIA FLARE's roles."""
Platform = Literal["virtual", "hardware"]
ProductName = Literal["Milan", "Genoa", "Turin"]


def _results_key(text: str) -> str:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if base64.b64encode(raw).decode() != text or len(raw) != RESULTS_KEY_SIZE:
        raise ValueError(f"base64 of the {RESULTS_KEY_SIZE} bytes of an MLKEM768_X25519 public key")
    return text


__all__ = [
    "DOCUMENT_LIMIT",
    "NAME_PATTERN",
    "RESOURCE_PATTERN",
    "RESULTS_KEY_SIZE",
    "RIGHTS",
    "RIGHTS_SETS",
    "ROLES",
    "Address",
    "Allowance",
    "BrokerEntry",
    "BundleApproval",
    "CertificatePem",
    "ChipId",
    "Consortium",
    "Digest",
    "Document",
    "Enrolment",
    "ExportBudget",
    "ImageReference",
    "Instant",
    "Jurisdiction",
    "Measurement",
    "Member",
    "Name",
    "Platform",
    "ProductName",
    "PublicKey",
    "ReferenceMeasurement",
    "Resource",
    "Right",
    "Role",
    "Split",
    "Text",
    "Thresholds",
    "TrustDomain",
    "Url",
    "User",
    "VirtualRoot",
    "Witness",
    "complaints",
    "format_time",
    "from_table",
    "load_certificate",
    "parse_document",
    "parse_toml",
    "user_complaints",
    "user_spiffe_id",
]


# --- the consortium: in the TUF root, field `sealwright` -----------------------------------------------------------


class Member(Document):
    """A member of the consortium, the key that speaks for it, and where it is at home."""

    name: Name
    public_key: PublicKey
    jurisdiction: Jurisdiction | None = None


class BrokerEntry(Document):
    """A broker: who runs it, where it is, its keys.

    `signing_key` (Ed25519, PEM) signs the TUF timestamp, EARs, receipts and checkpoints. `issuer_certificate` is the
    self-signed P-256 CA certificate under which the broker issues credentials, its own TLS certificate included.
    """

    name: Name
    member: Name
    url: Url
    signing_key: PublicKey
    issuer_certificate: CertificatePem

    @model_validator(mode="after")
    def _issues(self) -> BrokerEntry:
        must_issue(self.issuer_certificate)
        return self


def must_issue(pem: str) -> None:
    """Check that a certificate is a self-signed CA certificate with a P-256 key. Raises ValueError."""
    certificate = load_certificate(pem)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("issuer_certificate: its key is not P-256")
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(certificate)
    except (x509.ExtensionNotFound, ValueError, InvalidSignature) as error:
        raise ValueError("issuer_certificate: not a self-signed CA certificate") from error
    if not constraints.ca:
        raise ValueError("issuer_certificate: not a CA certificate")


class Witness(Document):
    """A witness of the other members' ledgers and the Ed25519 key with which it cosigns checkpoints.

    `url` is what C2SP tlog-witness calls its submission prefix. `issuer_certificate` is the P-256 CA certificate under
    which its TLS certificate is; None: whoever answers there is asked, since a cosignature verifies itself.
    """

    name: Name
    member: Name
    url: Url
    public_key: PublicKey
    issuer_certificate: CertificatePem | None = None

    @model_validator(mode="after")
    def _issues(self) -> Witness:
        if self.issuer_certificate is not None:
            must_issue(self.issuer_certificate)
        return self


class VirtualRoot(Document):
    """A virtual platform that a virtual charter admits: the SHA-256 of its ARK's SubjectPublicKeyInfo."""

    product: ProductName
    ark_spki_sha256: Digest


class Thresholds(Document):
    """How many members must sign each shared kind of decision; None: as many as `Consortium.threshold`."""

    images: int | None = Field(default=None, ge=1, le=64)
    enrolments: int | None = Field(default=None, ge=1, le=64)
    code: int | None = Field(default=None, ge=1, le=64)
    policies: int | None = Field(default=None, ge=1, le=64)


class Consortium(Document):
    """Who belongs to the charter, which brokers serve it, and the numbers that bind all."""

    name: Name
    platform: Platform
    trust_domain: TrustDomain
    members: tuple[Member, ...] = Field(min_length=1, max_length=64)
    brokers: tuple[BrokerEntry, ...] = Field(min_length=1, max_length=16)
    witnesses: tuple[Witness, ...] = Field(default=(), max_length=16)
    threshold: int = Field(ge=1, le=64)
    thresholds: Thresholds = Thresholds()
    broker_threshold: int = Field(default=1, ge=1, le=16)
    witness_threshold: int = Field(default=0, ge=0, le=16)
    virtual_roots: tuple[VirtualRoot, ...] = Field(default=(), max_length=16)
    lease_seconds: int = Field(default=60, ge=5, le=3600)
    attestation_interval_seconds: int = Field(default=300, ge=5, le=86400)
    credential_seconds: int = Field(default=86400, ge=60, le=604800)

    @model_validator(mode="after")
    def _coherent(self) -> Consortium:
        names = tuple(member.name for member in self.members)
        must_be_unique(names, "member")
        must_be_unique(tuple(broker.name for broker in self.brokers), "broker")
        must_be_unique(tuple(witness.name for witness in self.witnesses), "witness")
        keys = (
            *(member.public_key for member in self.members),
            *(broker.signing_key for broker in self.brokers),
            *(witness.public_key for witness in self.witnesses),
        )
        if len(set(keys)) != len(keys):
            raise ValueError("one key is given to two parties: every member, broker and witness needs a key of its own")
        parties: tuple[BrokerEntry | Witness, ...] = (*self.brokers, *self.witnesses)
        for party in parties:
            if party.member not in names:
                raise ValueError(f"{party.name} is run by {party.member}, which is not a member")
        for what, number in (("threshold", self.threshold), *self.thresholds.model_dump().items()):
            if number is not None and number > len(names):
                raise ValueError(f"{what}: {number} of {len(names)} members can never sign")
        if self.broker_threshold > len(self.brokers):
            raise ValueError(f"broker_threshold: {self.broker_threshold} of {len(self.brokers)} brokers can never sign")
        for broker in self.brokers:
            others = len(self.witnesses_of(broker))
            if self.witness_threshold > others:
                raise ValueError(
                    f"witness_threshold: {self.witness_threshold} cannot cosign the ledger of {broker.name}, for which "
                    f"{others} witnesses of other members than {broker.member} are there"
                )
        if self.trust_domain.startswith("virtual.") != (self.platform == "virtual"):
            raise ValueError('trust_domain begins with "virtual." if and only if the platform is virtual')
        if (len(self.virtual_roots) > 0) != (self.platform == "virtual"):
            raise ValueError("virtual_roots belong to a virtual charter, which needs at least one")
        return self

    def member(self, name: str) -> Member | None:
        """Return the member called `name`, or None."""
        return next((member for member in self.members if member.name == name), None)

    def broker(self, name: str) -> BrokerEntry | None:
        """Return the broker called `name`, or None."""
        return next((broker for broker in self.brokers if broker.name == name), None)

    def witnesses_of(self, broker: BrokerEntry) -> tuple[Witness, ...]:
        """Return the witnesses whose cosignatures count for this broker's ledger: those of other members."""
        return tuple(witness for witness in self.witnesses if witness.member != broker.member)

    def threshold_for(self, role: str) -> int:
        """Return how many members must sign the TUF role `role` (a member's own role needs that member's signature)."""
        if role.startswith("member-"):
            return 1
        own: int | None = getattr(self.thresholds, role, None) if role in Thresholds.model_fields else None
        return self.threshold if own is None else own


# --- targets --------------------------------------------------------------------------------------------------------


class ReferenceMeasurement(Document):
    """The launch measurement of an image under one launch configuration."""

    measurement: Measurement
    vcpu_model: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    vcpus: int = Field(ge=1, le=512)
    vmm: str = Field(pattern=r"^[a-z0-9]{1,16}$")
    guest_features: int = Field(ge=0, lt=2**64)


class ImageReference(Document):
    """Reference values of one approved image: target `images/NAME.json`."""

    name: Name
    platform: Platform
    manifest_sha256: Digest
    svn: int = Field(ge=0, lt=2**32)
    measurements: tuple[ReferenceMeasurement, ...] = Field(min_length=1, max_length=1024)
    roles: tuple[Role, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> ImageReference:
        must_be_unique(self.roles, "role")
        configurations = tuple(f"{m.vcpu_model} × {m.vcpus}, {m.vmm}, {m.guest_features:#x}" for m in self.measurements)
        must_be_unique(configurations, "launch configuration")
        return self


class Enrolment(Document):
    """One guest's place: target `enrolments/ROLE/NAME.json`. `chips` None: any chip of the charter's platform.

    `jurisdiction` is where the host stands, for policies that keep data or updates in some of them.
    """

    role: Role
    name: Name
    member: Name
    image: Name
    init_data_sha256: Digest
    chips: tuple[ChipId, ...] | None = Field(default=None, min_length=1, max_length=64)
    address: Address | None = None
    jurisdiction: Jurisdiction | None = None


class Allowance(Document):
    """How much may leave, in all: `bits` of declared outputs; `epsilon` and `delta` of differential privacy.

    None bounds nothing. Sums are kept in millionths of epsilon and 10**-12 of delta (`policies.budgets`).
    """

    bits: int | None = Field(default=None, ge=0, lt=2**53)
    epsilon: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    delta: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)


class ExportBudget(Allowance):
    """What a member's sites may let out over all jobs: target `members/MEMBER/budget/exports.json`."""

    member: Name


class BundleApproval(Document):
    """A bundle that may run, where and until when: target `code/DIGEST.json`. `sites` are enrolled sites' names.

    `budget` is what its jobs together may let out of the sites of any one member. With the verdict `rejected` it is the
    word that the bundle may not run, for those who are asked again.
    """

    bundle: Digest
    job: Name
    sites: tuple[Name, ...] = Field(min_length=1, max_length=4096)
    note: Text = ""
    expires: Instant
    budget: Allowance | None = None
    verdict: Literal["approved", "rejected"] = "approved"

    @model_validator(mode="after")
    def _distinct(self) -> BundleApproval:
        must_be_unique(self.sites, "site")
        return self


class User(Document):
    """A person of a member: target `members/MEMBER/users/NAME.json`.

    `tls_certificate`: self-signed P-256, its one SAN URI `spiffe://TRUST-DOMAIN/user/MEMBER/NAME`. `signing_key` signs
    job records. Results are sealed to `results_key` (HPKE MLKEM768_X25519, raw public key, base64).
    """

    name: Name
    member: Name
    tls_certificate: CertificatePem
    signing_key: PublicKey
    results_key: Annotated[str, AfterValidator(_results_key)]
    rights: tuple[Right, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> User:
        must_be_unique(self.rights, "right")
        return self

    def may(self, right: Right) -> bool:
        """Return whether the charter gives this user `right`."""
        return right in self.rights


class Split(Document):
    """A resource that no broker holds whole: target `members/MEMBER/split/TYPE.TAG.json`, by its owner alone.

    `k` of the `brokers`, more than half of them, hold enough to join its value. `generation` grows with each sharing
    anew. `commitments` has the SHA-256 of each broker's share as it was dealt (`attestation.split`), so that who joins
    knows a false one and whose it is. A broker's share has the index of its place among `brokers`, from 1.
    """

    member: Name
    type: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    tag: Name
    k: int = Field(ge=2, le=16)
    brokers: tuple[Name, ...] = Field(min_length=2, max_length=16)
    generation: int = Field(ge=1, lt=2**31)
    commitments: dict[Name, Digest] = Field(max_length=16)

    @model_validator(mode="after")
    def _coherent(self) -> Split:
        if list(self.brokers) != sorted(set(self.brokers)):
            raise ValueError("brokers: each once, in the order of their names")
        if not self.k <= len(self.brokers) < 2 * self.k:
            raise ValueError(
                f"k: {self.k} of {len(self.brokers)} brokers is not more than half of them (k <= n < 2k), so that two "
                "parts of them could each hold enough"
            )
        if set(self.commitments) != set(self.brokers):
            raise ValueError("commitments: one for each broker")
        return self

    @property
    def resource(self) -> str:
        """The resource's name."""
        return f"{self.member}/{self.type}/{self.tag}"

    def index(self, broker: str) -> int:
        """The index of a broker's share, from 1. Raises ValueError for a broker that has none."""
        return self.brokers.index(broker) + 1


def user_spiffe_id(trust_domain: str, member: str, name: str) -> str:
    """Return the SPIFFE id of a member's user."""
    return f"spiffe://{trust_domain}/user/{member}/{name}"


def user_complaints(user: User, trust_domain: str) -> list[str]:
    """Return why `user`'s certificate is not the one that a user of this trust domain has; empty if it is."""
    certificate = load_certificate(user.tls_certificate)
    where = f"user {user.member}/{user.name}"
    complaints = []
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        complaints.append(f"{where}: the key of the TLS certificate is not P-256")
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature):
        complaints.append(f"{where}: the TLS certificate is not self-signed")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    wanted = user_spiffe_id(trust_domain, user.member, user.name)
    if uris != [wanted]:
        complaints.append(f"{where}: the TLS certificate is for {', '.join(uris) or 'nobody'}, not for {wanted}")
    return complaints
