"""The file that the firmware starts in place of the bare kernel: a small program of ours, with the kernel inside.

An unmodified kernel believes two things that its host could use. It runs the AML in the host's ACPI tables, which may
write anywhere in the guest's memory; and it takes drivers signed by keys that it finds in firmware variables, where a
build has no other way to name the key of a driver that it compiled. The program (`entry.c`) takes the AML away, names
the build's certificate, if there is one, and starts the kernel. All of it is measured as the image's `kernel`.

`entry.bin` is what `entry.c` gives in the compiler's tree of a lock that has one; a test compiles it again and
compares. So a recipe without drivers of its own needs no compiler.

Here the file is put together: a PE image (Microsoft PE/COFF) whose first bytes are at the same time the header by which
QEMU knows a Linux kernel (Linux, Documentation/arch/x86/boot.rst), so that it is passed an initrd.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.errors import BuildFailed
from cvm_image.build.tools import Mount, Tools

HERE = Path(__file__).parent
ENTER = 0x40
"""Where the program begins, behind `parts` (entry.ld)."""
ARGUMENTS = ("pci=nocrs",)
"""What the kernel must be told under our AML, which names no windows: leave PCI devices where the firmware put them."""

PAGE = 0x1000
_PE = 0x400
_DIRECTORIES = 6
_OPTIONAL = 112 + 8 * _DIRECTORIES
_SETUP = slice(0x1F1, 0x290)
_PARTS = struct.Struct("<QQQQQQQ")
_LIST = struct.Struct("<16sIII")
_CODE, _DATA = 0xE0000020, 0x40000040
_X509 = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
_OWNER = uuid.UUID("5ea1ed00-0000-4000-8000-000000000003")
_COMPILE = (
    "gcc", "-c", "-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fpie", "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-mno-red-zone", "-mgeneral-regs-only", "-fshort-wchar",
    "-fvisibility=hidden", "-fno-jump-tables",
)  # fmt: skip


def dsdt() -> bytes:
    """The whole AML of a guest (ACPI specification 6.5, chapters 19 and 20): the PCI root, and how to power off.

    Name (\\_S5, Package (4) {0, 0, 0, 0})
    Scope (\\_SB) { Device (PCI0) {
        Name (_HID, EisaId ("PNP0A08"))  Name (_CID, EisaId ("PNP0A03"))  Name (_UID, 0)
        Name (_CRS, ResourceTemplate () { WordBusNumber (0 to 255) })
    } }
    """
    buses = struct.pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, 0, 0xFF, 0, 0x100) + b"\x79\0"
    bridge = (
        b"PCI0"
        + _name(b"_HID", b"\x0c\x41\xd0\x0a\x08")
        + _name(b"_CID", b"\x0c\x41\xd0\x0a\x03")
        + _name(b"_UID", b"\0")
        + _name(b"_CRS", b"\x11" + _package(b"\x0a" + bytes([len(buses)]) + buses))
    )
    body = _name(b"_S5_", b"\x12" + _package(b"\x04" + bytes(4)))
    body += b"\x10" + _package(b"\\_SB_" + b"\x5b\x82" + _package(bridge))
    table = struct.pack("<4sIBB6s8sI4sI", b"DSDT", 36 + len(body), 2, 0, b"SEALWR", b"MEASURED", 1, b"SEAL", 1) + body
    return table[:9] + bytes([-sum(table) & 0xFF]) + table[10:]


def _name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def _package(content: bytes) -> bytes:
    """The content behind its PkgLength, which counts itself (ACPI 6.5, 20.2.4)."""
    if len(content) < 63:
        return bytes([len(content) + 1]) + content
    size = len(content) + 2
    return bytes([0x40 | size & 0x0F, size >> 4]) + content


def certificate_list(certificate: bytes) -> bytes:
    """An X.509 certificate (DER) as firmware variables hold it: EFI_SIGNATURE_LIST (UEFI 2.10, 32.4.1)."""
    size = 16 + len(certificate)
    return _LIST.pack(_X509.bytes_le, 28 + size, 0, size) + _OWNER.bytes_le + certificate


@dataclass(frozen=True)
class Wrapped:
    """What an image's `kernel` is made of. `certificate` (DER) is that of the drivers' key, if there are any."""

    program: bytes
    kernel: bytes
    dsdt: bytes
    certificate: bytes | None


def program() -> bytes:
    """The program as it is kept beside its source."""
    return (HERE / "entry.bin").read_bytes()


def read_kernel(raw: bytes) -> Wrapped:
    """Take an image's `kernel` apart. Raises BuildFailed if it is not what `wrap_kernel` makes of these parts."""
    try:
        here, *rest = _PARTS.unpack_from(raw, PAGE)
        places = dict(zip((".linux", ".cert", ".dsdt"), zip(rest[::2], rest[1::2], strict=True), strict=True))
        (size,) = struct.unpack_from("<8xI", raw, _PE + 24 + _OPTIONAL)
        code = bytes(_PARTS.size) + raw[PAGE : PAGE + size][_PARTS.size :]
        parts = {name: raw[start : start + size] for name, (start, size) in places.items()}
        listed = parts[".cert"]
        certificate = listed[_LIST.size + 16 :] if listed else None
        wrapped = Wrapped(code, parts[".linux"], parts[".dsdt"], certificate)
        if here == PAGE and parts[".dsdt"] == dsdt() and wrap_kernel(code, wrapped.kernel, certificate) == raw:
            return wrapped
    except (struct.error, ValueError, OverflowError):
        pass  # told below
    raise BuildFailed("the kernel is not inside this version's entry", where="kernel", do="Build the image again.")


