"""A consortium's appraisal policy: `policies/appraisal.toml`, the rules for CPUs and, in `[gpu]`, for further devices.

Without the file the strict built-in profile holds for CPUs. Devices have no such default: a charter that does not say
which of them it accepts accepts none, since no list of drivers stays right by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from attestation.errors import MalformedProfile
from attestation.verifier.gpu.profile import BROKER_GPU, GpuProfile
from attestation.verifier.profile import BROKER, Profile
from attestation.verifier.profile_form import check_profile, read_toml

FILE: Final = "policies/appraisal.toml"
SECTION: Final = "gpu"
NO_GPU_SECTION: Final = (
    f"the charter's appraisal policy ({FILE}) has no section [{SECTION}], which says whose GPUs and which drivers are "
    "accepted, so evidence of further devices is refused"
)
_DO: Final = "Correct the charter's appraisal policy; `seal evidence policy` prints one to start from."


@dataclass(frozen=True, slots=True)
class AppraisalPolicy:
    """The rules for CPUs, and those for GPUs and switches (None: no such device is accepted)."""

    cpu: Profile
    gpu: GpuProfile | None


@lru_cache(maxsize=16)
def load_appraisal_policy(text: str | None) -> AppraisalPolicy:
    """Read `policies/appraisal.toml`; None stands for a charter without it.

    What `[gpu]` leaves out is as in the ready-made `broker-gpu`, which demands every judgement; the driver's versions
    must be said. A file about GPUs alone leaves the rules for CPUs as they are built in. Raises MalformedProfile.
    """
    if text is None:
        return AppraisalPolicy(BROKER, None)
    tables = read_toml(text, where=FILE, do=_DO)
    section = tables.pop(SECTION, None)
    cpu = BROKER if not tables and section is not None else check_profile(Profile, tables, where=FILE, do=_DO)
    return AppraisalPolicy(cpu, None if section is None else _gpu(section))


def _gpu(section: object) -> GpuProfile:
    if not isinstance(section, dict):
        raise MalformedProfile(f"{SECTION}: must be a table", where=FILE, do=_DO)
    profile = check_profile(GpuProfile, _over(BROKER_GPU.model_dump(by_alias=True), section), where=FILE, do=_DO)
    if not profile.versions.drivers and profile.versions.minimum_driver is None:
        raise MalformedProfile(
            f"{SECTION}.versions: it names neither drivers nor a minimum-driver, so any driver would do",
            where=FILE,
            do=_DO,
        )
    return profile


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with what `above` says instead, table by table."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
