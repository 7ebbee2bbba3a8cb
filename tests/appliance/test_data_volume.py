"""A site's data volume: its owner makes what a guest's kernel is told to open; what a host changes is refused.

The kernel's part (dm-crypt, dm-verity) is seen in booted guests: tests/cvm_image/build/test_data_of_a_guest.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from appliance import data_filling, node
from appliance.commands import site, vm
from appliance.data_filling import fill_volume, grow_volume, make_volume, volume_facts
from appliance.data_volume import (
    BLOCK,
    FIRST_BLOCK,
    MAX_LAYERS,
    SLOT,
    DataVolumeRefused,
    Header,
    Layer,
    mappings,
    sealed_header,
)
from appliance.data_volume import read_header as read_header_of
from appliance.user_data_export import CLIENT
from attestation.attester.boot import Boot
from fl.guard.sealed_data import seal as seal_entries
from fl.guard.sealed_data import seal_file
from policies.errors import Unusable
from policies.init_data import DataExport, InitData

KEY = bytes(range(32))
MARK = b"Jane Roe, born 1970-01-01\n"


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    for program in ("mkfs.erofs", "fsck.erofs", "veritysetup"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed (apt-get install erofs-utils cryptsetup-bin)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some data, in folders."""
    made = tmp_path / "scans"
    (made / "north").mkdir(parents=True)
    (made / "list.csv").write_bytes(MARK * 500)
    (made / "north" / "one.bin").write_bytes(os.urandom(3 * BLOCK + 7))
    for path in (made, *made.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return made


@pytest.fixture
def volume(tmp_path: Path, folder: Path) -> Path:
    """A volume that was filled once."""
    path = tmp_path / "disks/user-data"
    make_volume(path, 4, KEY)
    fill_volume(path, folder, KEY)
    return path


def read_header(path: Path, key: bytes = KEY) -> Header:
    with path.open("rb") as file:
        return read_header_of(file, key)


def decrypted(volume: Path, layer: Layer, target: Path) -> Path:
    """The layer in clear, as dm-crypt documents `aes-xts-plain64` (a sector's number, 64 bits, little-endian)."""
    raw = volume.read_bytes()[layer.offset * BLOCK : layer.end * BLOCK]
    clear = bytearray()
    for number in range(layer.data + layer.tree):
        tweak = (number * 8).to_bytes(8, "little") + bytes(8)
        decryptor = Cipher(algorithms.AES(bytes.fromhex(layer.key)), modes.XTS(tweak)).decryptor()
        clear += decryptor.update(raw[number * BLOCK :][:BLOCK])
    target.write_bytes(clear)
    return target


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def verified(clear: Path, layer: Layer) -> bool:
    """Whether veritysetup, by the words of the layer's table, finds every block as it was."""
    done = run(
        "veritysetup", "verify", "--no-superblock", "--hash=sha256", f"--data-blocks={layer.data}",
        f"--salt={layer.salt}", f"--hash-offset={layer.data * BLOCK}", clear, clear, layer.root,
    )  # fmt: skip
    return done.returncode == 0


def files_of(clear: Path, target: Path) -> dict[str, bytes]:
    """The files of a layer in clear, taken out by erofs-utils."""
    done = run("fsck.erofs", f"--extract={target}", clear)
    assert done.returncode == 0, done.stderr
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_a_guest_s_kernel_would_find_the_owner_s_files(volume: Path, folder: Path, tmp_path: Path) -> None:
    (layer,) = read_header(volume).layers
    clear = decrypted(volume, layer, tmp_path / "clear")
    assert verified(clear, layer)
    assert files_of(clear, tmp_path / "out") == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    ((crypt, verity),) = mappings(read_header(volume), "/dev/vdz")
    assert crypt.table == (
        f"0 {(layer.data + layer.tree) * 8} crypt aes-xts-plain64 {layer.key} 0 /dev/vdz {FIRST_BLOCK * 8} "
        "1 sector_size:4096"
    )
    assert verity.table.endswith(f"4096 4096 {layer.data} {layer.data} sha256 {layer.root} {layer.salt}")


def test_any_changed_block_is_seen(volume: Path, tmp_path: Path) -> None:
    (layer,) = read_header(volume).layers
    for block in (layer.offset, layer.offset + layer.data - 1, layer.offset + layer.data):
        raw = bytearray(volume.read_bytes())
        raw[block * BLOCK + 17] ^= 1
        (tmp_path / "changed").write_bytes(raw)
        assert not verified(decrypted(tmp_path / "changed", layer, tmp_path / "clear"), layer), block


def test_the_host_sees_no_file_and_no_name(volume: Path) -> None:
    raw = volume.read_bytes()
    assert not any(word in raw for word in (MARK.strip(), b"list.csv", b"north", KEY))
    (layer,) = read_header(volume).layers
    assert bytes.fromhex(layer.salt) not in raw
    assert volume.stat().st_mode & 0o777 == 0o600


def test_fills_are_laid_over_one_another_each_under_a_key_of_its_own(
    volume: Path, folder: Path, tmp_path: Path
) -> None:
    before = volume.read_bytes()
    fill_volume(volume, folder, KEY)
    header = read_header(volume)
    first, second = header.layers
    assert header.generation == 3
    assert second.offset == first.end
    assert len({first.key, second.key, first.salt, second.salt}) == 4
    assert (
        volume.read_bytes()[first.offset * BLOCK : first.end * BLOCK]
        == before[first.offset * BLOCK :][: (first.data + first.tree) * BLOCK]
    )
    assert volume_facts(volume, KEY)["fills"] == 2


def test_a_fill_that_is_cut_off_leaves_what_was(volume: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment before its header: what was written is room, and the next fill goes over it."""
    before = read_header(volume)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data_filling, "_write_header", cut)
        with pytest.raises(KeyboardInterrupt):
            fill_volume(volume, folder, KEY)
    assert read_header(volume) == before
    # The new header itself, cut off in the middle: the one before is in the other place.
    newer = Header(volume=before.volume, generation=before.generation + 1, layers=[])
    with volume.open("r+b") as file:
        place, sealed = sealed_header(newer, KEY)
        file.seek(place)
        file.write(sealed[:100])
    assert read_header(volume) == before
    fill_volume(volume, folder, KEY)
    assert len(read_header(volume).layers) == 2


def test_another_key_a_changed_header_and_another_file_are_refused(volume: Path) -> None:
    with pytest.raises(DataVolumeRefused, match="another key, or its header was changed"):
        read_header(volume, bytes(32))
    with pytest.raises(Unusable, match="32 bytes"):
        read_header(volume, b"short")
    with volume.open("r+b") as file:
        for number in range(2):
            file.seek(number * SLOT + 100)
            byte = file.read(1)
            file.seek(number * SLOT + 100)
            file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataVolumeRefused, match="does not open"):
        read_header(volume)
    volume.write_bytes(bytes(2 * SLOT))
    with pytest.raises(DataVolumeRefused, match="does not open: it is too short"):
        read_header(volume)


@given(st.binary(max_size=200), st.integers(0, 2 * SLOT - 200), st.booleans())
def test_any_bytes_are_a_header_or_refused(junk: bytes, place: int, whole: bool) -> None:
    made = Header(volume="ab" * 16, generation=7, layers=[])
    raw = bytearray(2 * SLOT)
    at, sealed = sealed_header(made, KEY)
    raw[at : at + SLOT] = sealed
    raw[place : place + len(junk)] = junk
    with contextlib.suppress(DataVolumeRefused):
        assert read_header_of(io.BytesIO(junk if whole else bytes(raw)), KEY) == made


def layer(**more: Any) -> dict[str, Any]:
    return {"offset": 16, "data": 2, "tree": 1, "key": "ab" * 64, "salt": "cd" * 32, "root": "ef" * 32} | more


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([layer(offset=17)], "places a layer at block 17, not 16"),
        ([layer(), layer()], "places a layer at block 16, not 19"),
        ([layer(offset=0)], "no header of ours"),
        ([layer(data=1 << 40)], "no header of ours"),
        ([layer(key="0 0 /dev/sda 0 ")], "no header of ours"),
        ([layer(extra=1)], "no header of ours"),
    ],
)
def test_even_a_key_holder_s_header_is_read_strictly(tmp_path: Path, layers: list[Any], said: str) -> None:
    document = {"version": 1, "volume": "ab" * 16, "generation": 1, "layers": layers}
    sealed = b"".join(seal_entries({"header": json.dumps(document).encode()}, KEY, salt=os.urandom(32)))
    (tmp_path / "volume").write_bytes(sealed.ljust(2 * SLOT, b"\0"))
    with pytest.raises(DataVolumeRefused, match=re.escape(said)):
        read_header(tmp_path / "volume")


def test_sizes_are_settings(volume: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "large").write_bytes(os.urandom(4 << 20))
    (folder / "large").chmod(0o644)
    with pytest.raises(Unusable, match=r"has room for 3 MiB, and these files need \d+.*seal vm data grow"):
        fill_volume(volume, folder, KEY)
    with pytest.raises(Unusable, match="has 4 MiB already"):
        grow_volume(volume, 3)
    assert grow_volume(volume, 16) == 4
    assert volume_facts(volume, KEY)["mib"] == 16
    fill_volume(volume, folder, KEY)
    assert read_header(volume).generation == 3
    with pytest.raises(Unusable, match="something already"):
        make_volume(volume, 4, KEY)


def test_a_volume_is_not_filled_for_ever(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "full"
    make_volume(path, 1, KEY)
    layers = [Layer(**layer(offset=FIRST_BLOCK + 3 * number)) for number in range(MAX_LAYERS)]
    place, sealed = sealed_header(Header(volume="ab" * 16, generation=33, layers=layers), KEY)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(sealed)
    assert len(read_header(path).layers) == MAX_LAYERS
    with pytest.raises(Unusable, match="filled 32 times"):
        fill_volume(path, folder, KEY)


def test_what_no_script_could_read_is_told_before(volume: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").chmod(0o640)
    with pytest.raises(Unusable, match="others may not read this"):
        fill_volume(volume, folder, KEY)
    (folder / "list.csv").chmod(0o644)
    (folder / "away").symlink_to("/etc/passwd")
    with pytest.raises(Unusable, match="neither a file nor a folder"):
        fill_volume(volume, folder, KEY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unusable, match="no file"):
        fill_volume(volume, tmp_path / "empty", KEY)
    (folder / "away").rename(tmp_path / "away")
    with pytest.raises(Unusable, match="cannot be opened"):
        fill_volume(tmp_path / "away", folder, KEY)


def seal(noun: typer.Typer, *words: object) -> dict[str, Any]:
    """The verb in this process; what it prints, or what it raises."""
    done = CliRunner().invoke(noun, [*map(str, words), "--json"])
    if done.exception is not None:
        raise done.exception
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_verbs(tmp_path: Path, folder: Path) -> None:
    key, disk = tmp_path / "volume.key", tmp_path / "kit/local/disks/user-data"
    seal(site.app, "key", key)
    assert seal(vm.app, "data", "make", disk, "--size", 4, "--key", key)["mib"] == 4
    assert seal(vm.app, "data", "fill", disk, folder, "--key", key)["generation"] == 2
    assert seal(vm.app, "data", "grow", disk, "--size", 8)["before_mib"] == 4
    shown = seal(vm.app, "data", "show", disk, "--key", key)
    assert (shown["mib"], shown["fills"], shown["used_mib"]) == (8, 1, 1)
    with pytest.raises(Unusable, match="there is something already"):
        seal(vm.app, "data", "make", disk, "--size", 4, "--key", key)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(Unusable, match="has 32 bytes, not 5"):
        seal(vm.app, "data", "show", disk, "--key", key)


def test_a_site_opens_what_its_init_data_name_keys_of(tmp_path: Path, volume: Path) -> None:
    """Before anything is mounted: a site without any data, without the disk, or with another key, is told so."""
    sealed = tmp_path / "data.sealed"
    seal_file(sealed, {"train.csv": b"1,2"}, KEY)
    disks = {"data": sealed, "user-data": volume}
    nobody = cast(node.Lease, None)
    export = DataExport(server="192.0.2.7", path="/exports/volume")

    def opened(keys: dict[str, bytes], shown: dict[str, Path], at: DataExport | None = None) -> dict[str, bytes]:
        boot = Boot(tmp_path, {}, b"", "virtual", None, shown)
        with node.site_data(cast(InitData, SimpleNamespace(user_data=at)), boot, nobody, keys) as data:
            assert data.folder is None
            return dict(data)

    assert opened({"data": KEY, "model": KEY}, disks) == {"train.csv": b"1,2"}
    for keys, shown, said in (
        ({"model": KEY}, disks, "needs a resource for the purpose `data` or `user_data`"),
        ({"data": KEY}, {"user-data": volume}, "needs a disk `data`"),
        ({"data": KEY, "user_data": KEY}, {"data": sealed}, "needs a disk `user-data`"),
        ({"data": KEY, "user_data": b"short"}, disks, "a resource of 32 bytes for the purpose `user_data`"),
    ):
        with pytest.raises(Unusable, match=said):
            opened(keys, shown)
    with pytest.raises(DataVolumeRefused, match="another key"):
        opened({"user_data": bytes(32)}, disks)
    with pytest.raises(Unusable, match="needs a resource for the purpose `user_data`"):
        opened({"data": KEY}, disks, export)
    if not CLIENT.exists():
        with pytest.raises(Unusable, match="kernel has no NFS client"):
            opened({"user_data": KEY}, disks, export)
