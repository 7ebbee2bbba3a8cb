"""What the firmware starts: a PE image with the kernel, our AML and the drivers' certificate inside."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_image.build.entry import HERE, Wrapped, certificate_list, dsdt, program, read_kernel, wrap_kernel
from cvm_image.build.errors import BuildFailed

KERNEL = (b"MZ".ljust(0x1F1, b"\0") + b"\x27" + bytes(16) + b"HdrS\x0f\x02").ljust(9000, b"\x5a")
CERTIFICATE = b"\x30\x03\x02\x01\x05"


@pytest.mark.parametrize("certificate", [None, CERTIFICATE])
def test_the_parts_come_back(certificate: bytes | None) -> None:
    raw = wrap_kernel(program(), KERNEL, certificate)
    found = read_kernel(raw)
    assert found == Wrapped(program(), KERNEL, dsdt(), certificate)
    assert len(raw) % 4096 == 0


def test_it_is_a_pe_image_and_a_linux_kernel_at_once() -> None:
    raw = wrap_kernel(program(), KERNEL, CERTIFICATE)
    assert raw[:2] == b"MZ"
    assert raw[0x202:0x208] == KERNEL[0x202:0x208]
    at = struct.unpack_from("<I", raw, 0x3C)[0]
    signature, machine, sections, _, _, _, optional, _ = struct.unpack_from("<4sHHIIIHH", raw, at)
    assert (signature, machine, sections) == (b"PE\0\0", 0x8664, 4)
    magic, entry = struct.unpack_from("<H14xI", raw, at + 24)
    size, headers = struct.unpack_from("<56xII", raw, at + 24)
    assert (magic, size, headers) == (0x20B, len(raw), 0x1000)
    assert optional == 112 + 8 * struct.unpack_from("<108xI", raw, at + 24)[0]
    table = {}
    for number in range(sections):
        name, length, address, kept, offset, flags = struct.unpack_from(
            "<8sIIII12xI", raw, at + 24 + optional + 40 * number
        )
        assert (address, address % 4096, kept % 4096) == (offset, 0, 0)
        table[name.rstrip(b"\0")] = (address, length, flags)
    start, length, flags = table[b".entry"]
    assert start <= entry < start + length
    assert flags & 0x20000000
    assert [name for name, (_, _, other) in table.items() if other & 0x20000000] == [b".entry"]
    assert raw[table[b".linux"][0] :][: table[b".linux"][1]] == KERNEL
    assert raw[table[b".cert"][0] :][: table[b".cert"][1]] == certificate_list(CERTIFICATE)


def test_our_aml_is_a_whole_table_without_a_method_or_a_region() -> None:
    table = dsdt()
    assert table[:4] == b"DSDT"
    assert struct.unpack_from("<I", table, 4)[0] == len(table)
    assert sum(table) % 256 == 0
    assert b"PCI0" in table
    assert b"_S5_" in table
    body = table[36:]
    assert b"\x5b\x80" not in body  # OperationRegion
    assert b"\x14" not in body  # Method


@settings(max_examples=150)
@given(place=st.integers(0, 40000), bit=st.integers(0, 7))
def test_a_changed_byte_shows_in_the_parts_or_is_refused(place: int, bit: int) -> None:
    raw = bytearray(wrap_kernel(program(), KERNEL, CERTIFICATE))
    raw[place % len(raw)] ^= 1 << bit
    try:
        found = read_kernel(bytes(raw))
    except BuildFailed:
        return
    assert found != Wrapped(program(), KERNEL, dsdt(), CERTIFICATE)


@given(st.binary(max_size=9000))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    for candidate in (raw, bytes(4096) + raw):
        with pytest.raises(BuildFailed):
            read_kernel(candidate)


def test_a_file_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(BuildFailed, match="no Linux boot header"):
        wrap_kernel(program(), bytes(9000), None)


def test_the_program_calls_no_address_but_its_own_and_the_firmwares() -> None:
    source = (HERE / "entry.c").read_text()
    assert "asm" not in source.replace('__asm__("hlt")', "")
    assert len(program()) < 4096
