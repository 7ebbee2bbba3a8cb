"""A verifier's profile: what evidence must be like, as a document people write in TOML and sign.

Every check of the verifier has a line in `[checks]` (`refuse`, `warn` or `allow`); what it compares with stands in the
section of its subject. Every default is the strict one that real, healthy hardware passes. The checks that make
evidence authentic at all (report signature, chain, names, root) have no such line: `roots` is their setting.
`docs/reference/evidence-policy.md` describes the format.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attestation.endorsements.roots import AMD_ROOTS, RootPin
from attestation.errors import MalformedProfile
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from attestation.verifier.profile_form import MAX_PROFILE_SIZE as MAX_PROFILE_SIZE
from attestation.verifier.profile_form import ProfileSection, Severity, check_profile, read_profile

_WHERE = "profile"
_DO = "`seal evidence policy` prints all settings with their meaning."

Bit = Literal["set", "clear", "any"]
"""What a bit must be; `any` lets both pass."""

Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex48 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
ChipId = Annotated[str, Field(pattern=r"^([0-9a-f]{16}|[0-9a-f]{128})$")]
Level = Annotated[int, Field(ge=0, le=255)]
Unsigned32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Unsigned64 = Annotated[int, Field(ge=0, lt=1 << 64)]
AbiVersion = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]{0,2})$")]
FirmwareVersion = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){2}$")]
CspId = Annotated[str, Field(pattern=r"^[ -~]{1,256}$")]
ProductName = Literal["Milan", "Genoa", "Turin"]


class Root(ProfileSection):
    """A root key that chains may end in."""

    product: ProductName = Field(description="The product line it vouches for.")
    spki_sha256: Hex32 = Field(description="SHA-256 of its SubjectPublicKeyInfo.")
    virtual: bool = Field(False, description="True for the virtual platform, whose certificates say so.")


class Checks(ProfileSection):
    """How each check that fails is taken: refuse, warn or allow."""

    report_version: Severity = "refuse"
    reserved_bytes: Severity = "refuse"
    signature_padding: Severity = "refuse"
    signature_algorithm: Severity = "refuse"
    key_info_reserved: Severity = "refuse"
    tcb_reserved: Severity = "refuse"
    signing_key: Severity = "refuse"
    masked_chip_key: Severity = "refuse"
    product: Severity = "refuse"
    allowed_product: Severity = "refuse"
    hardware_id: Severity = "refuse"
    chip_id_present: Severity = "refuse"
    chip: Severity = "refuse"
    provider: Severity = "refuse"
    certificate_validity: Severity = "refuse"
    revocation: Severity = "refuse"
    revocation_list: Severity = "refuse"
    certificate_tcb: Severity = "refuse"
    tcb_order: Severity = "refuse"
    provisional_firmware: Severity = "refuse"
    reported_tcb_floor: Severity = "refuse"
    current_tcb_floor: Severity = "refuse"
    committed_tcb_floor: Severity = "refuse"
    launch_tcb_floor: Severity = "refuse"
    current_firmware_floor: Severity = "refuse"
    committed_firmware_floor: Severity = "refuse"
    launch_mitigations: Severity = "refuse"
    current_mitigations: Severity = "refuse"
    policy_reserved: Severity = "refuse"
    policy_abi: Severity = "refuse"
    policy_smt: Severity = "refuse"
    policy_migrate_ma: Severity = "refuse"
    policy_debug: Severity = "refuse"
    policy_single_socket: Severity = "refuse"
    policy_cxl_allow: Severity = "refuse"
    policy_mem_aes_256_xts: Severity = "refuse"
    policy_rapl_dis: Severity = "refuse"
    policy_ciphertext_hiding_dram: Severity = "refuse"
    policy_page_swap_disable: Severity = "refuse"
    platform_unknown_bits: Severity = "refuse"
    platform_smt: Severity = "refuse"
    platform_tsme: Severity = "refuse"
    platform_ecc: Severity = "refuse"
    platform_rapl_dis: Severity = "refuse"
    platform_ciphertext_hiding_dram: Severity = "refuse"
    platform_alias_check: Severity = "refuse"
    platform_iommu_write_safe: Severity = "refuse"
    platform_tio: Severity = "refuse"
    smt_consistency: Severity = "refuse"
    rapl_consistency: Severity = "refuse"
    ciphertext_hiding_consistency: Severity = "refuse"
    migration_agent: Severity = "refuse"
    vmpl: Severity = "refuse"
    measurement: Severity = "refuse"
    freshness: Severity = "refuse"
    init_data: Severity = "refuse"
    id_block: Severity = "refuse"
    id_key: Severity = "refuse"
    author_key: Severity = "refuse"
    family_id: Severity = "refuse"
    image_id: Severity = "refuse"
    guest_svn: Severity = "refuse"
    report_id: Severity = "refuse"
    report_id_ma: Severity = "refuse"
    vtpm_registers: Severity = "refuse"


class ReportRules(ProfileSection):
    """What the report as a whole may be."""

    versions: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        (2, 3, 4, 5), description="Report versions let through; 2 to 5 are known."
    )
    vmpls: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        (0,), description="VM privilege levels that may have asked for the report, 0 being the highest."
    )
    signing_keys: Annotated[tuple[Literal["VCEK", "VLEK"], ...], Field(strict=False)] = Field(
        ("VCEK", "VLEK"), description="Kinds of keys that may sign: a chip's own, or one lent to a cloud provider."
    )
    products: Annotated[tuple[ProductName, ...], Field(strict=False)] = Field(
        ("Milan", "Genoa", "Turin"), description="Product lines let through. Bergamo and Siena are Genoa's."
    )


class PolicyRules(ProfileSection):
    """The guest policy that the firmware enforces over the guest's life: set, clear or any."""

    minimum_abi: AbiVersion = Field("0.0", description="The guest must demand at least this firmware ABI.")
    smt: Bit = Field("any", description="Hyper-threads allowed. `clear` also closes cross-thread side channels.")
    migrate_ma: Bit = Field("clear", description="A migration agent may move the guest.")
    debug: Bit = Field("clear", description="The host may read and write the guest's memory.")
    single_socket: Bit = Field("any", description="The guest runs on one socket alone.")
    cxl_allow: Bit = Field("clear", description="CXL devices may hold the guest's memory.")
    mem_aes_256_xts: Bit = Field("any", description="Memory must be encrypted by AES-256-XTS.")
    rapl_dis: Bit = Field("any", description="Power meters must be off on the platform.")
    ciphertext_hiding_dram: Bit = Field("any", description="The host must not see the ciphertext.")
    page_swap_disable: Bit = Field("any", description="The host may not move or swap pages.")


