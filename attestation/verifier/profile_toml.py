"""A profile as the TOML that people edit: every setting there, each with what it means."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from attestation.verifier.profile import Checks, Profile, TcbFloor
from attestation.verifier.profile_form import ProfileSection, check_lines, is_tables, scalar_lines
from attestation.verifier.snp import ORDERED

_HEAD = """\
# Verifier profile. What is left out keeps the strict default; an unknown name is refused.
# Checks that make evidence authentic at all (report-signature, vek-profile, vek-extensions, chain-signatures,
# chain-profile, trusted-root) cannot be turned off: `roots` says whom they trust.
"""
_WIDTH = 45


def profile_to_toml(profile: Profile, *, comments: bool = True) -> str:
    """The whole profile in TOML; `load_profile` reads it back to an equal one."""
    lines = [_HEAD] if comments else []
    lines += _scalars(profile, comments)
    lines.append("")
    if comments:
        lines.append(
            "# How a check that fails is taken: refuse, warn (the verdict is `warning`), or allow (it is not made)."
        )
    lines += ["[checks]", *check_lines(profile.checks, ORDERED, _WIDTH, comments=comments)]
    for root in profile.roots:
        lines += ["", "[[roots]]", *_scalars(root, comments)]
    for name, field in Profile.model_fields.items():
        section = getattr(profile, name)
        if isinstance(section, ProfileSection) and not isinstance(section, Checks):
            lines += _section(field.alias or name, section, comments)
    return "\n".join(lines) + "\n"


def _section(name: str, section: BaseModel, comments: bool) -> Iterator[str]:
    scalars = list(_scalars(section, comments))
    if scalars:
        yield ""
        if comments and section.__doc__:
            yield f"# {' '.join(section.__doc__.split())}"
        yield f"[{name}]"
        yield from scalars
    for inner, field in type(section).model_fields.items():
        value = getattr(section, inner)
        if isinstance(value, BaseModel):
            yield from _section(f"{name}.{field.alias or inner}", value, comments)
        elif is_tables(value):
            for table in value:
                yield from ("", f"[[{name}.{field.alias or inner}]]", *_scalars(table, comments))


def _scalars(section: BaseModel, comments: bool) -> Iterator[str]:
    examples = {field.alias or name: _example(field.annotation) for name, field in type(section).model_fields.items()}
    return scalar_lines(section, examples, comments=comments)


def _example(annotation: object) -> str:
    """How a setting that is left out would be written."""
    kinds = getattr(annotation, "__args__", ())
    if TcbFloor in kinds:
        return "{ bootloader = 0, tee = 0, snp = 0, microcode = 0 }"
    return '"..."' if str in (getattr(kind, "__origin__", kind) for kind in kinds) else "0"
