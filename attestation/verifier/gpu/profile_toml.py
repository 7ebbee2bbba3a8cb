"""A GPU profile as the TOML that people edit: every setting there, each with what it means."""

from __future__ import annotations

from pydantic import BaseModel

from attestation.verifier.gpu.profile import GpuChecks, GpuProfile
from attestation.verifier.gpu.verify import ALWAYS, ORDERED
from attestation.verifier.profile_form import check_lines, scalar_lines

_EXAMPLES = {"gpus": "8", "switches": "4", "minimum-driver": '"570.86.15"', "minimum-vbios": '"96.00.9F.00.01"'}
_WIDTH = 38


def gpu_profile_to_toml(profile: GpuProfile, *, section: str = "") -> str:
    """The whole profile in TOML, commented; `load_gpu_profile` reads it back to an equal one.

    With a `section`, its tables stand under that name: so an appraisal policy holds it beside the CPU's rules.
    """
    always = [one.name for one in ORDERED if one.name in ALWAYS]
    prefix = f"{section}." if section else ""
    lines = [
        "# Verifier profile for GPUs and switches. What is left out keeps the strict default.",
        f"# Always made: {', '.join(always[:5])},",
        f"# {', '.join(always[5:])}.",
        "",
        *([f"[{section}]"] if section else []),
        *scalar_lines(profile, _EXAMPLES, comments=True),
        "",
        "# How a check that fails is taken: refuse, warn (the verdict is `warning`), or allow (it is not made).",
        f"[{prefix}checks]",
        *check_lines(profile.checks, ORDERED, _WIDTH, comments=True),
    ]
    for name, field in GpuProfile.model_fields.items():
        table = getattr(profile, name)
        if isinstance(table, BaseModel) and not isinstance(table, GpuChecks):
            lines += [
                "",
                f"# {' '.join((table.__doc__ or '').split())}",
                f"[{prefix}{field.alias or name}]",
                *scalar_lines(table, _EXAMPLES, comments=True),
            ]
    return "\n".join(lines) + "\n"