class PlatformRules(ProfileSection):
    """What the firmware says of the machine: set, clear or any."""

    smt: Bit = Field("any", description="Hyper-threads are on.")
    tsme: Bit = Field("any", description="Transparent memory encryption is on.")
    ecc: Bit = Field("any", description="Memory has error correction.")
    rapl_dis: Bit = Field("any", description="Power meters are off.")
    ciphertext_hiding_dram: Bit = Field("any", description="The host cannot see the ciphertext.")
    alias_check: Literal["set", "clear", "any", "where-known"] = Field(
        "where-known",
        description="No two addresses reach one memory cell. `where-known`: asked of firmware that looks.",
    )
    iommu_write_safe: Bit = Field("any", description="Bit 6, set on Turin; AMD's public tables call it reserved.")
    tio: Bit = Field("any", description="Trusted I/O is on.")


class TcbFloor(ProfileSection):
    """The lowest patch level of each part; parts left out have no floor."""

    bootloader: Level = 0
    tee: Level = 0
    snp: Level = 0
    microcode: Level = 0
    fmc: Level = 0

    @cached_property
    def tcb(self) -> Tcb:
        """The floor as a TCB; FMC counts on Turin only."""
        return Tcb(self.bootloader, self.tee, self.snp, self.microcode, self.fmc)


class ProductFloors(ProfileSection):
    """How old the firmware of one product line may be."""

    reported: TcbFloor | None = Field(None, description="What the report's key was derived for.")
    current: TcbFloor | None = Field(None, description="What runs now.")
    committed: TcbFloor | None = Field(None, description="Below this the platform can never go back.")
    launch: TcbFloor | None = Field(None, description="What ran when the guest was launched.")
    current_firmware: FirmwareVersion | None = Field(None, description="SEV firmware that runs, major.minor.build.")
    committed_firmware: FirmwareVersion | None = Field(None, description="SEV firmware that is committed.")


