"""Evidence as it travels: a report together with what its host said would vouch for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ADDITIONAL: Final = 320 * 1024
"""Characters of the evidence of further devices (GPUs, switches) that travels with a report: a text, JSON."""


@dataclass(frozen=True, slots=True)
class SnpEvidence:
    """What a guest on SEV-SNP hands over.

    Attributes:
        report: The 1184 bytes that the secure processor signed.
        certificates: The host's certificate table (`certificate_table.parse_certificate_table`); may be empty.
    """

    report: bytes
    certificates: bytes = b""
