"""The parts of the build that need no tools tree: what is loaded in which order, what goes in, what QEMU is told."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from cvm_image import qemu
from cvm_image.build.commands import run
from cvm_image.build.disk import Root, read_argument
from cvm_image.build.errors import BuildFailed, MissingInput, UnusableHost, UnusableRecipe
from cvm_image.build.image import ARGUMENTS, command_line
from cvm_image.build.initrd import loading_order, module_index
from cvm_image.build.lock import LockedWheel
from cvm_image.build.netfilter import packet_filter
from cvm_image.build.recipe import Kernel, Network, Recipe, Workload
from cvm_image.build.store import Store, content_key, digest_file
from cvm_image.build.trees import settle
from cvm_image.build.workload import OURS, PATH_FILE, WHEELS, WORLD_FILE, collect, lay_out_wheels

INDEX = module_index(
    "kernel/drivers/md/dm-mod.ko.xz:\n"
    "kernel/drivers/md/dm-bufio.ko.xz: kernel/drivers/md/dm-mod.ko.xz\n"
    "kernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-bufio.ko.xz kernel/drivers/md/dm-mod.ko.xz\n"
)
ROOT = Root(blocks=10, root_hash="ab" * 32, offset=72, length=8)


def recipe(**more: object) -> Recipe:
    return Recipe.model_validate({"name": "tiny", "init": "/init", "variant": "virtual", **more})


def test_modules_load_after_what_they_need_and_built_in_ones_do_not() -> None:
    assert loading_order(["dm-verity", "dm_mod"], INDEX, set()) == ["dm_mod", "dm_bufio", "dm_verity"]
    assert loading_order(["dm_verity", "virtio_pci"], INDEX, {"virtio_pci", "dm_mod"}) == ["dm_bufio", "dm_verity"]
    with pytest.raises(UnusableRecipe, match="no module floppy"):
        loading_order(["floppy"], INDEX, set())


def test_the_command_line_names_one_root_and_no_recipe_weakens_it() -> None:
    line = command_line(recipe(kernel=Kernel(arguments=("quiet",))), ROOT)
    assert read_argument(line) == ROOT
    assert set(ARGUMENTS) <= set(line.split())
    assert line.split()[-1] == "init=/init"
    assert read_argument(line + " " + ROOT.argument()) is None
    assert read_argument(line.replace("ab", "AB")) is None
    for word in ("init=/bin/sh", "lockdown=none", "random.trust_bootloader=1", "rdinit=/x"):
        with pytest.raises(UnusableRecipe, match="may not set"):
            command_line(recipe(kernel=Kernel(arguments=(word,))), ROOT)


def test_the_packet_filter_drops_all_but_the_named_ports() -> None:
    rules = packet_filter(Network(inbound=(8443,), outbound=(9443, 8443)))
    assert rules.count("policy drop") == 3
    assert "tcp dport { 8443 } ct state new accept" in rules
    assert "tcp dport { 8443, 9443 } ct state new accept" in rules
    assert "tcp dport" not in packet_filter(Network())


def test_the_way_to_an_nfs_server_is_in_rules_and_drivers_only_if_the_recipe_says_so() -> None:
    recipe = {"name": "a", "init": "/init", "kernel": {"modules": ["dm_crypt"]}}
    without, having = (Recipe.model_validate({**recipe, "network": {"nfs": nfs}}) for nfs in (False, True))
    assert "2049" not in packet_filter(without.network)
    assert "ip daddr @nfs_server tcp dport 2049 ct state new accept" in packet_filter(having.network)
    assert "elements" not in packet_filter(having.network), "the set is empty until process 1 has read the init-data"
    assert (without.modules(), having.modules()) == (("dm_crypt",), ("dm_crypt", "loop", "nfsv4"))


def test_the_workload_is_our_packages_and_the_recipes_files(tmp_path: Path) -> None:
    (tmp_path / "more" / "usr").mkdir(parents=True)
    (tmp_path / "more" / "usr" / "start").write_text("#!x\n")
    (tmp_path / "more" / "usr" / "start").chmod(0o755)
    (tmp_path / "more" / "usr" / ".hidden").write_text("")
    where = tmp_path / "tiny.toml"
    files = collect(recipe(workload=Workload(packages=True, files="more")), where)
    assert files[WORLD_FILE].data == b"virtual\n"
    assert files[PATH_FILE].data == f"/{WHEELS}\n".encode()
    assert files["usr/start"].executable
    assert "usr/.hidden" not in files
    assert f"{OURS}/attestation/attester/virtual_port.py" in files
    assert not [
        name for name in files if name.startswith((f"{OURS}/attestation/virtual/", f"{OURS}/attestation/broker/"))
    ]
    hardware = collect(recipe(variant="hardware", workload=Workload(packages=True)), where)
    assert hardware[WORLD_FILE].data == b"hardware\n"
    assert f"{OURS}/attestation/attester/virtual_port.py" not in hardware


def test_a_link_among_the_recipes_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "link").symlink_to("/etc/passwd")
    with pytest.raises(UnusableRecipe, match="no plain file"):
        collect(recipe(workload=Workload(files="more")), tmp_path / "tiny.toml")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "pkg/../../outside"])
def test_a_wheel_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "cache")
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"x")
    digest = digest_file(wheel)
    wheel.rename(store.input(digest))
    locked = LockedWheel(name="w", version="1", file="w-1-py3-none-any.whl", size=1, sha256=digest)
    with pytest.raises(MissingInput, match="holds the name"):
        lay_out_wheels([locked], store, tmp_path / "tree")
    assert not (tmp_path / "x").exists()


def test_a_wheels_scripts_stay_out_and_its_libraries_go_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/__init__.py", b"x")
        archive.writestr("w-1.data/scripts/run", b"x")
        archive.writestr("w-1.data/purelib/w/more.py", b"y")
    digest = digest_file(wheel)
    wheel.rename(store.input(digest))
    locked = LockedWheel(name="w", version="1", file="w-1-py3-none-any.whl", size=1, sha256=digest)
    lay_out_wheels([locked], store, tmp_path / "tree")
    files = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    assert files == {tmp_path / "tree" / WHEELS / "w" / name: 0o644 for name in ("__init__.py", "more.py")}
    assert (tmp_path / "tree" / WHEELS / "w/more.py").read_bytes() == b"y"


def test_a_damaged_input_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    file = tmp_path / "file"
    file.write_bytes(b"right")
    digest = digest_file(file)
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / digest).write_bytes(b"wrong")
    assert not Store(tmp_path / "other", archive=archive).holds(digest)
    store.input(digest).write_bytes(b"wrong")
    assert not store.holds(digest)
    store.input(digest).write_bytes(b"right")
    assert store.holds(digest)
    more = {hashlib.sha256(b"recipe").hexdigest(): b"recipe"}
    assert store.export_inputs([digest], tmp_path / "kept", more=more) == 2
    with pytest.raises(MissingInput):
        store.export_inputs(["0" * 64], tmp_path / "kept", more={})
    assert Store(tmp_path / "third", archive=tmp_path / "kept").holds(digest)


def test_what_is_made_is_whole_or_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = content_key("thing", rules=(), size=1)
    assert key != content_key("thing", rules=(), size=2) != content_key("thing", rules=("disk",), size=2)
    with pytest.raises(FileNotFoundError), store.making(key) as folder:
        (folder / "resul").write_text("half")
    assert store.made(key) is None
    with store.making(key) as folder:
        (folder / "result").write_text("whole")
    made = store.made(key)
    assert made is not None
    assert made.read_text() == "whole"
    assert not list(tmp_path.glob("making-*"))


def test_settling_a_tree_removes_what_differs_and_every_set_id_bit(tmp_path: Path) -> None:
    for name in ("etc/machine-id", "etc/shadow", "usr/bin/su", "usr/bin/bash", "var/log/apt/term.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "usr/bin/su").chmod(0o4755)
    settle(tmp_path, remove=("usr/bin/ba*",))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["etc/shadow", "usr/bin/su"]
    assert (tmp_path / "usr/bin/su").stat().st_mode & 0o7777 == 0o755


def test_a_failing_command_is_shown_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(["echo", "fine"], what="a test", log=log, timeout=5) == "fine\n"
    with pytest.raises(BuildFailed, match="a test failed with exit status 1") as failed:
        run(["cat", "/nowhere/at/all"], what="a test", log=log, timeout=5)
    assert failed.value.reasons[0] == "command: cat /nowhere/at/all"
    assert "No such file" in failed.value.reasons[-1]
    with pytest.raises(BuildFailed, match="did not end within"):
        run(["sleep", "30"], what="a test", log=log, timeout=0.2)
    with pytest.raises(UnusableHost, match="not installed"):
        run(["no-such-program-here"], what="a test", log=log, timeout=5)


def machine(**more: object) -> qemu.Machine:
    return qemu.Machine(image=Path("/i"), serial=Path("/r/serial.log"), **more)  # type: ignore[arg-type]


def test_a_guest_gets_no_monitor_display_or_unnamed_device() -> None:
    words = qemu.virtual_command(
        machine(), cmdline="a b", hash_table=Path("/r/hashes"), table_address=0x1000, kvm=False
    )
    line = " ".join(words)
    for part in ("-nodefaults", "-no-user-config", "-monitor none", "-display none", "-no-reboot"):
        assert part in line
    assert "netdev" not in line
    assert "virtserialport" not in line
    assert words[words.index("-append") + 1] == "a b"
    assert "loader,file=/r/hashes,addr=0x1000,force-raw=on" in words
    assert line.count("readonly=on") == 2


def test_the_hardware_launch_names_what_the_processor_binds() -> None:
    launch = qemu.HardwareLaunch(policy=0x30000, host_data=b"\x01" * 32, id_block=b"\x02" * 96, id_auth=b"\x03" * 4096)
    words = qemu.hardware_command(machine(memory_mib=2048), launch, cmdline="x")
    guest = next(word for word in words if word.startswith("sev-snp-guest"))
    assert "policy=0x30000" in guest
    assert "kernel-hashes=on" in guest
    assert "author-key-enabled=on" in guest
    assert "host-data=AQEB" in guest
    assert not [word for word in words if word.startswith("loader")]


def test_forwards_reach_the_loopback_alone_and_commas_are_escaped() -> None:
    words = qemu.virtual_command(
        machine(network="user", restricted=True, forwards=(qemu.Forward(18443, 8443),), disks={"data": Path("/d/a,b")}),
        cmdline="x",
        hash_table=Path("/h"),
        table_address=0,
        kvm=False,
    )
    net = words[words.index("-netdev") + 1]
    assert "restrict=on" in net
    assert "hostfwd=tcp:127.0.0.1:18443-:8443" in net
    assert any("file=/d/a,,b," in word and "readonly=off" in word for word in words)