class TcbRules(ProfileSection):
    """Floors for each product line."""

    milan: ProductFloors = Field(ProductFloors(), alias="Milan")
    genoa: ProductFloors = Field(ProductFloors(), alias="Genoa")
    turin: ProductFloors = Field(ProductFloors(), alias="Turin")

    @model_validator(mode="after")
    def _fmc_on_turin(self) -> Self:
        for floors in (self.milan, self.genoa):
            if any(one and one.fmc for one in (floors.reported, floors.current, floors.committed, floors.launch)):
                raise ValueError("only Turin has an FMC level")
        return self

    def of(self, product: Product) -> ProductFloors:
        """The floors of this product line."""
        if product is Product.MILAN:
            return self.milan
        return self.genoa if product is Product.GENOA else self.turin


class MitigationRules(ProfileSection):
    """Bits of the mitigation vectors (report version 5) that must be set; 0 asks for none."""

    launch: Unsigned64 = Field(0, description="At launch.")
    current: Unsigned64 = Field(0, description="Now.")


class ChipRules(ProfileSection):
    """Which processors are let in: CHIP_ID, 64 bytes or Turin's 8, in hex."""

    allow: Annotated[tuple[ChipId, ...], Field(strict=False)] = Field((), description="Empty lets every chip in.")
    deny: Annotated[tuple[ChipId, ...], Field(strict=False)] = Field((), description="Chips with leaked keys, say.")


class ProviderRules(ProfileSection):
    """Cloud providers whose VLEK is believed."""

    csp_ids: Annotated[tuple[CspId, ...], Field(strict=False)] = Field(
        (), description='CSP_ID as certified, e.g. "CN=cc-us-east-2.amazonaws.com".'
    )


class IdBlockRules(ProfileSection):
    """The ID block: who launched the guest as what. Family, image and SVN are believed only under a pinned ID key."""

    id_keys: Annotated[tuple[Hex48, ...], Field(strict=False)] = Field((), description="ID_KEY_DIGEST, one of these.")
    author_keys: Annotated[tuple[Hex48, ...], Field(strict=False)] = Field(
        (), description="AUTHOR_KEY_DIGEST, one of these, with AUTHOR_KEY_EN."
    )
    family_id: Hex16 | None = Field(None, description="FAMILY_ID, exactly.")
    image_id: Hex16 | None = Field(None, description="IMAGE_ID, exactly.")
    minimum_guest_svn: Unsigned32 | None = Field(None, description="GUEST_SVN, at least.")


class ReferenceRules(ProfileSection):
    """Reference values: what this guest must be."""

    measurements: Annotated[tuple[Hex48, ...], Field(strict=False)] = Field(
        (), description="MEASUREMENT, one of these."
    )
    host_data: Annotated[tuple[Hex32, ...], Field(strict=False)] = Field((), description="HOST_DATA, one of these.")
    report_data: Hex64 | None = Field(None, description="REPORT_DATA, exactly.")
    report_id: Hex32 | None = Field(None, description="REPORT_ID, exactly.")
    report_id_ma: Hex32 | None = Field(None, description="REPORT_ID_MA, exactly.")


class RevocationRules(ProfileSection):
    """How fresh a revocation list must be."""

    max_age_days: Annotated[int, Field(ge=0, le=3650)] = Field(
        0, description="Days since the list was made; 0 leaves it to the list's own end."
    )


class Register(ProfileSection):
    """One register of a virtual TPM and the values that it may have."""

    number: Annotated[int, Field(ge=0, le=23)] = Field(description="Its number, 0 to 23, in the SHA-256 bank.")
    values: Annotated[tuple[Hex32, ...], Field(strict=False, min_length=1)] = Field(description="One of these.")


class VtpmRules(ProfileSection):
    """The virtual TPM of a guest under Azure's paravisor."""

    registers: Annotated[tuple[Register, ...], Field(strict=False)] = Field(
        (), description="[[vtpm.registers]] tables, each with a number and the values that it may have."
    )


def _amd_roots() -> tuple[Root, ...]:
    return tuple(Root(product=pin.product.value, spki_sha256=pin.spki_sha256) for pin in AMD_ROOTS)