def wrap_kernel(program: bytes, kernel: bytes, certificate: bytes | None) -> bytes:
    """Return the image's `kernel`: the program with the kernel and what it needs inside.

    `certificate` (DER) is that of the drivers' key. Raises BuildFailed for a kernel without a boot header.
    """
    if kernel[0x202:0x206] != b"HdrS" or len(kernel) < PAGE:
        raise BuildFailed("the kernel has no Linux boot header", where="kernel", do="Name another kernel package.")
    contents = {
        ".entry": program,
        ".linux": kernel,
        ".dsdt": dsdt(),
        ".cert": b"" if certificate is None else certificate_list(certificate),
    }
    places: dict[str, tuple[int, int]] = {}
    at = PAGE
    for name, data in contents.items():
        places[name] = (at, len(data))
        at += -(-len(data) // PAGE) * PAGE
    parts = _PARTS.pack(PAGE, *places[".linux"], *places[".cert"], *places[".dsdt"])
    contents[".entry"] = parts + program[len(parts) :]
    raw = bytearray(_headers({name: place for name, place in places.items() if place[1]}, at))
    raw[_SETUP] = kernel[_SETUP]
    for data in contents.values():
        raw += data + bytes(-len(data) % PAGE)
    return bytes(raw)


def _headers(places: dict[str, tuple[int, int]], size: int) -> bytes:
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(places), 0, 0, 0, _OPTIONAL, 0x222)
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII",
        *(0x20B, 0, 0, PAGE, size - 2 * PAGE, 0, PAGE + ENTER, PAGE),
        *(0, PAGE, PAGE, 0, 0, 0, 0, 0, 0, 0, size, PAGE, 0, 10, 0),
        *(0, 0, 0, 0, 0, _DIRECTORIES),
    )
    sections = b"".join(
        struct.pack(
            "<8sIIIIIIHHI",
            *(name.encode(), length, start, -(-length // PAGE) * PAGE, start, 0, 0, 0, 0),
            _CODE if name == ".entry" else _DATA,
        )
        for name, (start, length) in places.items()
    )
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", _PE)
    return (head.ljust(_PE, b"\0") + coff + optional + bytes(8 * _DIRECTORIES) + sections).ljust(PAGE, b"\0")


def compile_entry(compiler: Tools, folder: Path) -> bytes:
    """Compile the program in the compiler's tree; `folder` is an empty one to work in. The same tree, the same bytes.

    Raises BuildFailed, also if the program would need relocation.
    """
    mounts = (Mount(HERE, "/build/source"), Mount(folder, "/build/out", writable=True))
    what = "compiling the entry"
    compiler.run([*_COMPILE, "/build/source/entry.c", "-o", "/build/out/entry.o"], what=what, mounts=mounts)
    link = ["ld", "-T", "/build/source/entry.ld", "-e", "0", "--no-warn-rwx-segments"]
    link += ["--oformat", "binary", "/build/out/entry.o", "-o", "/build/out/entry.bin"]
    compiler.run(link, what=what, mounts=mounts)
    return (folder / "entry.bin").read_bytes()
