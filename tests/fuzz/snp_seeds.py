"""Good SEV-SNP evidence of each kind, from which a fuzzer starts."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from snp_targets import VECTORS
from virtual_hcl import Paravisor

from attestation.endorsements.certificates import load_certificate, load_crl
from attestation.evidence.certificate_table import ARK_GUID, ASK_GUID, VCEK_GUID, encode_certificate_table
from attestation.evidence.id_block import IdBlock, encode_id_block, sign_id_block
from attestation.evidence.report import Product, Report, parse_report
from attestation.evidence.tcb import decode_tcb
from attestation.verifier.profile import BROKER, SHOW
from attestation.verifier.profile_toml import profile_to_toml


def _der(name: str) -> bytes:
    return load_certificate((VECTORS / name).read_bytes()).public_bytes(Encoding.DER)


def _reports() -> Sequence[bytes]:
    return tuple(path.read_bytes() for path in sorted((VECTORS / "reports").iterdir()))


def _report() -> bytes:
    return (VECTORS / "reports/genoa-v5.bin").read_bytes()


@cache
def _paravisor() -> Paravisor:
    return Paravisor(SimpleNamespace(vcek=_der("Genoa/vcek.pem")), rsa.generate_private_key(65537, 2048))  # type: ignore[arg-type]  # only its certificate is asked for


def _guest_components() -> bytes:
    """The report's fields, as guest components send them."""
    report: Report = parse_report(_report())
    document: dict[str, Any] = {"sig_algo": report.signature_algo, "plat_info": report.platform_info}
    for name in Report.__dataclass_fields__:
        value = getattr(report, name)
        if name.endswith("_tcb"):
            document[name] = {"fmc": None, **decode_tcb(value, Product.GENOA).as_dict()}
        elif name == "raw" or name.startswith(("signature_", "platform_", "current_m", "current_b", "committed_")):
            continue
        else:
            document[name] = list(value) if isinstance(value, bytes) else value
    for kind in ("current", "committed"):
        document[kind] = {part: getattr(report, f"{kind}_{part}") for part in ("major", "minor", "build")}
    document["current_mit_vector"] = report.current_mit_vector
    signature = {"r": report.signature_r, "s": report.signature_s}
    document["signature"] = {name: list(value.to_bytes(72, "little")) for name, value in signature.items()}
    return json.dumps({"attestation_report": document, "cert_chain": None}).encode()


def _azure() -> bytes:
    quote = _paravisor().quote(b"nonce")
    document = {
        "version": 2,
        "hcl_report": base64.urlsafe_b64encode(_paravisor().blob(report=_report())).decode(),
        "tpm_quote": {
            "message": quote.message.hex(),
            "signature": quote.signature.hex(),
            "pcrs": [pcr.hex() for pcr in quote.pcrs],
        },
        "vcek": base64.urlsafe_b64encode(_der("Genoa/vcek.pem")).decode(),
    }
    return json.dumps(document).encode()


def _id_blocks() -> Sequence[bytes]:
    key, author = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    block = encode_id_block(IdBlock(bytes(48), bytes(16), bytes(16), 1, 0x30000))
    return (block + sign_id_block(block, key, None), block + sign_id_block(block, key, author))


SEEDS: dict[str, Callable[[], Sequence[bytes]]] = {
    "report": _reports,
    "certificate-table": lambda: (
        encode_certificate_table(
            (
                (VCEK_GUID, _der("Genoa/vcek.pem")),
                (ASK_GUID, _der("Genoa/ask.pem")),
                (ARK_GUID, _der("Genoa/ark.pem")),
            )
        ),
        bytes(4096),
    ),
    "certificate": lambda: tuple(_der(f"Turin/{name}.pem") for name in ("vcek", "ask", "ark")),
    "revocation-list": lambda: (
        load_crl((VECTORS / "Genoa/crl.pem").read_bytes()).public_bytes(Encoding.DER),
        load_crl((VECTORS / "Milan/crl-revoked.pem").read_bytes()).public_bytes(Encoding.DER),
    ),
    "hcl-report": lambda: (_paravisor().blob(report=_report()),),
    "tpm-quote": lambda: (_paravisor().message(b"nonce"),),
    "json-evidence": lambda: (_guest_components(), _azure()),
    "id-block": _id_blocks,
    "profile": lambda: (profile_to_toml(SHOW).encode(), profile_to_toml(BROKER, comments=False).encode()),
}
"""Seeds by target."""
