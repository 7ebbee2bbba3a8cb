"""An Azure-like paravisor for tests: it wraps a report around the key of a virtual TPM, and quotes with that key."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from attestation.evidence.hcl import HclEvidence, parse_hcl_report
from attestation.evidence.tpm_quote import TpmQuote, parse_tpm_quote
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report


@dataclass(frozen=True)
class Paravisor:
    """One VM's paravisor; `pcrs` are its TPM's registers."""

    chip: Chip
    key: rsa.RSAPrivateKey
    pcrs: tuple[bytes, ...] = tuple(bytes([number]) * 32 for number in range(24))

    def variable_data(self) -> bytes:
        numbers = self.key.public_key().public_numbers()

        def number(value: int) -> str:
            raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
            return base64.urlsafe_b64encode(raw).decode().rstrip("=")

        key = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": number(numbers.e), "n": number(numbers.n)}
        configuration = {"secure-boot": True, "tpm-enabled": True, "vmUniqueId": "00"}
        return json.dumps({"keys": [key], "vm-configuration": configuration, "user-data": "00" * 64}).encode()

    def blob(self, *, variable_data: bytes | None = None, report: bytes | None = None) -> bytes:
        """The HCL report; `report` goes in instead of one that binds the variable data."""
        data = variable_data if variable_data is not None else self.variable_data()
        bound = hashlib.sha256(data).digest().ljust(64, b"\0")
        inner = report if report is not None else sign_report(self.chip, report_data=bound)
        size = 32 + len(inner) + 20 + len(data)
        header = struct.pack("<4s7I", b"HCLA", 2, size, 2, 0, 0, 0, 0)
        return header + inner + struct.pack("<5I", 20 + len(data), 1, 2, 1, len(data)) + data + bytes(64)

    def message(self, nonce: bytes, *, pcrs: tuple[bytes, ...] | None = None) -> bytes:
        """The TPMS_ATTEST that is signed, over all registers."""
        digest = hashlib.sha256(b"".join(pcrs or self.pcrs)).digest()
        return b"".join(
            (
                struct.pack(">IH", 0xFF544347, 0x8018),
                struct.pack(">H", 34) + bytes(34),
                struct.pack(">H", len(nonce)) + nonce,
                struct.pack(">QIIBQ", 7, 1, 0, 1, 0x2020031200120003),
                struct.pack(">IHB", 1, 0x000B, 3) + b"\xff\xff\xff",
                struct.pack(">H", 32) + digest,
            )
        )

    def quote(self, nonce: bytes, **changes: Any) -> TpmQuote:
        message = self.message(nonce)
        signature = self.key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return replace(parse_tpm_quote(message, signature, self.pcrs), **changes)

    def evidence(self, nonce: bytes | None) -> HclEvidence:
        """What the guest hands over, with a quote over `nonce` (none without one)."""
        quote = None if nonce is None else self.quote(nonce)
        return HclEvidence(parse_hcl_report(self.blob()), quote, self.chip.vcek)
