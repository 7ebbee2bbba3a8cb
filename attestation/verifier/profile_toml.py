"""A profile as the TOML that people edit: every setting there, each with what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel

from attestation.verifier.profile import Checks, Profile, ProfileSection, TcbFloor
from attestation.verifier.snp import ORDERED

_HEAD = """\
# Verifier profile. What is left out keeps the strict default; an unknown name is refused.
# Checks that make evidence authentic at all (report-signature, vek-profile, vek-extensions, chain-signatures,
# chain-profile, trusted-root) cannot be turned off: `roots` says whom they trust.
"""


def profile_to_toml(profile: Profile, *, comments: bool = True) -> str:
    """The whole profile in TOML; `load_profile` reads it back to an equal one."""
    lines = [_HEAD] if comments else []
    lines += _scalars(profile, comments)
    lines += _check_lines(profile.checks, comments)
    for root in profile.roots:
        lines += ["", "[[roots]]", *_scalars(root, comments)]
    for name, field in Profile.model_fields.items():
        section = getattr(profile, name)
        if isinstance(section, ProfileSection) and not isinstance(section, Checks):
            lines += _section(field.alias or name, section, comments)
    return "\n".join(lines) + "\n"


def _check_lines(checks: Checks, comments: bool) -> Iterator[str]:
    """Every switchable check in the order in which they are made, with its rule."""
    yield ""
    if comments:
        yield "# How a check that fails is taken: refuse, warn (the verdict is `warning`), or allow (it is not made)."
    yield "[checks]"
    for one in ORDERED:
        name = one.name.replace("-", "_")
        if name in Checks.model_fields:
            setting = f"{one.name} = {json.dumps(getattr(checks, name))}"
            rule = " ".join(one.rule.split("\n\n")[0].split())
            yield f"{setting:<45} # {rule}" if comments else setting


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
        elif _is_tables(value):
            for table in value:
                yield from ("", f"[[{name}.{field.alias or inner}]]", *_scalars(table, comments))


def _scalars(section: BaseModel, comments: bool) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        key = field.alias or name
        nested = isinstance(value, BaseModel) or (
            isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
        )
        if nested:
            continue
        comment = f"  # {field.description}" if comments and field.description else ""
        if value is not None:
            yield f"{key} = {_value(value)}{comment}"
        elif comments:
            yield f"# {key} = {_example(field.annotation)}{comment}"


def _is_tables(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], BaseModel)


def _example(annotation: object) -> str:
    """How a setting that is left out would be written."""
    kinds = getattr(annotation, "__args__", ())
    if TcbFloor in kinds:
        return "{ bootloader = 0, tee = 0, snp = 0, microcode = 0 }"
    return '"..."' if str in (getattr(kind, "__origin__", kind) for kind in kinds) else "0"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"a profile holds no {type(value).__name__}")
