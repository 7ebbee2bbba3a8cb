"""The guest's first program: its verity tree is veritysetup's, and it starts nothing that was not measured."""

from __future__ import annotations

import io
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_image.guest.init import Stop, check_root, main, read_boot, read_command_line, verity_tree
from cvm_image.rootfs import VERITY_UUID, make_rootfs, make_verity

GOOD = "ro roothash=aa sealwright.salt=bb sealwright.uuid=cc sealwright.entry=dd"


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128, 128 * 128 + 1])
def test_the_tree_is_the_one_that_veritysetup_makes(tmp_path: Path, blocks: int) -> None:
    (tmp_path / "data").write_bytes(b"".join(bytes([index % 251]) * 4096 for index in range(blocks)))
    root = make_verity(tmp_path / "data", tmp_path / "tree")
    with (tmp_path / "data").open("rb") as file:
        tree, root_hash = verity_tree(file, bytes.fromhex(root.salt), VERITY_UUID)
    assert root_hash == root.root_hash
    assert (tmp_path / "tree").read_bytes() == tree
    verified = ["veritysetup", "verify", str(tmp_path / "data"), str(tmp_path / "tree"), root_hash]
    subprocess.run(verified, check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, timeout=10)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 4 * 4096 - 1), bit=st.integers(0, 7))
def test_every_bit_of_the_data_counts(position: int, bit: int) -> None:
    data = bytes(range(256)) * 64
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    identity = uuid.UUID(int=1)
    assert verity_tree(io.BytesIO(changed), b"salt", identity)[1] != verity_tree(io.BytesIO(data), b"salt", identity)[1]


@pytest.mark.parametrize("data", [b"", b"short", bytes(4097)])
def test_data_that_are_not_whole_blocks_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"blocks|empty"):
        verity_tree(io.BytesIO(data), b"", uuid.UUID(int=0))


def test_every_byte_of_the_hash_device_counts(tmp_path: Path) -> None:
    make_rootfs({"etc/os-release": b"ID=sealwright\n"}, tmp_path / "root")
    root = make_verity(tmp_path / "root", tmp_path / "tree")
    parameters = dict(word.partition("=")[::2] for word in root.parameters().split())
    check_root(tmp_path / "root", tmp_path / "tree", parameters)
    tree = (tmp_path / "tree").read_bytes()
    for position in (*range(0, 512, 5), *range(512, len(tree), 97)):
        changed = bytearray(tree)
        changed[position] ^= 0x80
        (tmp_path / "tree").write_bytes(changed)
        with pytest.raises(Stop, match="verity tree"):
            check_root(tmp_path / "root", tmp_path / "tree", parameters)
    for content in (tree + b"\0", tree[:-1]):
        (tmp_path / "tree").write_bytes(content)
        with pytest.raises(Stop, match="verity tree"):
            check_root(tmp_path / "root", tmp_path / "tree", parameters)


def test_the_root_file_system_is_the_same_from_any_folder(tmp_path: Path) -> None:
    files = {"etc/os-release": b"ID=sealwright\n", "usr/share/a": bytes(10_000)}
    make_rootfs(files, tmp_path / "one")
    make_rootfs(dict(reversed(files.items())), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size % 4096 == 0


@pytest.mark.parametrize(
    ("cmdline", "words"),
    [
        (GOOD + " roothash=bb", "twice"),
        (GOOD + " ro", "twice"),
        (GOOD.replace("roothash=aa", ""), "roothash is not"),
        (GOOD.replace("sealwright.entry=dd", "sealwright.entry="), "entry is not"),
    ],
)
def test_a_command_line_that_is_not_clear_stops_the_guest(cmdline: str, words: str) -> None:
    with pytest.raises(Stop, match=words):
        read_command_line(cmdline)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roothash": "00" * 32}, "root file system is not the one"),
        ({"sealwright.salt": "00"}, "root file system is not the one"),
        ({"sealwright.salt": "zz"}, "parameters"),
        ({"sealwright.uuid": "none"}, "parameters"),
        ({"sealwright.uuid": str(uuid.UUID(int=5))}, "verity tree"),
    ],
)
def test_other_verity_parameters_stop_the_guest(tmp_path: Path, change: dict[str, str], words: str) -> None:
    (tmp_path / "data").write_bytes(bytes(8192))
    root = make_verity(tmp_path / "data", tmp_path / "tree")
    parameters = dict(word.partition("=")[::2] for word in root.parameters().split())
    with pytest.raises(Stop, match=words):
        check_root(tmp_path / "data", tmp_path / "tree", parameters | change)


@pytest.mark.parametrize(
    "boot", [b"", b"[]", b"{}", b'{"cmdline": "", "disks": {}}', b'{"cmdline": "", "disks": {"rootfs": 1}}']
)
def test_other_boot_parameters_stop_the_guest(tmp_path: Path, boot: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/boot.json").write_bytes(boot)
    with pytest.raises(Stop):
        read_boot(tmp_path)


def test_it_starts_in_an_isolated_interpreter_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path)]) == 1
    assert "not isolated" in capsys.readouterr().err
    assert main(["init"]) == 2
