"""Evidence as it lies in files: which kind it is, and what vouches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from attestation.canonical import read_json_object
from attestation.endorsements.chain import Endorsements
from attestation.endorsements.sources import from_certificate_table, from_files, read_bounded
from attestation.errors import MalformedEvidence, MalformedProfile
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.hcl import MAGIC, HclEvidence, parse_hcl_report
from attestation.evidence.report import REPORT_SIZE, parse_report
from attestation.verifier import Appraisal, Expected, Profile, verify_hcl, verify_snp
from attestation.verifier.profile_form import MAX_PROFILE_SIZE, ProfileSection
from policies.errors import Unusable

MAX_EVIDENCE_SIZE = 4 << 20

P = TypeVar("P", bound=ProfileSection)


@dataclass(frozen=True, slots=True)
class SnpFile:
    """An SEV-SNP report with its endorsements, as the files and options gave them; `hcl` is Azure's wrapper, if any."""

    report: bytes
    endorsements: Endorsements
    hcl: HclEvidence | None = None

    def appraise(self, profile: Profile, expected: Expected, at: datetime) -> Appraisal:
        """The verifier's appraisal of it."""
        if self.hcl is not None:
            return verify_hcl(self.hcl, self.endorsements, profile, expected, at)
        return verify_snp(self.report, self.endorsements, profile, expected, at)


def read_evidence(
    path: Path, *, vek: Path | None, chain: Path | None, crls: Sequence[Path], cache: Path | None = None
) -> SnpFile:
    """Read evidence and what vouches for it; a VEK given by file goes before one that the evidence brings.

    What is missing then is looked for in the folder `cache` (`seal evidence preload`).

    Raises:
        Unusable: a file is missing, a directory, empty, too large, or not what it was given for.
    """
    raw = read_bounded(path, MAX_EVIDENCE_SIZE, "evidence file")
    given = from_files(vek=vek, chain=chain, crls=crls)
    try:
        evidence = _read_snp(raw)
        if isinstance(evidence, HclEvidence):
            found = given if given.vek is not None else replace(given, vek=evidence.vek)
            return SnpFile(evidence.hcl.report, _from_cache(found, evidence.hcl.report, cache), evidence)
        brought = from_certificate_table(evidence.certificates, intermediates=given.intermediates, crls=given.crls)
    except MalformedEvidence as error:
        where = str(path) if error.where == "evidence" else f"{path}: {error.where}"
        raise MalformedEvidence(error.what, where=where, do=error.do) from error
    found = brought if given.vek is None else replace(brought, vek=given.vek)
    return SnpFile(evidence.report, _from_cache(found, evidence.report, cache))


def _from_cache(endorsements: Endorsements, report: bytes, cache: Path | None) -> Endorsements:
    if cache is None:
        return endorsements
    from attestation.endorsements.kds import complete
    from attestation.endorsements.kds_cache import KdsCache

    return complete(endorsements, parse_report(report, strict=False), KdsCache(cache))


def read_profile_file(path: Path, load: Callable[[str], P]) -> P:
    """The verifier's profile in a file, as `load` reads its text. Raises MalformedProfile, which names the file."""
    raw = read_bounded(path, MAX_PROFILE_SIZE, "policy file")
    try:
        return load(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedProfile(
            "the policy file is no text in UTF-8", where=str(path), do="Write it in TOML."
        ) from error
    except MalformedProfile as error:
        raise MalformedProfile(error.what, where=str(path), do=error.do) from error


def _read_snp(raw: bytes) -> SnpEvidence | HclEvidence:
    if not raw:
        raise MalformedEvidence("the evidence file is empty", where="evidence", do="Write the report again.")
    if len(raw) == REPORT_SIZE:
        return SnpEvidence(report=raw)
    if raw.startswith(MAGIC):
        return HclEvidence(parse_hcl_report(raw))
    if raw.lstrip()[:1] == b"{":
        return _read_json(raw)
    raise MalformedEvidence(
        f"this is no evidence: an SEV-SNP report has {REPORT_SIZE} bytes, this file has {len(raw)}",
        where="evidence",
        do="Give the raw report, or evidence in JSON.",
    )


def _read_json(raw: bytes) -> SnpEvidence | HclEvidence:
    try:
        document = read_json_object(raw, where="evidence", limit=MAX_EVIDENCE_SIZE)
    except Unusable as error:
        raise MalformedEvidence(error.what, where=error.where, do="Give evidence in JSON, or a report.") from error
    if "attestation_report" in document:
        from attestation.evidence.guest_components_json import parse_guest_components

        return parse_guest_components(document)
    if {"hcl_report", "quote"} & document.keys():
        from attestation.evidence.azure_json import parse_azure_evidence

        return parse_azure_evidence(document)
    raise MalformedEvidence(
        "this JSON holds no evidence of a known kind", where="evidence", do="Give it as the attester sent it."
    )
