"""JSON evidence of guest components is rebuilt to exactly the bytes that were signed, or refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import MalformedEvidence
from attestation.evidence.certificate_table import ASK_GUID, VCEK_GUID, parse_certificate_table
from attestation.evidence.guest_components_json import parse_guest_components
from attestation.evidence.report import Product, Report, encode_report, parse_report
from attestation.evidence.tcb import Tcb, decode_tcb, encode_tcb


def sample(product: Product, version: int) -> Report:
    turin = product is Product.TURIN
    tcb = encode_tcb(Tcb(4, 1, 24, 219, 7 if turin else None), product)
    cpuid = {Product.MILAN: (0x19, 1, 1), Product.GENOA: (0x19, 0xA0, 2), Product.TURIN: (0x1A, 2, 1)}[product]
    family, model, step = cpuid if version >= 3 else (None, None, None)
    mitigations = (11, 12) if version >= 5 else (None, None)
    return Report(
        version=version,
        guest_svn=3,
        policy=0x30000,
        family_id=b"f" * 16,
        image_id=b"i" * 16,
        vmpl=0,
        signature_algo=1,
        current_tcb=tcb,
        platform_info=0x25,
        key_info=0,
        report_data=bytes(range(64)),
        measurement=b"m" * 48,
        host_data=b"h" * 32,
        id_key_digest=b"k" * 48,
        author_key_digest=b"a" * 48,
        report_id=b"r" * 32,
        report_id_ma=b"\xff" * 32,
        reported_tcb=tcb,
        cpuid_fam_id=family,
        cpuid_mod_id=model,
        cpuid_step=step,
        chip_id=b"c" * 64,
        committed_tcb=tcb,
        current_build=40,
        current_minor=55,
        current_major=1,
        committed_build=39,
        committed_minor=54,
        committed_major=0,
        launch_tcb=tcb,
        launch_mit_vector=mitigations[0],
        current_mit_vector=mitigations[1],
        signature_r=2**383 + 5,
        signature_s=77,
    )


def as_json(report: Report, product: Product) -> dict[str, Any]:
    def tcb(raw: bytes) -> dict[str, int | None]:
        return {"fmc": None, **decode_tcb(raw, product).as_dict()}

    fields: dict[str, Any] = {
        "version": report.version,
        "guest_svn": report.guest_svn,
        "policy": report.policy,
        "vmpl": report.vmpl,
        "sig_algo": report.signature_algo,
        "plat_info": report.platform_info,
        "key_info": report.key_info,
        "cpuid_fam_id": report.cpuid_fam_id,
        "cpuid_mod_id": report.cpuid_mod_id,
        "cpuid_step": report.cpuid_step,
        "launch_mit_vector": report.launch_mit_vector,
        "current_mit_vector": report.current_mit_vector,
        "current": {"major": report.current_major, "minor": report.current_minor, "build": report.current_build},
        "committed": {
            "major": report.committed_major,
            "minor": report.committed_minor,
            "build": report.committed_build,
        },
        "signature": {
            "r": list(report.signature_r.to_bytes(72, "little")),
            "s": list(report.signature_s.to_bytes(72, "little")),
        },
    }
    for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        fields[name] = tcb(getattr(report, name))
    for name in ("family_id", "image_id", "report_data", "measurement", "host_data", "id_key_digest"):
        fields[name] = list(getattr(report, name))
    for name in ("author_key_digest", "report_id", "report_id_ma", "chip_id"):
        fields[name] = list(getattr(report, name))
    return {"attestation_report": fields, "cert_chain": None}


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("product", list(Product))
def test_the_signed_bytes_are_rebuilt(product: Product, version: int) -> None:
    report = sample(product, version)
    document = json.loads(json.dumps(as_json(report, product)))
    assert parse_guest_components(document).report == encode_report(report)
    assert parse_guest_components(document).certificates == b""


def test_certificates_become_a_table() -> None:
    document = as_json(sample(Product.MILAN, 3), Product.MILAN)
    document["cert_chain"] = [{"cert_type": "VCEK", "data": [1, 2]}, {"cert_type": "ASK", "data": [3]}]
    table = parse_guest_components(document).certificates
    assert parse_certificate_table(table) == ((VCEK_GUID, b"\x01\x02"), (ASK_GUID, b"\x03"))


def test_mitigation_vectors_may_be_left_out_before_version_5() -> None:
    document = as_json(sample(Product.GENOA, 3), Product.GENOA)
    del document["attestation_report"]["launch_mit_vector"]
    del document["attestation_report"]["current_mit_vector"]
    assert parse_report(parse_guest_components(document).report).version == 3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("attestation_report", "extra"), 1),
        (("attestation_report", "version"), 6),
        (("attestation_report", "version"), "3"),
        (("attestation_report", "version"), 2),
        (("attestation_report", "version"), 5),
        (("attestation_report", "policy"), 1 << 64),
        (("attestation_report", "policy"), True),
        (("attestation_report", "measurement"), [0] * 47),
        (("attestation_report", "measurement"), [256] + [0] * 47),
        (("attestation_report", "current_tcb", "fmc"), 1),
        (("attestation_report", "cpuid_mod_id"), 0x60),
        (("attestation_report", "cpuid_mod_id"), None),
        (("attestation_report", "signature", "r"), [255] * 72),
        (("attestation_report", "signature", "s"), [0] * 71),
        (("cert_chain",), [{"cert_type": "VCEK", "data": []}]),
        (("cert_chain",), [{"cert_type": "OTHER", "data": [1]}]),
        (("cert_chain",), [{"cert_type": "VCEK", "data": [1]}] * 2),
        (("attestation_report",), []),
    ],
)
def test_what_no_report_has_is_refused(path: tuple[str, ...], value: object) -> None:
    document = copy.deepcopy(as_json(sample(Product.MILAN, 3), Product.MILAN))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(MalformedEvidence):
        parse_guest_components(document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["attestation_report", "cert_chain", "x"]), json_values))
@settings(max_examples=100, deadline=None)
def test_any_object_is_read_or_refused(document: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_guest_components(document)
