"""Checking the ledgers of several brokers side by side: a folder with a bundle for each, by the broker's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from attestation.ledger.audit import AuditReport, Problem, verify_audit
from attestation.ledger.bundle import CHECKPOINT
from policies.errors import Unusable

MAX_LEDGERS: Final = 64


@dataclass(frozen=True, slots=True)
class LedgersReport:
    """What an audit of several ledgers found: each one's report by its folder, and what is wrong beside them."""

    ledgers: Mapping[str, AuditReport]
    beside: tuple[Problem, ...]
    charter: str

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong, files named from the folder that was audited."""
        inside = (
            Problem(f"{name}/{problem.file}", problem.reason)
            for name, report in self.ledgers.items()
            for problem in report.problems
        )
        return (*self.beside, *inside)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong in any of them."""
        return not self.problems

    @property
    def entries(self) -> int:
        """Entries of all ledgers."""
        return sum(report.entries for report in self.ledgers.values())

    def to_json(self) -> dict[str, Any]:
        """As `seal audit verify --json` prints it."""
        kinds: Counter[str] = Counter()
        for report in self.ledgers.values():
            kinds.update(report.kinds)
        return {
            "status": "affirming" if self.ok else "contraindicated",
            "problems": [{"file": problem.file, "reason": problem.reason} for problem in self.problems],
            "charter": {"id": self.charter},
            "entries": self.entries,
            "kinds": dict(kinds),
            "ledgers": {name: report.to_json() for name, report in self.ledgers.items()},
        }


def holds_several(folder: Path) -> bool:
    """Whether `folder` is a folder of bundles and no bundle itself."""
    if (folder / CHECKPOINT).exists() or not folder.is_dir():
        return False
    return any((one / CHECKPOINT).exists() for one in folder.iterdir())


def verify_audits(folder: Path, root: bytes) -> LedgersReport:
    """Check every bundle in `folder` from the charter's first root (bytes of 1.root.json).

    Each stands in a folder with its broker's name; nothing else may be there. Raises Unusable for more than
    MAX_LEDGERS.
    """
    found = sorted(folder.iterdir())
    if len(found) > MAX_LEDGERS:
        raise Unusable(f"more than {MAX_LEDGERS} ledgers", where=str(folder), do="Audit them one by one.")
    ledgers: dict[str, AuditReport] = {}
    beside: list[Problem] = []
    for path in found:
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            beside.append(Problem(path.name, "it is foreign: no ledger's bundle"))
            continue
        report = ledgers[path.name] = verify_audit(path, root)
        if report.broker is not None and report.broker != path.name:
            beside.append(Problem(path.name, f"it holds the ledger of broker {report.broker}"))
    return LedgersReport(ledgers, tuple(beside), sha256(root).hexdigest())
