"""One byte form for each JSON document that is signed or hashed: RFC 8785 (JCS), read back strictly.

A document whose bytes are not its own canonical form is refused, so that two readers can never see two documents in the
same signed bytes (doubled keys, other number forms, blanks).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import rfc8785

from policies.errors import Unusable

_PLAIN = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def canonical_bytes(value: Any) -> bytes:
    """The canonical form (RFC 8785) of `value`. Raises Unusable for what JSON or JCS cannot express."""
    try:
        if _plain(value):
            return _PLAIN.encode(value).encode("utf-8")
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeError) as error:
        raise Unusable(
            f"a value has no canonical JSON form: {error}",
            where="JSON document",
            do="Use strings, 53-bit integers, lists.",
        ) from error


def _plain(value: Any) -> bool:
    """Whether Python's own encoder, which is compiled, writes `value` in its canonical form: it does if there are no
    whole, very small or large floats (which ECMAScript writes otherwise), no integers beyond 53 bits, and no names
    outside of ASCII, whose order in UTF-16 may be another."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return bool(-(2**53) < value < 2**53)
    if kind is float:
        return bool(1e-4 <= abs(value) < 1e16 and not value.is_integer())
    if kind is dict:
        return all(type(name) is str and name.isascii() and _plain(item) for name, item in value.items())
    return (kind is list or kind is tuple) and all(_plain(item) for item in value)


def read_json_object(raw: bytes, *, where: str, limit: int) -> dict[str, Any]:
    """Read one JSON object of at most `limit` bytes, in any layout. Raises Unusable."""
    if len(raw) > limit:
        raise Unusable(f"the document has {len(raw)} bytes, more than {limit}", where=where, do="Send a smaller one.")
    try:
        value = json.loads(raw, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise Unusable(
            f"this is no JSON document: {error}", where=where, do="Send one JSON object in UTF-8."
        ) from error
    if not isinstance(value, dict):
        raise Unusable("this JSON document is no object", where=where, do="Send one JSON object.")
    return value


def read_canonical(raw: bytes, *, where: str, limit: int) -> dict[str, Any]:
    """Read one JSON object that is in its canonical form. Raises Unusable for anything else."""
    if (quick := _read_quickly(raw, limit)) is not None:
        return quick
    value = read_json_object(raw, where=where, limit=limit)
    if canonical_bytes(value) != raw:
        raise Unusable("the document is not in canonical form (RFC 8785)", where=where, do="Use it as it was made.")
    return value


def _read_quickly(raw: bytes, limit: int) -> dict[str, Any] | None:
    """The object in `raw` if it is canonical, without a look at each key: one that occurs twice is not written twice.

    None for anything else, of which `read_canonical` finds out what it is.
    """
    if len(raw) > limit:
        return None
    try:
        value = json.loads(raw)
        return value if type(value) is dict and canonical_bytes(value) == raw else None
    except (ValueError, RecursionError, Unusable):
        return None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def b64(raw: bytes) -> str:
    """Standard base64, padded."""
    return base64.b64encode(raw).decode("ascii")


def unb64(text: str, *, where: str) -> bytes:
    """Read standard, padded base64 in its one canonical form. Raises Unusable."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("this is no standard base64", where=where, do="Send padded, standard base64.") from error
    if b64(raw) != text:
        raise Unusable("this base64 is not in its canonical form", where=where, do="Send padded, standard base64.")
    return raw


def b64url(raw: bytes) -> str:
    """Base64url without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def unb64url(text: str, *, where: str) -> bytes:
    """Read base64url without padding in its one canonical form. Raises Unusable."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("this is no base64url", where=where, do="Send base64url without padding.") from error
    if b64url(raw) != text:
        raise Unusable("this base64url is not in its canonical form", where=where, do="Send base64url without padding.")
    return raw


def format_time(at: datetime) -> str:
    """RFC 3339 in UTC, whole seconds, with `Z`."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str, *, where: str) -> datetime:
    """Read what `format_time` writes. Raises Unusable."""
    if _TIME.fullmatch(text):
        try:
            return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError:
            pass  # a day or an hour that does not exist: told below with every other bad form
    raise Unusable(f"{text[:40]!r} is no time", where=where, do="Write RFC 3339 in UTC: 2026-01-31T12:00:00Z.")


def digests(keys: Mapping[str, bytes]) -> dict[str, str]:
    """Lower-case SHA-256 of each value, by name."""
    return {name: sha256(keys[name]).hexdigest() for name in sorted(keys)}
