"""A host attacks a guest that it boots: every change ends in a sentence that says which, and no key was released.

One broker runs as a process; guests are booted from the probe's image under emulation, through `seal vm boot`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from building import build_or_skip, copy_recipe
from one_broker import BROKER, GUEST, MODEL_KEY, VAULT, Consortium, found, free_port, running_broker

from appliance.luks_header import DATA_AT, METADATA
from attestation.broker.storage import read_database
from attestation.ledger.entry import parse_entry
from cvm_image.signing import create_signing_keys

pytestmark = pytest.mark.long

PROBE = Path(__file__).resolve().parent / "probe"
KEY = hashlib.sha256(b"the key of a test").digest()
MARK = b"Jane Roe, born 1970-01-01"
WEIGHTS = struct.pack("<20f", *(1 / (3 + number) for number in range(20)))
"""How the weights begin that the guest keeps in its vault."""
LATE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(512))
"""What the file that is read last holds: it does not compress, so that its bytes stand in the root as they are."""
OTHER_INIT_DATA = """
import sys
from pathlib import Path
import appliance.booted_guest as booted
honest = booted.boot_command
other = Path(sys.argv.pop(1)).read_bytes()
booted.boot_command = lambda *words, init_data, **more: honest(*words, init_data=other, **more)
from appliance.cli import main
main()
"""
"""A host whose secure processor is told of the enrolled init-data, while the guest's disk holds others."""


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """The consortium with its broker running; the image lets its guests call that broker's port."""
    folder, port = tmp_path_factory.mktemp("attacked"), free_port()
    recipe = copy_recipe(PROBE, "probe", folder / "recipe")
    recipe.write_text(recipe.read_text().replace("outbound = [9443]", f"outbound = [{port}]"))
    (recipe.parent / "files/usr/lib/sealwright/late").write_bytes(LATE)
    image = build_or_skip(recipe, folder / "image", create_signing_keys(folder / "keys"))
    (folder / "members").mkdir()
    made = found(folder / "members", image, port)
    with running_broker(made, KEY):
        yield made


@pytest.fixture(scope="module")
def lived(consortium: Consortium) -> Path:
    """The disk of a vault in which an honest guest has kept a record, twice; beside it, as it was between the two."""
    disk = consortium.folder / "lived.img"
    for name in ("first", "second"):
        with consortium.booted(name, vault=disk) as guest:
            events = guest.wait()
            assert "stopped" in events, guest.console()[-3000:]
        if name == "first":
            shutil.copy(disk, older(disk))
    assert events["opened vault"]["generation"] == 3
    assert events["probe"]["keys"] == {"model": hashlib.sha256(KEY).hexdigest()}
    assert events["probe"]["record"] == hashlib.sha256((MARK + b"\n") * 200_000).hexdigest()
    assert "Power down" in guest.console()
    return disk


def older(disk: Path) -> Path:
    return disk.with_suffix(".older")


@pytest.fixture
def released(consortium: Consortium) -> Callable[[], int]:
    """How many keys, the model's and the vault's, the broker has given since the test began."""
    database = consortium.folder / f"kits/broker-{BROKER}/local/state/broker.sqlite"

    def count() -> int:
        entries = map(parse_entry, read_database(database, lambda step: step.entries(0, step.size())))
        kinds = [entry.kind for entry in entries if MODEL_KEY in str(entry.body) or VAULT in str(entry.body)]
        return sum(kind in {"release", "vault"} for kind in kinds)

    before = count()
    return lambda: count() - before


