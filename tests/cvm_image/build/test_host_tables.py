"""What the entry does to ACPI tables that a host made up: its own functions, compiled here, on hostile bytes."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvm_image.build.entry import HERE

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

HARNESS = """
#include "entry.c"
void ports(u8 *fadt, u32 size) { keep_ports(fadt, size); }
int is_kept(const u8 *table) { return kept(table); }
void sum(u8 *table, u64 size, u64 place) { add_up(table, size, place); }
"""
REGISTERS = (116, 148, 160, 172, 184, 196, 208, 220, 232, 244, 256)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("entry")
    (folder / "harness.c").write_text(HARNESS)
    flags = ["-shared", "-fPIC", "-std=gnu11", "-O1", "-fshort-wchar", f"-I{HERE}"]
    command = ["gcc", *flags, str(folder / "harness.c"), "-o", str(folder / "entry.so")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return ctypes.CDLL(str(folder / "entry.so"))


def scrubbed(entry: ctypes.CDLL, fadt: bytes) -> bytes:
    """The FADT after the entry has been at it, between guards that must not change."""
    memory = ctypes.create_string_buffer(b"\xa5" * 64 + fadt + b"\xa5" * 64, len(fadt) + 128)
    entry.ports(ctypes.byref(memory, 64), len(fadt))
    assert memory.raw[:64] == memory.raw[-64:] == b"\xa5" * 64
    return memory.raw[64:-64]


@given(st.binary(min_size=148, max_size=400))
def test_no_register_of_the_fadt_is_in_memory(entry: ctypes.CDLL, fadt: bytes) -> None:
    after = scrubbed(entry, fadt)
    covered = set()
    for at in REGISTERS:
        if at < len(fadt):
            assert after[at] in {0, 1}
            covered |= set(range(at, at + 12))
            assert after[at : at + 12] in {fadt[at : at + 12], bytes(len(fadt[at : at + 12]))}
    assert [at for at in range(len(fadt)) if at not in covered and after[at] != fadt[at]] == []


def test_a_register_that_is_a_port_stays_and_one_in_memory_goes(entry: ctypes.CDLL) -> None:
    port, memory = struct.pack("<BBBBQ", 1, 32, 0, 3, 0x600), struct.pack("<BBBBQ", 0, 32, 0, 3, 0x1000)
    fadt = bytearray(276)
    fadt[148:160], fadt[172:184] = port, memory
    after = scrubbed(entry, bytes(fadt))
    assert after[148:160] == port
    assert after[172:184] == bytes(12)


@pytest.mark.parametrize("table", [b"SSDT", b"DSDT", b"PSDT", b"OEM1", b"FACP", b"HPET", b"DMAR", b"TPM2", b"NFIT"])
def test_other_tables_do_not_pass(entry: ctypes.CDLL, table: bytes) -> None:
    assert not entry.is_kept(table + bytes(32))
    assert all(entry.is_kept(one + bytes(32)) for one in (b"APIC", b"MCFG", b"WAET"))


@given(st.binary(min_size=36, max_size=300))
def test_a_changed_table_adds_up(entry: ctypes.CDLL, table: bytes) -> None:
    memory = ctypes.create_string_buffer(table, len(table))
    entry.sum(memory, ctypes.c_uint64(len(table)), ctypes.c_uint64(9))
    assert sum(memory.raw) % 256 == 0
