"""A verifier's profile for GPUs: what their evidence must be like, as a document people write in TOML and sign.

Built as the SEV-SNP profile is (`attestation.verifier.profile`): a line in `[checks]` for every check that can be
switched, a section for what it compares with, every default the strict one. The checks that make evidence authentic at
all (chains, signatures, roots) have no line: `device-roots`, `rim-roots` and `nras-issuers` are their setting.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attestation.endorsements.nvidia import NVIDIA_DEVICE_ROOT, NVIDIA_RIM_ROOT
from attestation.verifier.profile_form import ProfileSection, Severity, read_profile

Mode = Literal["spt", "mpt", "ppcie", "unstated"]
Pin = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Ueid = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Model = Annotated[str, Field(pattern=r"^[A-Z0-9_]{2,16}$")]
DriverVersion = Annotated[str, Field(pattern=r"^[0-9]{1,5}(\.[0-9]{1,5}){1,3}$")]
VbiosVersion = Annotated[str, Field(pattern=r"^[0-9A-F]{2}(\.[0-9A-F]{2}){4}$")]
Board = Annotated[str, Field(pattern=r"^[A-Z0-9]{1,16}(/[A-Z0-9]{1,16}){2}$")]
Count = Annotated[int, Field(ge=0, le=64)]


class GpuChecks(ProfileSection):
    """How each check that fails is taken: refuse, warn or allow."""

    gpu_certificate_validity: Severity = "refuse"
    gpu_revocation: Severity = "refuse"
    gpu_model: Severity = "refuse"
    gpu_device: Severity = "refuse"
    gpu_fwid: Severity = "refuse"
    gpu_opaque_data: Severity = "refuse"
    gpu_measurement_format: Severity = "refuse"
    gpu_document: Severity = "refuse"
    gpu_freshness: Severity = "refuse"
    gpu_driver_version: Severity = "refuse"
    gpu_vbios_version: Severity = "refuse"
    gpu_board: Severity = "refuse"
    gpu_mode: Severity = "refuse"
    gpu_switch_lock: Severity = "refuse"
    gpu_devtools: Severity = "refuse"
    gpu_driver_measurements: Severity = "refuse"
    gpu_vbios_measurements: Severity = "refuse"
    rim_overlap: Severity = "refuse"
    rim_validity: Severity = "refuse"
    rim_revocation: Severity = "refuse"
    gpu_distinct_devices: Severity = "refuse"
    gpu_same_session: Severity = "refuse"
    gpu_same_mode: Severity = "refuse"
    gpu_topology: Severity = "refuse"
    gpu_count: Severity = "refuse"


class DeviceRules(ProfileSection):
    """Which devices are let in."""

    models: Annotated[tuple[Model, ...], Field(strict=False)] = Field(
        ("GH100", "LS_10"), description="Chips, by their certificate: the ones whose evidence is known here."
    )
    boards: Annotated[tuple[Board, ...], Field(strict=False)] = Field(
        (), description='PROJECT/PROJECT_SKU/CHIP_SKU, e.g. "G520/0200/885"; empty lets every board in.'
    )
    allow: Annotated[tuple[Ueid, ...], Field(strict=False)] = Field((), description="By unique id; empty lets all in.")
    deny: Annotated[tuple[Ueid, ...], Field(strict=False)] = Field((), description="Devices with leaked keys, say.")
    modes: Annotated[tuple[Mode, ...], Field(strict=False)] = Field(
        ("spt", "mpt", "ppcie", "unstated"),
        description="Single GPU, several with encrypted links, several with plain links to switches (which must then "
        "be attested with them), or drivers from before a report said it.",
    )
    opaque_fields: Literal["known", "any"] = Field(
        "known", description="Whether a report may hold opaque fields whose meaning is not known here."
    )
    gpus: Count | None = Field(None, description="How many GPUs must be there; left out, any number.")
    switches: Count | None = Field(None, description="How many switches must be there; left out, any number.")


class VersionRules(ProfileSection):
    """Which driver and VBIOS may run. Lists that are empty let every version in."""

    drivers: Annotated[tuple[DriverVersion, ...], Field(strict=False)] = Field((), description="Driver, one of these.")
    minimum_driver: DriverVersion | None = Field(None, description="Driver, at least.")
    vbioses: Annotated[tuple[VbiosVersion, ...], Field(strict=False)] = Field((), description="VBIOS, one of these.")
    minimum_vbios: VbiosVersion | None = Field(None, description="VBIOS, at least.")


class GpuRevocationRules(ProfileSection):
    """How fresh revocation data must be, and what a hold is worth."""

    max_age_days: Annotated[int, Field(ge=0, le=3650)] = Field(
        0, description="Days since it was made; 0 leaves it to the data's own end."
    )
    hold: Literal["refuse", "allow"] = Field("refuse", description="A certificate that is on hold.")


class NrasRules(ProfileSection):
    """Tokens of NVIDIA's remote attestation service, the second way."""

    issuers: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        ("https://nras.attestation.nvidia.com",), description="Whose tokens count (`iss`)."
    )
    max_age_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(3600, description="Since a token was issued.")


