"""The report's bytes and its object are the same thing; what is not exactly a report is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import MalformedEvidence
from attestation.evidence.report import (
    REPORT_SIZE,
    SIGNED_SIZE,
    Product,
    Report,
    encode_report,
    nonzero_reserved,
    nonzero_signature_padding,
    parse_report,
    product_of,
)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    version = draw(st.sampled_from([2, 3, 4, 5]))
    cpuid = [draw(unsigned(8)) if version >= 3 else None for _ in range(3)]
    mitigations = [draw(unsigned(64)) if version >= 5 else None for _ in range(2)]
    return Report(
        version=version,
        guest_svn=draw(unsigned(32)),
        policy=draw(unsigned(64)),
        family_id=draw(exactly(16)),
        image_id=draw(exactly(16)),
        vmpl=draw(unsigned(32)),
        signature_algo=draw(unsigned(32)),
        current_tcb=draw(exactly(8)),
        platform_info=draw(unsigned(64)),
        key_info=draw(unsigned(32)),
        report_data=draw(exactly(64)),
        measurement=draw(exactly(48)),
        host_data=draw(exactly(32)),
        id_key_digest=draw(exactly(48)),
        author_key_digest=draw(exactly(48)),
        report_id=draw(exactly(32)),
        report_id_ma=draw(exactly(32)),
        reported_tcb=draw(exactly(8)),
        cpuid_fam_id=cpuid[0],
        cpuid_mod_id=cpuid[1],
        cpuid_step=cpuid[2],
        chip_id=draw(exactly(64)),
        committed_tcb=draw(exactly(8)),
        current_build=draw(unsigned(8)),
        current_minor=draw(unsigned(8)),
        current_major=draw(unsigned(8)),
        committed_build=draw(unsigned(8)),
        committed_minor=draw(unsigned(8)),
        committed_major=draw(unsigned(8)),
        launch_tcb=draw(exactly(8)),
        launch_mit_vector=mitigations[0],
        current_mit_vector=mitigations[1],
        signature_r=draw(unsigned(384)),
        signature_s=draw(unsigned(384)),
    )


@given(reports())
@settings(max_examples=150, deadline=None)
def test_an_encoded_report_is_read_back_as_it_was(report: Report) -> None:
    raw = encode_report(report)
    assert len(raw) == REPORT_SIZE
    parsed = parse_report(raw)
    assert dataclasses.replace(parsed, raw=b"") == report
    assert encode_report(parsed) == raw
    assert parsed.signed == raw[:SIGNED_SIZE]


@given(exactly(REPORT_SIZE))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_either_refused_or_given_back_exactly(raw: bytes) -> None:
    try:
        report = parse_report(raw)
    except MalformedEvidence:
        assert parse_report(raw, strict=False).raw == raw
    else:
        assert encode_report(report) == raw


@pytest.mark.parametrize("size", [0, 1, REPORT_SIZE - 1, REPORT_SIZE + 1, 2 * REPORT_SIZE])
def test_only_1184_bytes_are_a_report(size: int) -> None:
    for strict in (True, False):
        with pytest.raises(MalformedEvidence, match="1184"):
            parse_report(bytes(size), strict=strict)


def sample(version: int) -> bytes:
    raw = bytearray(REPORT_SIZE)
    raw[0] = version
    return bytes(raw)


@pytest.mark.parametrize("version", [0, 1, 6, 258])
def test_an_unknown_version_is_refused(version: int) -> None:
    raw = version.to_bytes(4, "little") + sample(0)[4:]
    with pytest.raises(MalformedEvidence, match=f"version {version} "):
        parse_report(raw)
    assert parse_report(raw, strict=False).version == version


def test_every_byte_is_a_field_or_refused_when_not_zero() -> None:
    for version in (2, 3, 4, 5):
        base = sample(version)
        reserved = 0
        for offset in range(4, REPORT_SIZE):
            raw = bytearray(base)
            raw[offset] = 1
            found = nonzero_reserved(bytes(raw), version) + nonzero_signature_padding(bytes(raw))
            if found:
                assert found == (offset,)
                reserved += 1
                with pytest.raises(MalformedEvidence, match=f"0x{offset:03x}"):
                    parse_report(bytes(raw))
            else:
                assert parse_report(bytes(raw)) != parse_report(base)
        below_signature = {2: 4 + 24 + 2 + 168, 3: 4 + 21 + 2 + 168, 4: 4 + 21 + 2 + 168, 5: 4 + 21 + 2 + 152}
        assert reserved == below_signature[version] + 24 + 24 + 368


@pytest.mark.parametrize(
    "change",
    [
        {"measurement": b"short"},
        {"cpuid_fam_id": 0x19},
        {"launch_mit_vector": 1},
        {"version": 7},
        {"version": 3},
        {"policy": 1 << 64},
        {"guest_svn": -1},
        {"signature_r": 1 << 384},
    ],
)
def test_a_field_that_does_not_fit_is_not_encoded(change: dict[str, object]) -> None:
    report = parse_report(sample(2))
    with pytest.raises(MalformedEvidence):
        encode_report(dataclasses.replace(report, **change))  # type: ignore[arg-type]  # wrong on purpose


def test_key_info_is_decoded() -> None:
    report = dataclasses.replace(parse_report(sample(2)), key_info=0b00111)
    assert report.author_key_enabled
    assert report.mask_chip_key
    assert report.signing_key == 1


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x01, Product.MILAN),
        (0x19, 0x11, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x1A, 0x02, Product.TURIN),
        (0x1A, 0x11, Product.TURIN),
        (0x1A, 0x12, None),
        (0x19, 0x20, None),
        (0x17, 0x31, None),
    ],
)
def test_the_product_line_follows_cpuid(family: int, model: int, product: Product | None) -> None:
    assert product_of(family, model) is product
