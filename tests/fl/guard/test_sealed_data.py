"""Sealed files: what comes back is what went in, and whatever a host does to the file on its disk is noticed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.errors import SealedDataRefused
from fl.guard.sealed_data import HEADER, MAGIC, SECTOR, TAG_SIZE, _derive, open_file, seal, seal_file, unseal

KEY = bytes(range(32))
SALT = b"\x5a" * 32
CHUNK = 1 << 12

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
contents = st.dictionaries(names, st.binary(max_size=3 * CHUNK), min_size=1, max_size=4)


def sealed(entries: dict[str, bytes], *, salt: bytes = SALT, key: bytes = KEY) -> bytes:
    return b"".join(seal(entries, key, salt=salt, chunk_bits=12))


def opened(raw: bytes, *, key: bytes = KEY, max_bytes: int = 1 << 20) -> dict[str, bytes]:
    return unseal(io.BytesIO(raw), key, where="test", max_bytes=max_bytes, file_size=len(raw))


def chunks_of(raw: bytes) -> tuple[bytes, list[bytes]]:
    body = raw[HEADER.size :]
    step = CHUNK + TAG_SIZE
    return raw[: HEADER.size], [body[at : at + step] for at in range(0, len(body), step)]


@given(contents)
@settings(max_examples=60, deadline=None)
def test_what_is_sealed_comes_back(entries: dict[str, bytes]) -> None:
    assert opened(sealed(entries)) == entries


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    raw = bytearray(sealed({"a": b"x" * CHUNK * 2, "b": b"y" * 100}))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealedDataRefused):
        opened(bytes(raw))


def test_every_byte_of_the_header_counts() -> None:
    raw = sealed({"a": b"1"})
    for at in range(HEADER.size):
        changed = bytearray(raw)
        changed[at] ^= 0x01
        with pytest.raises(SealedDataRefused):
            opened(bytes(changed))


@given(st.integers(0, 2 * (CHUNK + TAG_SIZE) + HEADER.size))
@settings(max_examples=100, deadline=None)
def test_a_cut_at_any_place_is_refused(kept: int) -> None:
    raw = sealed({"a": b"x" * CHUNK * 2})
    with pytest.raises(SealedDataRefused):
        opened(raw[:kept])


@given(st.binary(min_size=1, max_size=2 * CHUNK))
@settings(max_examples=50, deadline=None)
def test_bytes_added_are_refused(added: bytes) -> None:
    with pytest.raises(SealedDataRefused):
        opened(sealed({"a": b"x" * CHUNK}) + added)


@given(contents, st.data())
@settings(max_examples=60, deadline=None)
def test_a_disk_ends_in_zeros_to_its_sector_and_in_nothing_else(entries: dict[str, bytes], data: st.DataObject) -> None:
    raw = sealed(entries)
    disk = bytearray(raw + bytes(-len(raw) % SECTOR))

    def read(content: bytes) -> dict[str, bytes]:
        return unseal(io.BytesIO(content), KEY, where="disk", file_size=len(content), sector=SECTOR)

    assert read(bytes(disk)) == entries
    for other in (disk + bytes(SECTOR), disk[:-SECTOR]):
        with pytest.raises(SealedDataRefused):
            read(bytes(other))
    if len(disk) > len(raw):
        disk[data.draw(st.integers(len(raw), len(disk) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(SealedDataRefused, match="something was added"):
            read(bytes(disk))


@given(st.permutations(range(5)))
@settings(max_examples=60, deadline=None)
def test_chunks_keep_their_order(order: list[int]) -> None:
    entries = {"a": os.urandom(5 * CHUNK - 100)}
    header, chunks = chunks_of(sealed(entries))
    assert len(chunks) == 5
    raw = header + b"".join(chunks[i] for i in order)
    if order == sorted(order):
        assert opened(raw) == entries
    else:
        with pytest.raises(SealedDataRefused):
            opened(raw)


def test_a_repeated_chunk_is_refused() -> None:
    header, chunks = chunks_of(sealed({"a": b"x" * (3 * CHUNK)}))
    with pytest.raises(SealedDataRefused):
        opened(header + b"".join([chunks[0], chunks[0], *chunks[2:]]))


def test_dropping_whole_chunks_with_a_header_to_match_is_refused() -> None:
    """A host that shortens the file and corrects its size: neither the header nor the last chunk can be forged."""
    header, chunks = chunks_of(sealed({"a": b"x" * (3 * CHUNK)}))
    magic, bits, _, salt, commitment = HEADER.unpack(header)
    shorter = HEADER.pack(magic, bits, 2 * CHUNK, salt, commitment)
    for forged in (shorter, header):
        with pytest.raises(SealedDataRefused):
            opened(forged + b"".join(chunks[:2]))


def test_a_chunk_of_another_file_under_the_same_key_is_refused() -> None:
    header, ours = chunks_of(sealed({"a": b"x" * (3 * CHUNK)}))
    _, theirs = chunks_of(sealed({"a": b"y" * (3 * CHUNK)}, salt=b"\x01" * 32))
    with pytest.raises(SealedDataRefused, match="chunk 1"):
        opened(header + b"".join([ours[0], theirs[1], *ours[2:]]))


def test_another_key_is_told_from_damage() -> None:
    raw = sealed({"a": b"1"})
    with pytest.raises(SealedDataRefused, match="another key"):
        opened(raw, key=b"\x01" * 32)
    with pytest.raises(SealedDataRefused, match="32 bytes"):
        opened(raw, key=b"short")


def test_sizes_are_bounded_before_anything_is_allocated() -> None:
    raw = sealed({"a": b"x" * CHUNK * 4})
    with pytest.raises(SealedDataRefused, match="more than 4096"):
        opened(raw, max_bytes=4096)
    magic, bits, _, salt, commitment = HEADER.unpack(raw[: HEADER.size])
    with pytest.raises(SealedDataRefused, match="more than"):
        opened(HEADER.pack(magic, bits, 1 << 62, salt, commitment) + raw[HEADER.size :])


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0b", "é", "x" * 129])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(SealedDataRefused):
        sealed({name: b""})


def test_no_entry_is_refused() -> None:
    with pytest.raises(SealedDataRefused):
        sealed({})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "train.sealed"
    entries = {"train.csv": b"1,2\n" * 500_000, "README": b""}
    seal_file(path, entries, KEY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"1,2\n" not in path.read_bytes()
    assert open_file(path, KEY) == entries
    first = path.read_bytes()
    seal_file(path, entries, KEY)
    assert path.read_bytes() != first, "a fresh salt each time"
    assert [p.name for p in tmp_path.iterdir()] == ["train.sealed"], "no draft is left behind"
    with pytest.raises(SealedDataRefused):
        open_file(tmp_path, KEY)
    with pytest.raises(SealedDataRefused):
        open_file(tmp_path / "missing", KEY)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SealedDataRefused, match="not a sealed file"):
        open_file(tmp_path / "text", KEY)
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(SealedDataRefused, match="neither a regular file nor a disk"):
            open_file(path, KEY)


def authentic(plaintext: bytes) -> bytes:
    """A sealed file with a plaintext of the key holder's own making."""
    _, commitment = _derive(KEY, SALT)
    header = HEADER.pack(MAGIC, 12, len(plaintext), SALT, commitment)
    return header + AESGCM(_derive(KEY, SALT)[0]).encrypt(b"\0" * 11 + b"\x01", plaintext, header)