class GpuProfile(ProfileSection):
    """All rules for GPUs and switches."""

    name: str = Field(
        "show-gpu", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="What verdicts call this profile."
    )
    required: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Checks that must have been made: one that had nothing to judge by is refused."
    )
    device_roots: Annotated[tuple[Pin, ...], Field(strict=False, min_length=1)] = Field(
        (NVIDIA_DEVICE_ROOT,), description="SHA-256 of the keys (SPKI) that device chains may end in."
    )
    rim_roots: Annotated[tuple[Pin, ...], Field(strict=False, min_length=1)] = Field(
        (NVIDIA_RIM_ROOT,), description="SHA-256 of the keys (SPKI) that signers of reference manifests may end in."
    )
    manifests: Annotated[tuple[Pin, ...], Field(strict=False)] = Field(
        (),
        description="SHA-256 of the manifests' files that count; empty lets all count that a root above vouches for.",
    )
    checks: GpuChecks = GpuChecks()
    devices: DeviceRules = DeviceRules()
    versions: VersionRules = VersionRules()
    revocation: GpuRevocationRules = GpuRevocationRules()
    nras: NrasRules = NrasRules()

    @model_validator(mode="after")
    def _known_checks(self) -> Self:
        unknown = sorted(set(self.required) - set(SWITCHABLE))
        if unknown:
            raise ValueError(f"required: no such check: {', '.join(unknown)}")
        return self

    def severity(self, name: str) -> Severity:
        """How a failure of this check is taken; a check without a line is always refused."""
        severity: Severity = getattr(self.checks, name.replace("-", "_"), "refuse")
        return severity


SWITCHABLE: tuple[str, ...] = tuple(name.replace("_", "-") for name in GpuChecks.model_fields)
"""Names of all checks with a line in `[checks]`."""

SHOW_GPU = GpuProfile()
"""The command's default: judges the device, and lists what it was given nothing to judge by."""

BROKER_GPU = GpuProfile(
    name="broker-gpu",
    required=(
        "gpu-freshness",
        "gpu-driver-measurements",
        "gpu-vbios-measurements",
        "gpu-devtools",
        "gpu-revocation",
        "rim-revocation",
        "gpu-topology",
    ),
    revocation=GpuRevocationRules(max_age_days=30),
)
"""A broker's: freshness, measurements, revocation and (where links are plain) topology must have been judged."""


def load_gpu_profile(text: str) -> GpuProfile:
    """Read a profile from TOML; what it leaves out keeps the strict default.

    Raises:
        MalformedProfile: no TOML, an unknown name, or a value of the wrong kind, all of them named.
    """
    return read_profile(GpuProfile, text, where="GPU profile", do="docs/reference/gpu-evidence.md lists all settings.")
