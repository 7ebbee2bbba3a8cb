"""What stands beside the evidence of GPUs and switches: manifests and revocation data, as one document.

A broker has it in a folder, puts it beside each guest's evidence, and keeps it in its ledger, so that an auditor judges
by the same bytes years later. Nothing in it is believed for where it comes from: each part has a signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from attestation.canonical import b64, canonical_bytes, read_canonical, unb64
from attestation.endorsements.nvidia_revocation import MAX_LISTS, MAX_RESPONSES, RevocationData
from policies.errors import Unusable

MAX_RIMS: Final = 64
MAX_SIZE: Final = 1024 * 1024
"""Bytes of the whole document: that of some thirty manifests."""
_WHERE: Final = "GPU endorsements"


@dataclass(frozen=True, slots=True)
class GpuEndorsements:
    """Reference manifests (XML), and OCSP responses and revocation lists."""

    rims: tuple[bytes, ...] = ()
    revocation: RevocationData = field(default_factory=RevocationData)

    def to_bytes(self) -> bytes:
        """The one byte form. Raises Unusable if it is larger than MAX_SIZE."""
        parts = {"crls": self.revocation.crls, "ocsp": self.revocation.ocsp, "rims": self.rims}
        raw = canonical_bytes({name: [b64(one) for one in values] for name, values in parts.items()})
        if len(raw) > MAX_SIZE:
            raise Unusable(
                f"they have {len(raw)} bytes, more than {MAX_SIZE}",
                where=_WHERE,
                do="Keep the manifests of those versions alone that the charter lets in.",
            )
        return raw


def parse_gpu_endorsements(raw: bytes) -> GpuEndorsements:
    """Read what `GpuEndorsements.to_bytes` writes. Raises Unusable for anything else."""
    document = read_canonical(raw, where=_WHERE, limit=MAX_SIZE)
    limits = {"crls": MAX_LISTS, "ocsp": MAX_RESPONSES, "rims": MAX_RIMS}
    if set(document) != set(limits):
        raise _malformed("it does not hold crls, ocsp and rims")
    crls, ocsp, rims = (_parts(document[name], limit) for name, limit in limits.items())
    return GpuEndorsements(rims, RevocationData(ocsp=ocsp, crls=crls))


def _parts(value: Any, limit: int) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(one, str) for one in value):
        raise _malformed(f"a part of it is no list of at most {limit} texts")
    return tuple(unb64(one, where=_WHERE) for one in value)


def _malformed(what: str) -> Unusable:
    return Unusable(what, where=_WHERE, do="Take it from a broker's ledger as it is.")
