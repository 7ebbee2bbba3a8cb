"""The form of a verifier's profile, whatever evidence it is for: strict tables with kebab-case names, read and written.

`attestation.verifier.profile` has the rules for SEV-SNP, `attestation.verifier.gpu.profile` those for GPUs.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from attestation.errors import MalformedProfile

MAX_PROFILE_SIZE: Final = 1 << 20

Severity = Literal["refuse", "warn", "allow"]
"""`refuse`: a failure makes the evidence contraindicated. `warn`: a warning. `allow`: the check is not made."""


class ProfileSection(BaseModel):
    """A table of a profile: kebab-case names, nothing unknown, frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


class NamedCheck(Protocol):
    """A check, as far as a profile's writer needs it."""

    @property
    def name(self) -> str:
        """Its name, with hyphens."""

    @property
    def rule(self) -> str:
        """What it demands, and the attack that it stops."""


P = TypeVar("P", bound=ProfileSection)


def read_profile(kind: type[P], text: str, *, where: str, do: str) -> P:
    """The profile of `kind` in the TOML `text`; what it leaves out keeps its default.

    Raises MalformedProfile: no TOML, an unknown name, a value of the wrong kind, a contradiction; all of them named.
    """
    return check_profile(kind, read_toml(text, where=where, do=do), where=where, do=do)


def read_toml(text: str, *, where: str, do: str) -> dict[str, Any]:
    """The tables in `text`, unchecked. Raises MalformedProfile."""
    if len(text) > MAX_PROFILE_SIZE:
        raise MalformedProfile(f"more than {MAX_PROFILE_SIZE} characters", where=where, do="Check the file.")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedProfile(f"this is no TOML: {error}", where=where, do=do) from error


def check_profile(kind: type[P], document: Mapping[str, Any], *, where: str, do: str) -> P:
    """The profile of `kind` in tables. Raises MalformedProfile, every fault named."""
    try:
        return kind.model_validate(dict(document))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'profile'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()[:10]
        )
        raise MalformedProfile(faults, where=where, do=do) from error


def check_lines(checks: BaseModel, ordered: Iterable[NamedCheck], width: int, *, comments: bool) -> Iterator[str]:
    """A line for every check that can be switched, in the order in which they are made, with its rule."""
    for one in ordered:
        name = one.name.replace("-", "_")
        if name in type(checks).model_fields:
            setting = f"{one.name} = {json.dumps(getattr(checks, name))}"
            rule = " ".join(one.rule.split("\n\n")[0].split())
            yield f"{setting:<{width}} # {rule}" if comments else setting


def scalar_lines(section: BaseModel, examples: Mapping[str, str], *, comments: bool) -> Iterator[str]:
    """A line for every setting of a table that is no table; one without a value is shown by its example."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), field.alias or name
        if isinstance(value, BaseModel) or is_tables(value):
            continue
        comment = f"  # {field.description}" if comments and field.description else ""
        if value is not None:
            yield f"{key} = {toml_value(value)}{comment}"
        elif comments:
            yield f"# {key} = {examples.get(key, '0')}{comment}"


def is_tables(value: object) -> bool:
    """Whether a setting is a list of tables."""
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], BaseModel)


def toml_value(value: object) -> str:
    """A value as TOML. Strings, numbers and lists of them are JSON's."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, bool | int | str):
        return json.dumps(value)
    raise TypeError(f"a profile holds no {type(value).__name__}")
