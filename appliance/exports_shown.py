"""What left sites, when, to whom and at what price, out of verified audit bundles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from attestation.canonical import format_time
from attestation.ledger.audit import verify_audit
from attestation.ledger.audits import holds_several, verify_audits
from attestation.ledger.entry import Entry, parse_entry
from policies.budgets import EXPORT_KIND, Amount, Export, parse_export
from policies.errors import Refused


@dataclass(frozen=True, slots=True)
class Shown:
    """One debited round, or one that was refused (`reasons`)."""

    time: datetime
    broker: str
    site: str
    owner: str
    export: Export
    spent: Amount | None
    """The owner's balance after it; None if it was refused."""
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "time": format_time(self.time),
            "broker": self.broker,
            "site": self.site,
            "owner": self.owner,
            **self.export.model_dump(mode="json"),
            "spent": None if self.spent is None else self.spent.model_dump(),
            "reasons": list(self.reasons),
        }


def exports_of(folder: Path, root: bytes, site: str | None = None) -> list[Shown]:
    """Every export in the bundles at `folder` (one, or a folder of them), by time; of one site if it is named.

    Raises Refused with every problem if the story does not hold from `root`.
    """
    several = holds_several(folder)
    found = verify_audits(folder, root) if several else verify_audit(folder, root)
    if not found.ok:
        problems = tuple(f"{problem.file}: {problem.reason}" for problem in found.problems)
        raise Refused("the audit found problems", where=str(folder), do="Read them.", reasons=problems)
    bundles = sorted(path for path in folder.iterdir() if path.is_dir()) if several else [folder]
    shown = [
        one
        for bundle in bundles
        for path in sorted((bundle / "entries").iterdir())
        for one in _exports_in(parse_entry(path.read_bytes()), bundle.name)
    ]
    return sorted((one for one in shown if site in (None, one.site)), key=lambda one: (one.time, one.broker))


def _exports_in(entry: Entry, broker: str) -> Iterator[Shown]:
    body = entry.body
    debited = entry.kind == EXPORT_KIND
    if not debited and not (entry.kind == "denial" and body.get("what") == EXPORT_KIND):
        return
    subject = body["subject"]
    spent = Amount.model_validate(body["spent"]["owner"]) if debited else None
    reasons = () if debited else tuple(body["reasons"])
    export = parse_export(body["document"])
    yield Shown(entry.time, broker, subject["name"], subject["member"], export, spent, reasons)