class Profile(ProfileSection):
    """All rules of one verifier."""

    name: str = Field("show", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="What verdicts call this profile.")
    required: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Checks that must have been made: one that had nothing to judge by is refused."
    )
    roots: Annotated[tuple[Root, ...], Field(strict=False)] = Field(
        default_factory=_amd_roots, description="Root keys that chains may end in."
    )
    checks: Checks = Checks()
    report: ReportRules = ReportRules()
    policy: PolicyRules = PolicyRules()
    platform: PlatformRules = PlatformRules()
    tcb: TcbRules = TcbRules()
    mitigations: MitigationRules = MitigationRules()
    chips: ChipRules = ChipRules()
    providers: ProviderRules = ProviderRules()
    id_block: IdBlockRules = IdBlockRules()
    reference: ReferenceRules = ReferenceRules()
    revocation: RevocationRules = RevocationRules()
    vtpm: VtpmRules = VtpmRules()

    @model_validator(mode="after")
    def _one_world(self) -> Self:
        if not self.roots:
            raise ValueError("roots: a profile without a root can trust nothing")
        if len({root.virtual for root in self.roots}) > 1:
            raise ValueError("roots: virtual and hardware roots cannot be trusted together")
        amd = {pin.spki_sha256 for pin in AMD_ROOTS}
        if any(root.virtual and root.spki_sha256 in amd for root in self.roots):
            raise ValueError("roots: a root of AMD's cannot be marked virtual")
        if len({root.spki_sha256 for root in self.roots}) != len(self.roots):
            raise ValueError("roots: the same key twice")
        unknown = sorted(set(self.required) - set(SWITCHABLE))
        if unknown:
            raise ValueError(f"required: no such check: {', '.join(unknown)}")
        if any(not 2 <= version <= 5 for version in self.report.versions):
            raise ValueError("report.versions: 2 to 5 are known")
        return self

    @cached_property
    def pins(self) -> tuple[RootPin, ...]:
        """The roots as the chain check takes them."""
        return tuple(RootPin(Product(root.product), root.spki_sha256, root.virtual) for root in self.roots)

    @cached_property
    def severities(self) -> dict[str, Severity]:
        """The setting of each switchable check by its name."""
        return {name: getattr(self.checks, name.replace("-", "_")) for name in SWITCHABLE}

    @property
    def virtual(self) -> bool:
        """Whether this profile admits the virtual platform (and then nothing else)."""
        return self.roots[0].virtual


SWITCHABLE: tuple[str, ...] = tuple(name.replace("_", "-") for name in Checks.model_fields)
"""Names of all checks with a line in `[checks]`."""

SHOW = Profile()
"""The command's default: judges the hardware, and lists what it was given nothing to judge by."""

BROKER = Profile(
    name="broker",
    required=("measurement", "freshness", "init-data", "revocation"),
    report=ReportRules(versions=(3, 4, 5), signing_keys=("VCEK",)),
    platform=PlatformRules(alias_check="set"),
    revocation=RevocationRules(max_age_days=30),
)
"""A broker's: measurement, freshness, init-data and revocation must have been judged; no report older than version 3
(which says neither its processor nor ALIAS_CHECK); no key that is lent to a cloud provider."""


def with_virtual_roots(profile: Profile, pins: Iterable[RootPin]) -> Profile:
    """The same rules over these virtual roots instead, for a consortium on the virtual platform.

    Raises:
        MalformedProfile: no pins, or one that is not virtual.
    """
    roots = tuple(Root(product=pin.product.value, spki_sha256=pin.spki_sha256, virtual=pin.virtual) for pin in pins)
    if not roots or not all(root.virtual for root in roots):
        raise MalformedProfile("virtual roots are needed", where="profile", do="Give the virtual vendor's ARK pins.")
    document = {**profile.model_dump(by_alias=True), "roots": [root.model_dump(by_alias=True) for root in roots]}
    return check_profile(Profile, document, where=_WHERE, do=_DO)


def load_profile(text: str) -> Profile:
    """Read a profile from TOML; what it leaves out keeps the strict default.

    Raises:
        MalformedProfile: no TOML, an unknown name, a value of the wrong kind, or a contradiction, all of them named.
    """
    return read_profile(Profile, text, where=_WHERE, do=_DO)