def changed_copy(consortium: Consortium, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the image, its root linked as it is unless `change` writes it anew."""
    shutil.copytree(consortium.image, folder)
    change(folder)
    return folder


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def change_firmware(image: Path) -> None:
    """One byte of its padding, so that it runs as before."""
    raw = (image / "firmware.fd").read_bytes()
    flip(image / "firmware.fd", raw.index(b"\xff" * 4096) + 2048)


def change_kernel(image: Path) -> None:
    """One byte of the signature at its end, which nothing here reads."""
    flip(image / "kernel", (image / "kernel").stat().st_size - 16)


def change_initrd(image: Path) -> None:
    """Zeros after the archive, which a kernel skips."""
    with (image / "initrd").open("ab") as file:
        file.write(bytes(4))


def change_cmdline(image: Path) -> None:
    """One letter, of the log level."""
    cmdline = (image / "cmdline").read_text()
    assert "loglevel=5" in cmdline
    (image / "cmdline").write_text(cmdline.replace("loglevel=5", "loglevel=6"))


MEASURED = {
    "firmware": change_firmware,
    "kernel": change_kernel,
    "initrd": change_initrd,
    "command line": change_cmdline,
}


@pytest.mark.parametrize("part", MEASURED)
def test_a_changed_measured_part_is_not_started_under_the_image_s_id_block(
    consortium: Consortium, tmp_path: Path, released: Callable[[], int], part: str
) -> None:
    image = changed_copy(consortium, tmp_path / "image", MEASURED[part])
    with consortium.booted(f"refused {part}".replace(" ", "-"), image=image) as guest:
        guest.wait(within=60)
    assert "the secure processor refuses the launch" in guest.console(), guest.console()
    assert "measurement" in guest.console()
    assert released() == 0


@pytest.mark.parametrize("part", MEASURED)
def test_a_changed_measured_part_gets_no_key_though_all_digests_were_made_anew(
    consortium: Consortium, tmp_path: Path, released: Callable[[], int], part: str
) -> None:
    """The host starts it without the ID block; hash table and measurement are those of the changed files."""
    image = changed_copy(consortium, tmp_path / "image", MEASURED[part])
    with consortium.booted(f"boots {part}".replace(" ", "-"), image=image, id_block=False) as guest:
        events = guest.wait()
    assert "released" not in events
    assert any("measurement" in reason for reason in events["refused"]["reasons"]), events
    assert "the role ended with status 1" in guest.console()
    assert "Power down" in guest.console()
    assert released() == 0


def foreign(consortium: Consortium, folder: Path) -> Path:
    """Init-data that name another guest of the same charter."""
    text = consortium.init_data.read_text()
    other = folder / "other.toml"
    other.write_text(re.sub(GUEST, "acme-other", text, count=1))
    assert other.read_text() != text
    return other


def test_init_data_that_nobody_enrolled_get_no_key(
    consortium: Consortium, tmp_path: Path, released: Callable[[], int]
) -> None:
    """HOST_DATA is their digest: the host computed it anew."""
    with consortium.booted("foreign", init_data=foreign(consortium, tmp_path)) as guest:
        events = guest.wait()
    assert "enrolled" in str(events["refused"]["reasons"]), events
    assert released() == 0


def test_init_data_that_host_data_do_not_bind_get_no_key(
    consortium: Consortium, tmp_path: Path, released: Callable[[], int]
) -> None:
    words = consortium.boot_line("unbound")
    line = [sys.executable, "-c", OTHER_INIT_DATA, str(foreign(consortium, tmp_path)), *words[3:]]
    with consortium.booted("unbound", line) as guest:
        events = guest.wait()
    assert events["attesting"]["name"] == "acme-other"
    assert "HOST_DATA" in str(events["refused"]).upper(), events
    assert released() == 0


# --- the vault --------------------------------------------------------------------------------------------------------


def test_no_file_of_the_host_s_holds_a_record_a_weight_or_a_key_in_clear(consortium: Consortium, lived: Path) -> None:
    """Disks, run folders, consoles: all that a host keeps when the guest is off."""
    digest = hashlib.sha256(KEY).hexdigest().encode()
    own = [consortium.folder / name for name in ("model.key", "kits")]
    seen = 0
    for path in sorted(consortium.folder.rglob("*")):
        if not path.is_file() or any(path.is_relative_to(one) for one in own):
            continue
        raw = path.read_bytes()
        assert MARK not in raw, path
        assert WEIGHTS not in raw, path
        assert KEY not in raw, path
        seen += digest in raw
    assert seen >= 1, "the consoles, in which the key's digest stands, were not among what was searched"
    assert lived.stat().st_blocks > 0


def test_a_block_of_the_root_that_is_read_last_stops_the_guest_there(
    consortium: Consortium, lived: Path, tmp_path: Path
) -> None:
    """The guest runs, with its keys and its vault, until it comes to the block: what comes after never runs.

    The vault is none the worse: the next boot, in the tests below, goes on from it.
    """

    def change(image: Path) -> None:
        raw = (image / "rootfs.erofs").read_bytes()
        flip(image / "rootfs.erofs", raw.index(LATE[4096:8192]) + 100)

    image = changed_copy(consortium, tmp_path / "image", change)
    with consortium.booted("late", image=image, wish="late", vault=lived) as guest:
        events = guest.wait()
    assert "probe" in events
    assert "late" not in events
    assert "stopped" not in events
    assert re.search(r"verity: .*data block \d+ is corrupted", guest.console()), guest.console()[-2000:]


def refused_with(consortium: Consortium, name: str, disk: Path) -> str:
    """Boot with this disk; the sentence with which it is refused, seen on the console before the machine is off."""
    with consortium.booted(name, vault=disk) as guest:
        events = guest.wait()
    assert "opened vault" not in events
    assert "released" not in events
    assert "probe" not in events
    assert "Power down" in guest.console()
    return " / ".join([str(events["refused"]["what"]), *events["refused"]["reasons"]])


def test_a_vault_that_was_rolled_back_is_refused(consortium: Consortium, lived: Path, tmp_path: Path) -> None:
    disk = Path(shutil.copy(older(lived), tmp_path / "vault.img"))
    assert "the disk was rolled back" in refused_with(consortium, "rolled-back", disk)


def test_a_vault_whose_header_was_changed_is_refused(consortium: Consortium, lived: Path, tmp_path: Path) -> None:
    """The header names a cipher that encrypts nothing, so that any key would open it; its checksums hold."""
    disk = Path(shutil.copy(lived, tmp_path / "vault.img"))
    with disk.open("r+b") as file:
        for number in (0, 1):
            file.seek(number * METADATA)
            raw = file.read(METADATA)
            text, _, _ = raw[4096:].partition(b"\0")
            document = json.loads(text)
            document["segments"]["0"]["encryption"] = "cipher_null-ecb"
            fresh = json.dumps(document, separators=(",", ":")).encode().ljust(METADATA - 4096, b"\0")
            cleared = raw[:448] + bytes(64) + raw[512:4096] + fresh
            digest = hashlib.sha256(cleared).digest().ljust(64, b"\0")
            file.seek(number * METADATA)
            file.write(cleared[:448] + digest + cleared[512:])
    told = refused_with(consortium, "null-cipher", disk)
    assert "header is refused: segments.0.encryption" in told


def test_a_vault_whose_data_were_changed_is_refused(consortium: Consortium, lived: Path, tmp_path: Path) -> None:
    disk = Path(shutil.copy(lived, tmp_path / "vault.img"))
    size = disk.stat().st_size
    with disk.open("r+b") as file:
        for position in range(DATA_AT + (1 << 20), size, 4096):
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 1]))
    assert "was changed" in refused_with(consortium, "changed-data", disk)


def test_a_clone_takes_the_vault_over_and_the_guest_before_it_stops(
    consortium: Consortium, lived: Path, tmp_path: Path
) -> None:
    """Two of the same guest run, each with a copy of the disk: at its next renewal the older one is refused."""
    first = Path(shutil.copy(lived, tmp_path / "first.img"))
    with consortium.booted("original", vault=first, wish="stay") as original:
        original.wait("probe")
        second = Path(shutil.copy(first, tmp_path / "second.img"))
        with consortium.booted("clone", vault=second, wish="stay", chip="chip2") as clone:
            clone.wait("probe")
            events = original.wait(within=180)
            assert "a newer boot of this guest holds the vault" in str(events["refused"]), events
            assert "closed vault" in events
            assert "Power down" in original.console()
            assert clone.process.poll() is None
    with consortium.booted("stale", vault=first) as guest:
        assert "the disk was rolled back" in str(guest.wait()["refused"])
