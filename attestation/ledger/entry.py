"""Ledger entries: what is written down of each decision, in one canonical form.

An entry is the canonical JSON of `{"kind", "time", "body"}`; these bytes are the tree's leaf. What is too large for an
entry (evidence, init-data, EARs, charter files) is a blob, named in the body by its SHA-256.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from attestation.canonical import canonical_bytes, format_time, parse_time, read_canonical
from policies.errors import Unusable

MAX_ENTRY: Final = 128 * 1024
"""Bytes of the largest entry."""
BROKER_KINDS: Final = frozenset(
    {"charter", "appraisal", "denial", "credential", "release", "deposit", "vault", "cold-start"}
)
"""Kinds that only a broker's own decisions have; guests record the others (`job`, `result`, `export`, …)."""

_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was decided or done. `time` is in whole seconds, UTC; `body` is JSON-able."""

    kind: str
    time: datetime
    body: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The canonical bytes: the tree's leaf. Raises Unusable for a kind, a size or values that no entry has."""
        raw = canonical_bytes({"body": dict(self.body), "kind": self.kind, "time": format_time(self.time)})
        if not is_kind(self.kind) or len(raw) > MAX_ENTRY:
            raise Unusable(
                f"an entry of kind {self.kind[:40]!r} with {len(raw)} bytes is refused",
                where="ledger entry",
                do=f"Use a lower-case word as its kind and at most {MAX_ENTRY} bytes.",
            )
        return raw


def is_kind(word: str) -> bool:
    """Whether `word` can be an entry's kind: lower-case letters, digits, hyphens."""
    return _KIND.fullmatch(word) is not None


def parse_entry(raw: bytes) -> Entry:
    """Read an entry's bytes. Raises Unusable for anything that `Entry.to_bytes` does not write."""
    value = read_canonical(raw, where="ledger entry", limit=MAX_ENTRY)
    kind, time, body = value.get("kind"), value.get("time"), value.get("body")
    known = set(value) == {"kind", "time", "body"}
    if (
        not known
        or not isinstance(kind, str)
        or not is_kind(kind)
        or not isinstance(time, str)
        or not isinstance(body, dict)
    ):
        raise Unusable("this is no ledger entry", where="ledger entry", do="Take entries as the broker made them.")
    return Entry(kind, parse_time(time, where="ledger entry"), body)
