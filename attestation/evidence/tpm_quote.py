"""A TPM 2.0 quote: what a TPM's attestation key signed about its registers.

Layout: TCG TPM 2.0 Library, part 2: TPMS_ATTEST with TPMS_QUOTE_INFO (magic, type, signer's name, extra data, clock,
firmware version, PCR selection, digest of the selected PCRs). Integers are big-endian, unlike those of the report.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from attestation.errors import MalformedEvidence

MAX_QUOTE_SIZE = 4096
MAX_EXTRA_DATA = 64
PCR_COUNT = 24
SHA256_SIZE = 32

_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE: only a TPM makes structures that begin so, and never signs a caller's
_ATTEST_QUOTE = 0x8018
_ALG_SHA256 = 0x000B


@dataclass(frozen=True, slots=True)
class TpmQuote:
    """One quote with the parts that come beside it; nothing in it is believed before its signature is verified.

    Attributes:
        message: The signed TPMS_ATTEST.
        signature: RSASSA-PKCS1-v1_5 with SHA-256, as the TPM gave it.
        pcrs: All 24 SHA-256 registers, 32 bytes each.
        extra_data: What the caller had signed in: its nonce, at most 64 bytes.
        selection: Numbers of the registers whose digest was signed.
        pcr_digest: The signed digest over them.
        firmware_version: The TPM's.
        reset_count: How often the TPM was reset.
    """

    message: bytes
    signature: bytes
    pcrs: tuple[bytes, ...]
    extra_data: bytes
    selection: tuple[int, ...]
    pcr_digest: bytes
    firmware_version: int
    reset_count: int


def parse_tpm_quote(message: bytes, signature: bytes, pcrs: tuple[bytes, ...]) -> TpmQuote:
    """Read a quote to its last byte.

    Raises:
        MalformedEvidence: another structure than a quote, another bank than SHA-256, wrong sizes, trailing bytes.
    """
    if len(message) > MAX_QUOTE_SIZE or not 256 <= len(signature) <= 512:
        raise _malformed(f"a message of {len(message)} and a signature of {len(signature)} bytes")
    if len(pcrs) != PCR_COUNT or any(len(pcr) != SHA256_SIZE for pcr in pcrs):
        raise _malformed(f"there are not {PCR_COUNT} registers of {SHA256_SIZE} bytes")
    reader = _Reader(message)
    magic, kind = reader.take(">IH")
    if magic != _MAGIC or kind != _ATTEST_QUOTE:
        raise _malformed(f"magic {magic:#x} and type {kind:#x} are no quote's")
    reader.sized(MAX_QUOTE_SIZE)  # the signer's name: the key itself is what counts
    extra_data = reader.sized(MAX_EXTRA_DATA)
    _, reset_count, _, _, firmware_version = reader.take(">QIIBQ")
    (banks,) = reader.take(">I")
    if banks != 1:
        raise _malformed(f"the quote is over {banks} banks of registers, not one")
    algorithm, size = reader.take(">HB")
    if algorithm != _ALG_SHA256 or not 1 <= size <= 4:
        raise _malformed(f"the quote is over bank {algorithm:#x}, not SHA-256")
    selected = int.from_bytes(reader.raw(size), "little")
    if selected >> PCR_COUNT:
        raise _malformed(f"registers beyond {PCR_COUNT - 1} are selected")
    pcr_digest = reader.sized(SHA256_SIZE)
    reader.end()
    return TpmQuote(
        message=message,
        signature=signature,
        pcrs=pcrs,
        extra_data=extra_data,
        selection=tuple(number for number in range(PCR_COUNT) if selected >> number & 1),
        pcr_digest=pcr_digest,
        firmware_version=firmware_version,
        reset_count=reset_count,
    )


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._position = 0

    def raw(self, size: int) -> bytes:
        part = self._raw[self._position : self._position + size]
        if len(part) != size:
            raise _malformed("the message ends too early")
        self._position += size
        return part

    def take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.raw(struct.calcsize(layout)))

    def sized(self, limit: int) -> bytes:
        (size,) = self.take(">H")
        if size > limit:
            raise _malformed(f"a field of {size} bytes is longer than {limit}")
        return self.raw(size)

    def end(self) -> None:
        if self._position != len(self._raw):
            raise _malformed(f"{len(self._raw) - self._position} bytes follow the message")


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="TPM quote", do="Take quote, signature and registers from one TPM2_Quote.")
