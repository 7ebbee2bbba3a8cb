"""A GPU profile as the TOML that people edit: every setting there, each with what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel

from attestation.verifier.gpu.profile import GpuChecks, GpuProfile
from attestation.verifier.gpu.verify import ALWAYS, ORDERED

_EXAMPLES = {"gpus": "8", "switches": "4", "minimum-driver": '"570.86.15"', "minimum-vbios": '"96.00.9F.00.01"'}


def gpu_profile_to_toml(profile: GpuProfile) -> str:
    """The whole profile in TOML, commented; `load_gpu_profile` reads it back to an equal one."""
    always = [one.name for one in ORDERED if one.name in ALWAYS]
    lines = [
        "# Verifier profile for GPUs and switches. What is left out keeps the strict default.",
        f"# Always made: {', '.join(always[:5])},",
        f"# {', '.join(always[5:])}.",
        "",
        *_scalars(profile),
        "",
        "# How a check that fails is taken: refuse, warn (the verdict is `warning`), or allow (it is not made).",
        "[checks]",
    ]
    for one in ORDERED:
        if one.name not in ALWAYS:
            setting = f"{one.name} = {json.dumps(profile.severity(one.name))}"
            lines.append(f"{setting:<38} # {' '.join(one.rule.split(chr(10) * 2)[0].split())}")
    for name, field in GpuProfile.model_fields.items():
        section = getattr(profile, name)
        if isinstance(section, BaseModel) and not isinstance(section, GpuChecks):
            lines += [
                "",
                f"# {' '.join((section.__doc__ or '').split())}",
                f"[{field.alias or name}]",
                *_scalars(section),
            ]
    return "\n".join(lines) + "\n"


def _scalars(section: BaseModel) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), field.alias or name
        comment = f"  # {field.description}" if field.description else ""
        if value is None:
            yield f"# {key} = {_EXAMPLES[key]}{comment}"
        elif not isinstance(value, BaseModel):
            # JSON's strings, numbers and lists of them are TOML's.
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}{comment}"
