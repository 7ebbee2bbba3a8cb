"""The platform process with real guests: what is measured runs, what is changed shows, and both end together."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from virtual_guests import ATTEST, KEYS, World, command, flip, launch, make_image

from attestation.attester.virtual_port import VirtualPort
from attestation.errors import AttesterUnavailable
from attestation.evidence.cpio import Entry, read_archive, write_archive
from attestation.evidence.report import Report, parse_report
from cvm_image.generate import generate_image
from cvm_image.packages import Platform, guest_packages

WAIT = """
import sys, time
def main(guest):
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    time.sleep(60)
    return 0
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("platform") / "image"
    make_image(folder)
    return folder


@pytest.fixture
def copy(image: Path, tmp_path: Path) -> Path:
    """A copy of the image that a test may change."""
    return Path(shutil.copytree(image, tmp_path / "image"))


def report_of(done: subprocess.CompletedProcess[str]) -> Report:
    assert done.returncode == 0, done.stderr
    return parse_report(bytes.fromhex(done.stdout.split()[0]))


def wait_for(condition: object, seconds: float = 5.0) -> bool:
    """Wait until `condition()` holds, for `seconds` at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]  # a callable of no arguments
            return True
        time.sleep(0.02)
    return False


def guest_of(platform: int) -> int:
    """Return the process id of the platform's guest."""
    children = Path(f"/proc/{platform}/task/{platform}/children").read_text().split()
    return int(children[0])


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def start_waiting(world: World, folder: Path, *more: str, code: str = WAIT) -> subprocess.Popen[str]:
    """Start a guest that waits, and return its platform process once the guest is there."""
    make_image(folder / "image", code)
    process = subprocess.Popen(
        command(world, folder / "image", folder / "run", *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a platform process and return its status and what it said on standard error."""
    _, said = process.communicate(timeout=15)
    return process.returncode, said


def test_the_guest_reports_what_was_launched(virtual_world: World, image: Path, tmp_path: Path) -> None:
    report = report_of(launch(virtual_world, image, run=tmp_path / "run"))
    manifest = make_image(tmp_path / "again")
    assert report.measurement.hex() == manifest.measurements[0].measurement
    assert report.host_data == hashlib.sha256((image.parent / "init-data.toml").read_bytes()).digest()
    assert report.report_data == bytes(range(64))
    assert (report.policy, report.vmpl, report.guest_svn) == (0x30000, 0, 1)
    assert report.id_key_digest.hex() == manifest.id_key_digest
    assert report.author_key_digest.hex() == manifest.author_key_digest
    assert report.author_key_enabled
    assert report.image_id.hex() == manifest.image_id


def test_each_launch_has_a_report_id_of_its_own(virtual_world: World, image: Path, tmp_path: Path) -> None:
    first, second = (report_of(launch(virtual_world, image, run=tmp_path / f"run{index}")) for index in (1, 2))
    assert first.report_id != second.report_id
    assert first.measurement == second.measurement


@pytest.mark.parametrize("name", ["firmware.fd", "kernel", "initrd", "cmdline"])
def test_one_changed_byte_of_a_measured_file_stops_the_launch(virtual_world: World, copy: Path, name: str) -> None:
    flip(copy / name, (copy / name).stat().st_size // 2)
    done = launch(virtual_world, copy)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("firmware.fd", b"Sealwright generated", b"Sealwright generateD"),
        ("kernel", b"init=/init\n", b"init=/init\n\n"),
        ("cmdline", b"panic=-1", b"panic=-2"),
    ],
)
def test_without_its_id_block_a_changed_image_runs_and_reports_the_change(
    virtual_world: World, copy: Path, image: Path, tmp_path: Path, name: str, old: bytes, new: bytes
) -> None:
    (copy / name).write_bytes((copy / name).read_bytes().replace(old, new, 1))
    genuine = report_of(launch(virtual_world, image, "--no-id-block", run=tmp_path / "genuine"))
    changed = report_of(launch(virtual_world, copy, "--no-id-block"))
    assert changed.measurement != genuine.measurement
    assert changed.id_key_digest == bytes(48)


def test_a_changed_line_of_the_archive_changes_what_runs_and_what_is_reported(virtual_world: World, copy: Path) -> None:
    genuine = report_of(launch(virtual_world, copy, "--no-id-block"))
    entries = [
        Entry(entry.name, entry.data.replace(b"bytes(range(64))", b"bytes(64)"), entry.executable)
        if entry.name == "lib/probe/entry.py" and entry.data
        else entry
        for entry in read_archive((copy / "initrd").read_bytes())
    ]
    (copy / "initrd").write_bytes(write_archive(entries))
    assert "no ID block of the image is for the measurement" in launch(virtual_world, copy).stderr
    changed = report_of(launch(virtual_world, copy, "--no-id-block"))
    assert changed.report_data == bytes(64)
    assert changed.measurement != genuine.measurement


@pytest.mark.parametrize(("name", "word"), [("rootfs.erofs", "root file system"), ("rootfs.verity", "verity tree")])
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_changed_byte_of_the_root_stops_the_guest(
    virtual_world: World, copy: Path, name: str, word: str, where: str
) -> None:
    flip(copy / name, 0 if where == "first" else (copy / name).stat().st_size - 1)
    done = launch(virtual_world, copy)
    assert done.returncode == 1
    assert done.stderr.startswith("init: stopped: ")
    assert word in done.stderr
    assert done.stdout == ""


def test_a_shorter_or_missing_root_stops_the_guest(virtual_world: World, copy: Path) -> None:
    whole = (copy / "rootfs.erofs").read_bytes()
    for content in (whole[:-4096], whole[:-1], b""):
        (copy / "rootfs.erofs").write_bytes(content)
        done = launch(virtual_world, copy)
        assert (done.returncode, done.stdout) == (1, "")
        assert "init: stopped: " in done.stderr
    (copy / "rootfs.erofs").unlink()
    assert "a disk cannot be read" in launch(virtual_world, copy).stderr


def test_other_init_data_changes_host_data_alone(virtual_world: World, image: Path, tmp_path: Path) -> None:
    genuine = report_of(launch(virtual_world, image, run=tmp_path / "run"))
    other = tmp_path / "other.toml"
    other.write_text('version = 1\nrole = "server"\n')
    words = command(virtual_world, image, tmp_path / "run", init_data=other)
    changed = report_of(subprocess.run(words, capture_output=True, text=True, timeout=20, check=False))
    assert changed.host_data == hashlib.sha256(other.read_bytes()).digest()
    assert changed.host_data != genuine.host_data
    assert changed.measurement == genuine.measurement


def test_another_policy_than_the_id_blocks_is_refused_and_reported_without_it(
    virtual_world: World, image: Path, tmp_path: Path
) -> None:
    done = launch(virtual_world, image, "--policy", "0xB0000", run=tmp_path / "run")
    assert done.returncode == 2
    assert "policy 0xb0000 is not the ID block's" in done.stderr
    report = report_of(launch(virtual_world, image, "--policy", "0xB0000", "--no-id-block", run=tmp_path / "run"))
    assert report.policy == 0xB0000


def test_an_id_block_signed_by_nobody_is_refused(virtual_world: World, copy: Path) -> None:
    flip(copy / "id-auth", 80)
    done = launch(virtual_world, copy)
    assert done.returncode == 2
    assert "the signature by its ID key does not verify" in done.stderr


def test_other_vcpu_settings_than_were_signed_are_refused(virtual_world: World, image: Path, tmp_path: Path) -> None:
    done = launch(virtual_world, image, "--vcpus", "4", run=tmp_path / "run")
    assert done.returncode == 2
    assert "no ID block of the image is for the measurement" in done.stderr


def test_an_archive_without_its_attester_file_does_not_start(virtual_world: World, copy: Path) -> None:
    entries = [entry for entry in read_archive((copy / "initrd").read_bytes()) if not entry.name.startswith("etc")]
    (copy / "initrd").write_bytes(write_archive(entries))
    done = launch(virtual_world, copy, "--no-id-block")
    assert done.returncode == 1
    assert "does not say which attester the guest uses" in done.stderr


def test_an_archive_with_another_attester_word_gets_no_evidence(virtual_world: World, copy: Path) -> None:
    entries = [
        Entry(entry.name, b"sample\n") if entry.name == "etc/sealwright/attester" else entry
        for entry in read_archive((copy / "initrd").read_bytes())
    ]
    (copy / "initrd").write_bytes(write_archive(entries))
    done = launch(virtual_world, copy, "--no-id-block")
    assert done.returncode != 0
    assert "names an unknown attester" in done.stderr


def test_a_hardware_image_has_no_virtual_code_and_gets_nothing_here(virtual_world: World, tmp_path: Path) -> None:
    make_image(tmp_path / "image", platform="hardware")
    names = {entry.name for entry in read_archive((tmp_path / "image/initrd").read_bytes())}
    assert "lib/attestation/attester/hardware.py" in names
    assert not [name for name in names if "virtual" in name]
    done = launch(virtual_world, tmp_path / "image")
    assert done.returncode != 0
    assert "this machine shows no SEV-SNP secure processor" in done.stderr


def test_a_hardware_image_cannot_be_talked_into_the_virtual_world(virtual_world: World, tmp_path: Path) -> None:
    code = ATTEST.replace("read_boot(guest).attester()", 'open_attester("virtual", guest / "../port.sock")').replace(
        "from attestation.attester.boot import read_boot", "from attestation.attester.world import open_attester"
    )
    make_image(tmp_path / "image", code, platform="hardware")
    done = launch(virtual_world, tmp_path / "image")
    assert done.returncode != 0
    assert "holds no code for the virtual platform" in done.stderr


def test_the_guest_sees_nothing_of_its_hosts_environment_or_checkout(
    virtual_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import importlib, os, sys
import attestation, policies
def main(guest):
    lib = str(guest / "lib")
    print(sorted(os.environ), sys.stdin.read(), attestation.__file__.startswith(lib), policies.__file__.startswith(lib))
    for name in ("attestation.virtual", "attestation.broker.service", "fl", "appliance", "cvm_image", "planted"):
        try:
            importlib.import_module(name)
            print("found", name)
        except ModuleNotFoundError:
            pass
    return 0
"""
    (tmp_path / "planted.py").write_text("")
    (tmp_path / "attestation").mkdir()
    (tmp_path / "attestation/__init__.py").write_text("raise SystemExit('hijacked')")
    make_image(tmp_path / "image", code)
    words = command(virtual_world, tmp_path / "image", tmp_path / "run")
    monkeypatch.setenv("SECRET_OF_THE_HOST", "x")
    hijack = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "planted.py"), "PATH": os.environ["PATH"]}
    program = (
        f"import os, sys; os.environ.update({hijack!r})\n"
        "from attestation.virtual.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words[3:]], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']  True True\n"


@pytest.mark.parametrize("platform", ["virtual", "hardware"])
def test_the_archive_holds_all_that_its_modules_import(
    virtual_world: World, tmp_path: Path, platform: Platform
) -> None:
    code = """
import importlib, pkgutil, sys
import appliance.node, attestation, policies
def main(guest):
    for package in (policies, attestation):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    lib = str(guest / "lib")
    names = ("appliance", "attestation", "policies")
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in names]
    print(len(ours) > 20, all((module.__file__ or lib).startswith(lib) for module in ours))
    return 0
"""
    package = tmp_path / "source/probe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text(code)
    packages = [*guest_packages(platform), package]
    generate_image(tmp_path / "image", name="all", keys=KEYS, platform=platform, packages=packages, entry="probe.entry")
    done = launch(virtual_world, tmp_path / "image")
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


def test_the_guest_is_shown_its_disks(virtual_world: World, tmp_path: Path) -> None:
    code = """
from attestation.attester.boot import read_boot
def main(guest):
    boot = read_boot(guest)
    print(sorted(boot.disks), boot.disks["data"].read_text(), boot.parameters["sealwright.entry"])
    return 0
"""
    make_image(tmp_path / "image", code)
    (tmp_path / "data.bin").write_text("sealed")
    done = launch(virtual_world, tmp_path / "image", "--disk", f"data={tmp_path / 'data.bin'}")
    assert done.stdout == "['data', 'rootfs', 'verity'] sealed probe.entry\n", done.stderr
    for word in (
        "data",
        f"Data={tmp_path / 'data.bin'}",
        f"rootfs={tmp_path / 'data.bin'}",
        f"data={tmp_path / 'none'}",
    ):
        refused = launch(virtual_world, tmp_path / "image", "--disk", word)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("end", "status"), [("return 0", 0), ("return 7", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_platform_ends_with_its_guests_status(virtual_world: World, tmp_path: Path, end: str, status: int) -> None:
    make_image(tmp_path / "image", f"def main(guest):\n    {end}\n")
    assert launch(virtual_world, tmp_path / "image").returncode == status
    assert not (tmp_path / "image.run/guest").exists()
    assert not (tmp_path / "image.run/port.sock").exists()


def test_a_killed_platform_takes_its_guest_with_it(virtual_world: World, tmp_path: Path) -> None:
    process = start_waiting(virtual_world, tmp_path)
    guest = guest_of(process.pid)
    assert alive(guest)
    process.kill()
    finish(process)
    assert wait_for(lambda: not alive(guest))


def test_the_run_folder_of_a_killed_platform_can_be_used_again(virtual_world: World, tmp_path: Path) -> None:
    process = start_waiting(virtual_world, tmp_path)
    guest = guest_of(process.pid)
    in_use = launch(virtual_world, tmp_path / "image", run=tmp_path / "run")
    assert in_use.returncode == 2
    assert "another guest runs in this folder" in in_use.stderr
    process.kill()
    finish(process)
    assert wait_for(lambda: not alive(guest))
    make_image(tmp_path / "image", ATTEST)
    assert report_of(launch(virtual_world, tmp_path / "image", run=tmp_path / "run"))


def test_a_folder_with_other_files_is_left_alone(virtual_world: World, image: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = launch(virtual_world, image, run=tmp_path)
    assert done.returncode == 2
    assert "holds files of something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_guest_and_platform(virtual_world: World, tmp_path: Path, number: signal.Signals) -> None:
    process = start_waiting(virtual_world, tmp_path)
    guest = guest_of(process.pid)
    process.send_signal(number)
    status, _ = finish(process)
    assert status == 128 + signal.SIGTERM
    assert not alive(guest)


def test_a_guest_that_ignores_the_signal_is_killed_with_all_its_processes(virtual_world: World, tmp_path: Path) -> None:
    code = """
import signal, subprocess, sys, time
def main(guest):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (guest / "../child").write_text(str(child.pid))
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    time.sleep(60)
"""
    make_image(tmp_path / "image", code)
    program = (
        "import sys, attestation.virtual.platform as p; p.GRACE_SECONDS = 0.3\n"
        "from attestation.virtual.__main__ import main; sys.exit(main())"
    )
    words = command(virtual_world, tmp_path / "image", tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    child = int((tmp_path / "run/child").read_text())
    process.terminate()
    status, said = finish(process)
    assert status == 137
    assert "did not end within 0.3 seconds and is killed" in said
    assert wait_for(lambda: not alive(child))


def test_another_program_can_be_the_guest(virtual_world: World, image: Path, tmp_path: Path) -> None:
    """An emulator's place: a program of the caller's, with the port of the image that was measured."""
    guest = (
        "import sys; from pathlib import Path; from attestation.attester.virtual_port import VirtualPort\n"
        "print(VirtualPort(Path(sys.argv[1])).evidence(bytes(64)).report.hex())"
    )
    program = f"""
import sys
from pathlib import Path
from attestation.virtual.chip import load_chip
from attestation.virtual.launch import read_measured
from attestation.virtual.platform import PORT, Machine, Program, run_program
from attestation.virtual.vendor import load_vendor
chip, vendor = load_chip(Path({str(virtual_world.chip)!r})), load_vendor(Path({str(virtual_world.vendor)!r}))
machine = Machine(chip, chip.certificate_table(vendor), read_measured(Path({str(image)!r})), b"")
run = Path({str(tmp_path / "run")!r})
words = (sys.executable, "-c", {guest!r}, str(run / PORT))
sys.exit(run_program(machine, run, lambda: Program(words, run, {{"PATH": "/usr/bin"}})))
"""
    words = [sys.executable, "-c", program]
    report = report_of(subprocess.run(words, capture_output=True, text=True, timeout=20, check=False))
    assert report.measurement == report_of(launch(virtual_world, image, run=tmp_path / "other")).measurement
    assert not (tmp_path / "run/guest").exists()


def test_nobody_but_the_guest_is_answered(virtual_world: World, tmp_path: Path) -> None:
    process = start_waiting(virtual_world, tmp_path)
    try:
        port = tmp_path / "run/port.sock"
        assert port.stat().st_mode & 0o777 == 0o600
        with pytest.raises(AttesterUnavailable, match="this port belongs to the guest"):
            VirtualPort(port).evidence(bytes(64))
    finally:
        process.terminate()
        finish(process)


def test_missing_and_foreign_folders_are_named(virtual_world: World, image: Path, tmp_path: Path) -> None:
    for changed in (
        World(tmp_path / "none", virtual_world.chip),
        World(virtual_world.vendor, tmp_path / "none"),
        World(virtual_world.chip, virtual_world.chip),
    ):
        done = launch(changed, image, run=tmp_path / "run")
        assert done.returncode == 2
        assert done.stderr.startswith("virtual: ")
        assert "Traceback" not in done.stderr
    assert launch(virtual_world, tmp_path, run=tmp_path / "run").returncode == 2


def test_folders_may_be_named_relative_to_where_one_is(
    virtual_world: World, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(image, tmp_path / "image")
    monkeypatch.chdir(tmp_path)
    assert report_of(launch(virtual_world, Path("image"), run=Path("run")))


def test_deep_folders_are_no_obstacle_to_the_port(virtual_world: World, image: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60) / "run"
    assert len(str(deep)) > 108
    assert report_of(launch(virtual_world, image, run=deep))
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as plain:
        plain.bind(str(deep / "port.sock"))
