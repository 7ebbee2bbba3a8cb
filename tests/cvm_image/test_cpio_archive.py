"""The archive: one form only, read strictly, and nothing in it can climb out of the folder it is unpacked to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import MalformedArchive
from attestation.evidence.cpio import Entry, read_archive, write_archive
from attestation.virtual.launch import KERNEL_HEADER, MeasuredFiles, unpack_guest

PARTS = st.text(st.sampled_from("abcXYZ019._- "), min_size=1, max_size=8).filter(lambda part: part not in {".", ".."})
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
KERNEL = KERNEL_HEADER + b"/init\n"


def header(name: str, mode: int, data: bytes = b"", *, links: int = 1, inode: int = 1) -> bytes:
    """Return one raw record, whatever its name and mode."""
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    record = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode("latin-1") + b"\0"
    record += bytes(-len(record) % 4) + data
    return record + bytes(-len(record) % 4)


def archive(*records: bytes) -> bytes:
    """Return `records` with the trailer, as a program that knows the format would make them."""
    body = b"".join(records) + header("TRAILER!!!", 0, inode=0)
    return body + bytes(-len(body) % 512)


@settings(max_examples=100, deadline=None)
@given(contents=st.dictionaries(NAMES, st.tuples(st.binary(max_size=64), st.booleans()), max_size=8))
def test_what_is_written_is_read_back(contents: dict[str, tuple[bytes, bool]]) -> None:
    entries = [Entry(name, data, executable) for name, (data, executable) in contents.items()]
    try:
        raw = write_archive(entries)
    except MalformedArchive:
        assert any(other.startswith(f"{name}/") for name in contents for other in contents)
        return
    read = read_archive(raw)
    assert {entry for entry in read if entry.data is not None} == set(entries)
    assert write_archive(read) == raw
    assert write_archive(reversed(read)) == raw


def test_one_flipped_bit_is_refused_or_read_as_something_else() -> None:
    raw = write_archive([Entry("init", b"program", executable=True), Entry("lib/a.py", b"x = 1\n")])
    genuine = read_archive(raw)
    for position in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        try:
            read = read_archive(bytes(changed))
        except MalformedArchive:
            continue
        assert read != genuine
        assert write_archive(read) == changed


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=600), cut=st.integers(0, 1024))
def test_any_bytes_are_read_or_refused(raw: bytes, cut: int) -> None:
    genuine = write_archive([Entry("init", b"program")])
    for candidate in (raw, genuine[:cut] + raw):
        try:
            assert write_archive(read_archive(candidate)) == candidate
        except MalformedArchive:
            continue


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([header("link", 0o120777, b"/etc/passwd")], "symbolic link"),
        ([header("console", 0o020600)], "device"),
        ([header("pipe", 0o010644)], "pipe"),
        ([header("socket", 0o140644)], "socket"),
        ([header("/etc/passwd", 0o100644, b"x")], "absolute"),
        ([header("../escaped", 0o100644, b"x")], r"`\.\.`"),
        ([header("a", 0o040755, links=2), header("a/../../b", 0o100644, inode=2)], r"`\.\.`"),
        ([header("./init", 0o100755, b"x")], r"`\.`"),
        ([header("a//b", 0o100644)], "empty"),
        ([header("a\nb", 0o100644)], "printable"),
        ([header("lib/a.py", 0o100644)], "no directory"),
        ([header("a", 0o100644), header("a", 0o100644, b"other", inode=2)], "twice"),
        ([header("b", 0o100644), header("a", 0o100644, inode=2)], "out of order"),
        ([header("a", 0o100644, b"x", links=2)], "one form"),
        ([header("a", 0o104755, b"x")], "one form"),
        ([header("a", 0o040755, b"x", links=2)], "has data"),
        ([header("a", 0o100644, b"x")[:-4]], "padding"),
    ],
)
def test_what_the_pipeline_does_not_write_is_refused(records: list[bytes], words: str) -> None:
    with pytest.raises(MalformedArchive, match=words):
        read_archive(archive(*records))


def test_bytes_behind_the_trailer_are_refused() -> None:
    raw = write_archive([Entry("init", b"x")])
    for more in (b"\0" * 512, raw):
        with pytest.raises(MalformedArchive, match="trailer"):
            read_archive(raw + more)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/..", "./a", "a//b", "a/", "ä", "a\0b", "TRAILER!!!", "a" * 2000])
def test_no_archive_is_written_with_a_name_that_would_be_refused(name: str) -> None:
    with pytest.raises(MalformedArchive):
        write_archive([Entry(name, b"")])


def test_unpacking_writes_below_its_folder_only(tmp_path: Path) -> None:
    initrd = write_archive([Entry("init", b"#!", executable=True), Entry("lib/a.py", b"x")])
    init = unpack_guest(MeasuredFiles(b"", KERNEL, initrd, b""), tmp_path / "guest")
    assert init == tmp_path / "guest/init"
    assert init.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "guest/lib/a.py").read_bytes() == b"x"
    assert (tmp_path / "guest").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guest"]


def test_an_archive_that_climbs_out_writes_nothing(tmp_path: Path) -> None:
    hostile = archive(header("../escaped", 0o100644, b"x"), header("init", 0o100755, b"x", inode=2))
    with pytest.raises(MalformedArchive):
        unpack_guest(MeasuredFiles(b"", KERNEL, hostile, b""), tmp_path / "guest")
    assert list(tmp_path.iterdir()) == []