def indexed(index: bytes, rest: bytes = b"") -> bytes:
    return len(index).to_bytes(4, "big") + index + rest


@pytest.mark.parametrize(
    "plaintext",
    [
        b"\xff\xff\xff\xff",
        indexed(b""),
        indexed(b"{}"),
        indexed(b"[]"),
        indexed(b"[" * 3000),
        indexed(b'[{"name":"a","size":2}]', b"1"),
        indexed(b'[{"name":"a","size":1}]', b"12"),
        indexed(b'[{"name":"a","size":-1}]'),
        indexed(b'[{"name":"a","size":true}]', b"1"),
        indexed(b'[{"name":"a","size":1.0}]', b"1"),
        indexed(b'[{"name": "a","size":0}]'),
        indexed(b'[{"name":"../a","size":0}]'),
        indexed(b'[{"name":"a","size":0},{"name":"a","size":0}]'),
        indexed(b'[{"name":"b","size":0},{"name":"a","size":0}]'),
        indexed(b'[{"mode":1,"name":"a","size":0}]'),
        indexed(b'[{"name":1,"size":0}]'),
    ],
)
def test_a_key_holder_cannot_make_a_malformed_file_open(plaintext: bytes) -> None:
    assert opened(authentic(indexed(b'[{"name":"a","size":1}]', b"1"))) == {"a": b"1"}
    with pytest.raises(SealedDataRefused):
        opened(authentic(plaintext))
