"""A data volume on an NFS export, in a booted guest that has its key from a broker: server and network are hostile."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import one_broker
import pytest
from building import build_or_skip, copy_recipe
from nfs_server import PSEUDO, NfsServer, running_nfs_server
from one_broker import MEMBER, PLAN, Booted, Consortium, found, free_port, running_broker

from appliance.data_filling import fill_volume, make_volume
from appliance.data_volume import BLOCK, SLOT, read_header
from cvm_image.signing import create_signing_keys

pytestmark = pytest.mark.long

PROBE = Path(__file__).resolve().parent / "probe"
KEY = hashlib.sha256(b"a key of tests").digest()
VOLUME_KEY = f"{MEMBER}/key/scans"
SCAN = b"".join(hashlib.sha256(b"scan %d" % number).digest() for number in range(1 << 18))
"""8 MiB: no reading ahead has all of it."""
LIST = b"Jane Roe, born 1970-01-01\n" * 200
ON_EXPORT = f'user_data = "{VOLUME_KEY}" }}}}\nuser_data = {{{{ server = "10.0.2.2", path = "{PSEUDO}/volume" }}}}\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NfsServer]:
    """The server, with a volume as it was after its first fill and after its second beside the one that it shows."""
    with running_nfs_server(tmp_path_factory.mktemp("nfs")) as server:
        aside = server.folder.with_name("aside")
        make_volume(aside / "volume", 24, KEY)
        for name, files in (("one", {"list.csv": b"old", "north/scan": SCAN}), ("two", {"list.csv": LIST})):
            for inside, content in files.items():
                (aside / name / inside).parent.mkdir(parents=True, exist_ok=True)
                (aside / name / inside).write_bytes(content)
            for one in (aside / name, *(aside / name).rglob("*")):
                one.chmod(0o755 if one.is_dir() else 0o644)
            fill_volume(aside / "volume", aside / name, KEY)
            shutil.copy(aside / "volume", aside / f"after-{name}")
        show(server, "after-two")
        yield server


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, server: NfsServer) -> Iterator[Consortium]:
    """The broker has the volume's key and is in the server's network, in which guests are booted."""
    folder = tmp_path_factory.mktemp("export")
    recipe = copy_recipe(PROBE, "probe", folder / "recipe")
    recipe.write_text(recipe.read_text().replace("[network]\n", "[network]\nnfs = true\n"))
    port = free_port()
    recipe.write_text(recipe.read_text().replace("outbound = [9443]", f"outbound = [9443, {port}]"))
    image = build_or_skip(recipe, folder / "image", create_signing_keys(folder / "keys"))
    plan = PLAN.replace('vault = "{vault}" }}\n', f'vault = "{{vault}}", {ON_EXPORT}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_broker, "SEAL", [*server.inside(), *one_broker.SEAL])
        made = found(folder, image, port, plan=plan, more=[VOLUME_KEY])
        with running_broker(made, KEY, more=[VOLUME_KEY]):
            yield made


def show(server: NfsServer, name: str, *flipped: int) -> None:
    """The server shows a volume that was set aside, with a bit of these bytes flipped, in place of what it showed."""
    raw = bytearray((server.folder.with_name("aside") / name).read_bytes())
    for position in flipped:
        raw[position] ^= 1
    fresh = server.folder / "fresh"
    fresh.write_bytes(raw)
    fresh.replace(server.folder / "volume")


def block_of(server: NfsServer, number: int, block: int) -> int:
    """The position of a block of a layer in the volume as it is after its second fill."""
    with (server.folder.with_name("aside") / "after-two").open("rb") as file:
        layer = read_header(file, KEY).layers[number]
    return (layer.offset + (block if block >= 0 else layer.data + block)) * BLOCK


def ended(guest: Booted) -> str:
    """Why the guest ended."""
    events = guest.wait()
    return str((events.get("refused") or events.get("unusable") or {"what": guest.console()[-2000:]})["what"])


def test_the_guest_reads_its_files_and_can_do_nothing_else_with_the_server(
    consortium: Consortium, server: NfsServer
) -> None:
    before = (server.folder / "volume").read_bytes()
    with consortium.booted("whole") as guest:
        events = guest.wait()
    assert events["read"]["files"] == {
        "list.csv": f"done: {hashlib.sha256(LIST).hexdigest()}",
        "north/scan": f"done: {hashlib.sha256(SCAN).hexdigest()}",
    }
    attempts = events["volume"]["attempts"]
    assert len(attempts) == 6
    assert all(how.startswith(("errno", "TimeoutError")) for how in attempts.values()), attempts
    assert events["volume"]["listening"] == [], "the client waits for no call of the server's"
    assert [path.name for path in server.folder.iterdir()] == ["volume"]
    assert (server.folder / "volume").read_bytes() == before
    for secret in (LIST[:20], SCAN[:20], b"list.csv", b"north"):
        assert secret not in before, "the server and the network have nothing but this file"
    assert "Jane Roe" not in guest.console()


def test_what_the_server_changed_does_not_read_and_the_console_says_so(
    consortium: Consortium, server: NfsServer
) -> None:
    """A block of the scan, in the first layer; the file in the second layer reads as before."""
    show(server, "after-two", block_of(server, 0, -2) + 100)
    with consortium.booted("block") as guest:
        events = guest.wait()
    assert events["read"]["files"] == {
        "list.csv": f"done: {hashlib.sha256(LIST).hexdigest()}",
        "north/scan": "errno 5",
    }
    assert "is corrupted" in guest.console()


def test_a_changed_file_system_or_header_does_not_open(consortium: Consortium, server: NfsServer) -> None:
    show(server, "after-two", block_of(server, 1, 0) + 1024 + 50)
    with consortium.booted("superblock") as guest:
        assert "does not mount, a block of it was changed" in ended(guest)
    show(server, "after-two", 100, SLOT + 100)
    with consortium.booted("header") as guest:
        assert "header does not open" in ended(guest)


def test_an_older_volume_is_refused_by_the_guest_s_vault(consortium: Consortium, server: NfsServer) -> None:
    show(server, "after-one")
    with consortium.booted("older") as guest:
        assert "rolled back" in ended(guest)


def test_a_link_in_the_volume_s_place_is_not_followed(consortium: Consortium, server: NfsServer) -> None:
    show(server, "after-two")
    (server.folder / "other").hardlink_to(server.folder / "volume")
    (server.folder / "volume").unlink()
    (server.folder / "volume").symlink_to("other")
    try:
        with consortium.booted("link") as guest:
            assert "the volume cannot be opened" in ended(guest)
    finally:
        (server.folder / "volume").unlink()
        (server.folder / "other").rename(server.folder / "volume")


def test_a_server_that_falls_silent_gives_an_error_and_holds_nobody(consortium: Consortium, server: NfsServer) -> None:
    show(server, "after-two")
    try:
        with consortium.booted("silent", wish="slow") as guest:
            guest.wait("volume")
            os.kill(server.process.pid, signal.SIGSTOP)
            files = guest.wait("read", within=600)["read"]["files"]
            assert files["north/scan"] == "errno 5"
            assert guest.wait(within=300)["stopped"]
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_an_image_whose_recipe_says_no_nfs_lets_nobody_speak_to_a_server(
    consortium: Consortium, tmp_path: Path
) -> None:
    recipe = copy_recipe(PROBE, "probe", tmp_path / "recipe")
    image = build_or_skip(recipe, tmp_path / "image", create_signing_keys(tmp_path / "keys"))
    with consortium.booted("without", image=image) as guest:
        guest.wait()
        assert "this image's packet filter lets nobody speak to one" in guest.console()
        assert "attesting" not in guest.events()


def test_the_server_is_a_network_of_its_own(server: NfsServer) -> None:
    """What the tests above show is of this server, and of no other that the host may have."""
    done = subprocess.run(
        [*server.inside(), "ip", "-o", "link"], capture_output=True, text=True, check=True, timeout=30
    )
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["lo:"]
