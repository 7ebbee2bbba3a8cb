"""Which kind of GPU evidence some bytes are, by how they begin. Light to import: each command asks it first."""

from __future__ import annotations

_HEAD = 1 << 20
_BLANKS = 256
_DOCUMENT_FIELDS = (b'"certificate"', b'"evidences"', b'"device_evidence_list"')


def looks_like_gpu_report(raw: bytes) -> bool:
    """Whether these bytes begin as SPDM 1.1 GET_MEASUREMENTS (and no SEV-SNP report does)."""
    return raw[:2] == b"\x11\xe0"


def looks_like_nras_bundle(raw: bytes) -> bool:
    """Whether these bytes begin as an array in a JSON array, as an NRAS bundle and no other evidence does."""
    return raw[:_BLANKS].lstrip()[:1] == b"[" and raw[:_BLANKS].lstrip()[1:].lstrip()[:1] != b"{"


def is_gpu_evidence(raw: bytes) -> bool:
    """Whether these bytes are taken for GPU evidence: a report, an evidence document, or an NRAS bundle."""
    if looks_like_gpu_report(raw) or looks_like_nras_bundle(raw):
        return True
    return raw[:_BLANKS].lstrip()[:1] in (b"{", b"[") and any(name in raw[:_HEAD] for name in _DOCUMENT_FIELDS)
