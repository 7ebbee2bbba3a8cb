"""The initrd's archive: cpio in the `newc` form, written one way only and read just as strictly.

The kernel's reader (Documentation/driver-api/early-userspace/buffer-format.rst) takes much that an image has no use
for: links, devices, names that climb out of the root, several archives in a row. Here an archive holds directories and
regular files, and every archive that is read is, byte for byte, the one that `write_archive` makes of its entries: two
different archives never unpack to the same tree, and no byte is without effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attestation.errors import MalformedArchive

MAX_ARCHIVE = 256 << 20
MAX_ENTRIES = 65536
MAX_NAME = 1024

_HEADER = 110
_TRAILER = b"TRAILER!!!"
_REGULAR = 0o100000
_DIRECTORY = 0o040000
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file, or a directory if `data` is None. `name` is relative, with `/` between its parts."""

    name: str
    data: bytes | None
    executable: bool = False


def write_archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of `entries`, sorted by name, with the directories that they imply.

    Owner is root, times are zero, modes are 0755 or 0644, inode numbers count from one: the same entries give the same
    bytes everywhere. Raises MalformedArchive for a name that no archive may hold, or that is there twice.
    """
    by_name: dict[str, Entry] = {}
    for entry in entries:
        _check_name(entry.name)
        if entry.name in by_name:
            raise _malformed(f"{entry.name!r} is in it twice")
        by_name[entry.name] = entry
    for name in list(by_name):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if by_name.setdefault(parent, Entry(parent, None)).data is not None:
                raise _malformed(f"{name!r} lies below the file {parent!r}")
    if len(by_name) > MAX_ENTRIES:
        raise _malformed(f"it has more than {MAX_ENTRIES} entries")
    archive = bytearray()
    for inode, name in enumerate(sorted(by_name, key=_order), start=1):
        archive += _record(inode, by_name[name])
    archive += _header(0, 0, 1, 0, len(_TRAILER) + 1) + _TRAILER + b"\x00"
    archive += bytes(-len(archive) % 4)
    archive += bytes(-len(archive) % _BLOCK)
    if len(archive) > MAX_ARCHIVE:
        raise _malformed(f"its {len(archive)} bytes are more than {MAX_ARCHIVE}")
    return bytes(archive)


def read_archive(raw: bytes) -> tuple[Entry, ...]:
    """Return the entries of an archive in their order.

    Raises MalformedArchive for anything that `write_archive` does not write: links and devices, absolute names and
    `..`, a file without its directory, names out of order or twice, other owners, times or modes, bytes left over.
    """
    if len(raw) > MAX_ARCHIVE:
        raise _malformed(f"its {len(raw)} bytes are more than {MAX_ARCHIVE}")
    entries: list[Entry] = []
    directories = {""}
    position = 0
    while True:
        fields = _fields(raw, position)
        name = _name(raw, position, fields[11])
        data_start = _padded(raw, position + _HEADER + fields[11])
        data_end = data_start + fields[6]
        if data_end > len(raw):
            raise _malformed(f"the data of {name!r} run out of it")
        if name == _TRAILER.decode():
            break
        if len(entries) == MAX_ENTRIES:
            raise _malformed(f"it has more than {MAX_ENTRIES} entries")
        entry = _entry(name, fields[1], raw[data_start:data_end])
        parent, _, _ = name.rpartition("/")
        if parent not in directories:
            raise _malformed(f"{name!r} is in no directory of it")
        if entries and _order(entries[-1].name) >= _order(name):
            raise _malformed(f"{name!r} is out of order, or in it twice")
        if entry.data is None:
            directories.add(name)
        entries.append(entry)
        if raw[position:data_start] != _record(len(entries), entry)[: data_start - position]:
            raise _malformed(f"the header of {name!r} is not in the one form that is written")
        position = _padded(raw, data_end)
    trailer = _header(0, 0, 1, 0, len(_TRAILER) + 1) + _TRAILER + b"\x00"
    size = (position + len(trailer) + _BLOCK - 1) // _BLOCK * _BLOCK
    if raw[position:] != trailer + bytes(size - position - len(trailer)):
        raise _malformed("it does not end with its trailer")
    return tuple(entries)


def _order(name: str) -> list[str]:
    """Sort by path parts, so that a directory comes right before what it holds."""
    return name.split("/")


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isascii() or not name.isprintable():
        raise _malformed(f"the name {name[:80]!r} is not 1 to {MAX_NAME} printable ASCII characters")
    if name.startswith("/"):
        raise _malformed(f"the name {name!r} is absolute")
    if any(part in {"", ".", ".."} for part in name.split("/")):
        raise _malformed(f"the name {name!r} has a part that is empty, `.` or `..`")
    if name == _TRAILER.decode():
        raise _malformed(f"the name {name!r} is the archive's own end")


def _entry(name: str, mode: int, data: bytes) -> Entry:
    _check_name(name)
    kind = mode & 0o170000
    if kind == _DIRECTORY:
        if data:
            raise _malformed(f"the directory {name!r} has data")
        return Entry(name, None)
    if kind != _REGULAR:
        kinds = {
            0o120000: "a symbolic link",
            0o020000: "a device",
            0o060000: "a device",
            0o010000: "a pipe",
            0o140000: "a socket",
        }
        raise _malformed(
            f"{name!r} is {kinds.get(kind, 'of an unknown kind')}, and only files and directories may be in it"
        )
    return Entry(name, data, executable=bool(mode & 0o100))


def _record(inode: int, entry: Entry) -> bytes:
    data = entry.data or b""
    if entry.data is None:
        mode, links = _DIRECTORY | 0o755, 2
    else:
        mode, links = _REGULAR | (0o755 if entry.executable else 0o644), 1
    name = entry.name.encode("ascii") + b"\x00"
    record = bytearray(_header(inode, mode, links, len(data), len(name)) + name)
    record += bytes(-len(record) % 4)
    record += data
    record += bytes(-len(record) % 4)
    return bytes(record)


def _header(inode: int, mode: int, links: int, size: int, name_size: int) -> bytes:
    """Return `c_magic` and the thirteen fields: ino, mode, uid, gid, nlink, mtime, filesize, devs, namesize, check."""
    return b"070701" + b"".join(
        b"%08X" % field for field in (inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0)
    )


def _fields(raw: bytes, position: int) -> tuple[int, ...]:
    header = raw[position : position + _HEADER]
    if len(header) < _HEADER or not header.startswith(b"070701"):
        raise _malformed(f"there is no entry at byte {position}")
    try:
        return tuple(int(header[start : start + 8], 16) for start in range(6, _HEADER, 8))
    except ValueError:
        raise _malformed(f"the entry at byte {position} has a field that is no number") from None


def _name(raw: bytes, position: int, size: int) -> str:
    if not 2 <= size <= MAX_NAME + 1:
        raise _malformed(f"the entry at byte {position} has a name of {size} bytes")
    name = raw[position + _HEADER : position + _HEADER + size]
    if len(name) < size or name[-1] or 0 in name[:-1]:
        raise _malformed(f"the name of the entry at byte {position} does not end where it should")
    return name[:-1].decode("latin-1")


def _padded(raw: bytes, position: int) -> int:
    end = position + -position % 4
    if any(raw[position:end]):
        raise _malformed(f"the padding at byte {position} is not zero")
    return end


def _malformed(what: str) -> MalformedArchive:
    return MalformedArchive(
        f"the archive is refused: {what}", where="initrd", do="Make the image again with `seal image generate`."
    )
