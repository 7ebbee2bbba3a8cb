"""What people write: a consortium in TOML, with keys in files beside it, and documents in TOML or JSON."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any, Final

from policies.charter.layout import json_target, role_of
from policies.documents import RIGHTS_SETS, Consortium, Right, User, from_table
from policies.errors import MalformedDocument

PLAN: Final = "deployment"
_FILE: Final = "_file"
_DO: Final = "Correct the file; docs/reference/charter.md lists its fields."


def read_consortium(raw: bytes, where: str, read: Callable[[str], bytes]) -> Consortium:
    """Return the consortium in the TOML `raw`.

    Any key or certificate may stand in a file of its own: `public_key_file = "acme.pub"` instead of `public_key`. A
    broker may stand in the file that `seal broker init` made: `entry_file = "broker/entry.json"` and nothing else.
    `read` returns a file's content. The table PLAN (where hosts stand, for `seal charter kit`) is nothing that members
    sign, and is passed over. Raises MalformedDocument for whatever does not fit.
    """
    table = _table(raw, where)
    table.pop(PLAN, None)
    return from_table(Consortium, _with_files(table, where, read), where)


def _table(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedDocument(f"not valid TOML: {error}", where=where, do=_DO) from error


def _with_files(table: dict[str, Any], where: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """The table with every `NAME_file` replaced by `NAME` = that file's text, at any depth."""
    filled: dict[str, Any] = {}
    if set(table) == {"entry_file"} and isinstance(table["entry_file"], str):
        return _object(read(table["entry_file"]), table["entry_file"])
    for name, value in table.items():
        if isinstance(value, dict):
            filled[name] = _with_files(value, where, read)
        elif isinstance(value, list):
            filled[name] = [_with_files(item, where, read) if isinstance(item, dict) else item for item in value]
        elif name.endswith(_FILE) and isinstance(value, str):
            plain = name.removesuffix(_FILE)
            if plain in table:
                raise MalformedDocument(f"both {plain} and {name} are given", where=where, do=_DO)
            try:
                filled[plain] = read(value).decode("ascii")
            except UnicodeDecodeError as error:
                raise MalformedDocument(f"{value} is not PEM", where=where, do=_DO) from error
        else:
            filled[name] = value
    return filled


def written_target(path: str, raw: bytes, where: str, read: Callable[[str], bytes] | None = None) -> bytes:
    """Return what stands at the target `path` when a person wrote `raw`: documents in canonical form, others as is.

    A document may be written as TOML (a file that ends in .toml) or as JSON in any form; what the path says may be left
    out, and a user's `rights` may be the name of a ready-made set. With `read`, which returns a file's content, a key
    in TOML may stand in a file of its own: `signing_key_file = "phones.pub"`. Raises MalformedDocument if it is not
    what `path` demands, or if nothing of a charter stands at `path`.
    """
    if role_of(path) is None:
        raise MalformedDocument(f"no file of a charter stands at {path}", where=where, do=_DO)
    target = json_target(path)
    if target is None:
        return raw
    kind, words = target
    table = _table(raw, where) if where.endswith(".toml") else _object(raw, where)
    if read is not None and where.endswith(".toml"):
        table = _with_files(table, where, read)
    if kind is User and isinstance(table.get("rights"), str):
        table["rights"] = _rights(table["rights"], where)
    return from_table(kind, {**words, **table}, where).to_bytes()


def _rights(name: str, where: str) -> tuple[Right, ...]:
    """The rights of a ready-made set."""
    if name not in RIGHTS_SETS:
        raise MalformedDocument(f"{name!r} is none of {', '.join(RIGHTS_SETS)}", where=where, do=_DO)
    return RIGHTS_SETS[name]


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise MalformedDocument(f"not valid JSON: {error}", where=where, do=_DO) from error
    if not isinstance(table, dict):
        raise MalformedDocument("not an object", where=where, do=_DO)
    return table
