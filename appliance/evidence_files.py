"""Evidence as it lies in files: which kind it is, and what vouches for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attestation.endorsements.chain import Endorsements
from attestation.endorsements.sources import from_certificate_table, from_files, read_bounded
from attestation.errors import MalformedEvidence
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import REPORT_SIZE
from policies.errors import Unusable

MAX_EVIDENCE_SIZE = 4 << 20


@dataclass(frozen=True, slots=True)
class SnpFile:
    """An SEV-SNP report with its endorsements, as the files and options gave them."""

    report: bytes
    endorsements: Endorsements


def read_evidence(path: Path, *, vek: Path | None, chain: Path | None, crls: Sequence[Path]) -> SnpFile:
    """Read evidence and what vouches for it; a VEK given by file goes before one that the evidence brings.

    Raises:
        Unusable: a file is missing, a directory, empty, too large, or not what it was given for.
    """
    raw = read_bounded(path, MAX_EVIDENCE_SIZE, "evidence file")
    evidence = _read_snp(raw, path)
    given = from_files(vek=vek, chain=chain, crls=crls)
    try:
        brought = from_certificate_table(evidence.certificates, intermediates=given.intermediates, crls=given.crls)
    except MalformedEvidence as error:
        raise MalformedEvidence(error.what, where=f"{path}, {error.where}", do=error.do) from error
    return SnpFile(evidence.report, brought if given.vek is None else replace(brought, vek=given.vek))


def _read_snp(raw: bytes, path: Path) -> SnpEvidence:
    if not raw:
        raise Unusable("the evidence file is empty", where=str(path), do="Write the report again.")
    if len(raw) == REPORT_SIZE:
        return SnpEvidence(report=raw)
    if raw.lstrip()[:1] == b"{":
        return _read_json(raw, path)
    raise MalformedEvidence(
        f"this is no evidence: an SEV-SNP report has {REPORT_SIZE} bytes, this file has {len(raw)}",
        where=str(path),
        do="Give the raw report, or evidence in JSON.",
    )


def _read_json(raw: bytes, path: Path) -> SnpEvidence:
    from attestation.evidence.guest_components_json import parse_guest_components

    try:
        document: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MalformedEvidence("this is no JSON", where=str(path), do="Give evidence in JSON, or a report.") from error
    if not isinstance(document, dict) or "attestation_report" not in document:
        raise MalformedEvidence(
            "this JSON holds no evidence of a known kind", where=str(path), do="Give it as guest-components sends it."
        )
    try:
        return parse_guest_components(document)
    except MalformedEvidence as error:
        raise MalformedEvidence(error.what, where=f"{path}, {error.where}", do=error.do) from error
