"""`seal image` and `seal vm` from end to end: keys, image, vendor, chip, guest; and every refusal is a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from virtual_guests import ATTEST, KEYS, World, flip, make_image

from appliance import hardware_guest
from appliance.cli import main
from policies.keys import public_pem


def seal(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run the command in this process and return its status and what it printed."""
    arguments = [str(word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["seal", *arguments])
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    """Run the command with --json, expecting success, and return the object."""
    status, out, _ = seal(capsys, *words, "--json")
    assert status == 0
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "image"
    make_image(folder)
    (folder.parent / "builder.pem").write_text(public_pem(KEYS.builder))
    return folder


def test_from_keys_to_a_guest_by_commands_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/__init__.py").write_text("")
    (tmp_path / "probe/entry.py").write_text(ATTEST)
    (tmp_path / "init.toml").write_text("version = 1\n")
    keys = as_json(capsys, "image", "keys", tmp_path / "keys")
    made = as_json(
        capsys,
        *("image", "generate", tmp_path / "image", "--name", "probe", "--keys", tmp_path / "keys"),
        *("--package", tmp_path / "probe", "--entry", "probe.entry", "--vcpus", "1", "--vcpus", "2"),
    )
    assert made["id_key_digest"] == keys["id_key_digest"]
    verified = as_json(capsys, "image", "verify", tmp_path / "image", "--builder", tmp_path / "keys/builder.pem")
    assert verified["verified"] is True
    shown = as_json(capsys, "image", "show", tmp_path / "image")
    assert shown["manifest_sha256"] == verified["manifest_sha256"]
    measured = as_json(capsys, "image", "measure", tmp_path / "image", "--vcpus", "2")
    assert measured["measurement"] == made["measurements"][1]["measurement"]  # type: ignore[index]  # a list in JSON
    vendor = as_json(capsys, "vm", "vendor", tmp_path / "vendor", "--product", "Genoa")
    assert vendor["platform"] == "virtual"
    chip = as_json(capsys, "vm", "chip", tmp_path / "chip", "--vendor", tmp_path / "vendor", "--product", "Genoa")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "appliance.cli", "vm", "launch", str(tmp_path / "image")),
            *("--init-data", str(tmp_path / "init.toml"), "--vendor", str(tmp_path / "vendor")),
            *("--chip", str(tmp_path / "chip")),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = bytes.fromhex(done.stdout.split()[0])
    assert report[0x90:0xC0].hex() == measured["measurement"]
    assert report[0x1A0:0x1E0].hex() == chip["chip_id"]
    assert "virtual platform, Genoa chip" in done.stderr


def test_measure_equals_the_reference_command(capsys: pytest.CaptureFixture[str], image: Path) -> None:
    found = as_json(capsys, "image", "measure", image, "--vcpu-model", "EPYC-Milan", "--vcpus", "3")
    reference = [
        *(str(Path(sys.executable).with_name("sev-snp-measure")), "--mode", "snp", "--vcpus", "3"),
        *("--vcpu-type", "EPYC-Milan", "--ovmf", "firmware.fd", "--kernel", "kernel", "--initrd", "initrd"),
        *("--append", (image / "cmdline").read_text()),
    ]
    done = subprocess.run(reference, cwd=image, capture_output=True, text=True, check=True, timeout=20)
    assert set(found) == {"measurement"}
    assert found["measurement"] == done.stdout.strip()


def test_diff_lists_changes_with_status_one(capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path) -> None:
    assert seal(capsys, "image", "diff", image, image)[:2] == (0, "The images are the same.\n")
    make_image(tmp_path / "image", "def main(guest):\n    return 0\n")
    status, out, _ = seal(capsys, "image", "diff", image, tmp_path / "image", "--json")
    assert status == 1
    assert "archive" in {change["kind"] for change in json.loads(out)["changes"]}
    status, out, _ = seal(capsys, "image", "diff", image, tmp_path / "image")
    assert "archive: lib/probe/entry.py: " in out


def test_a_changed_image_is_refused_with_every_reason(
    capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path
) -> None:
    make_image(tmp_path / "image")
    flip(tmp_path / "image/kernel", 3)
    flip(tmp_path / "image/initrd", 3)
    words = ("image", "verify", tmp_path / "image", "--builder", image.parent / "builder.pem")
    status, out, _ = seal(capsys, *words, "--json")
    assert status == 1
    assert json.loads(out)["error"]["reasons"] == ["initrd: the file was changed", "kernel: the file was changed"]
    status, _, err = seal(capsys, *words)
    assert status == 1
    assert "  - kernel: the file was changed\n" in err


@pytest.mark.parametrize(
    "words",
    [
        ("image", "measure", "/nonexistent"),
        ("image", "measure", "IMAGE", "--vcpu-model", "EPYC-Naples"),
        ("image", "measure", "IMAGE", "--guest-features", "many"),
        ("image", "measure", "IMAGE", "--vmm", "xen"),
        ("image", "measure", "IMAGE", "--vcpus", "0"),
        ("image", "show", "/etc"),
        ("image", "verify", "IMAGE", "--builder", "IMAGE/kernel"),
        ("image", "verify", "IMAGE", "--builder", "/nonexistent"),
        ("image", "diff", "IMAGE", "/etc"),
        ("image", "generate", "/proc/none", "--name", "x", "--keys", "/nonexistent"),
        ("vm", "chip", "/etc", "--vendor", "/nonexistent"),
        ("vm", "chip", "/nonexistent/chip", "--vendor", "/nonexistent"),
        ("vm", "launch", "IMAGE", "--init-data", "/nonexistent", "--vendor", "/nonexistent", "--chip", "/nonexistent"),
    ],
)
def test_unusable_input_is_one_sentence_with_status_two(
    capsys: pytest.CaptureFixture[str], image: Path, words: tuple[str, ...]
) -> None:
    status, out, err = seal(capsys, *(word.replace("IMAGE", str(image)) for word in words))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [("vm", "launch", "NONE"), ("demo", "--edge", "--vm", "NONE", "--out", "OUT")])
def test_a_folder_that_holds_no_image_is_the_first_thing_to_be_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    places = {"NONE": str(tmp_path / "none"), "OUT": str(tmp_path / "out")}
    status, out, err = seal(capsys, *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert "this folder holds no image manifest" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_a_hardware_launch_is_printed_for_qemu_and_libvirt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_image(tmp_path / "image", platform="hardware")
    (tmp_path / "init.toml").write_text("version = 1\n")
    words = ("vm", "launch", tmp_path / "image", "--init-data", tmp_path / "init.toml", "--forward", "18443:8443")
    status, out, _ = seal(capsys, *words, "--print-qemu")
    assert status == 0
    assert out.startswith("qemu-system-x86_64 -machine ")
    assert out.count("\n") == 1
    status, out, _ = seal(capsys, *words, "--print-libvirt")
    assert status == 0
    assert out.startswith('<domain type="kvm">')
    for wrong in ("8443", "0:1", "1:70000", "a:b"):
        status, _, err = seal(capsys, *words[:-1], wrong, "--print-qemu")
        assert status == 2
        assert "names no two ports" in err


def test_a_hardware_image_and_a_wrong_role_are_refused_before_the_start(
    capsys: pytest.CaptureFixture[str], virtual_world: World, image: Path, tmp_path: Path
) -> None:
    make_image(tmp_path / "image", platform="hardware")
    (tmp_path / "init.toml").write_text("version = 1\n")
    common = ("--init-data", tmp_path / "init.toml", "--vendor", virtual_world.vendor, "--chip", virtual_world.chip)
    status, _, err = seal(capsys, "vm", "launch", tmp_path / "image", *common, "--run", tmp_path / "run")
    assert status == 2
    assert "was built for hardware" in err
    status, _, err = seal(capsys, "vm", "launch", image, *common, "--role", "site", "--run", tmp_path / "run")
    assert status == 2  # these init-data are none at all
    (tmp_path / "init.toml").write_text(
        'version = 1\nalgorithm = "sha256"\nrole = "server"\nname = "server-1"\n'
        f'charter = "{"0" * 64}"\nbrokers = [{{name = "b", url = "https://127.0.0.1:1"}}]\n[resources]\n'
    )
    status, _, err = seal(capsys, "vm", "launch", image, *common, "--role", "site", "--run", tmp_path / "run")
    assert status == 1, err
    assert "for the role 'server', not 'site'" in err


QEMU = """
import sys
line = sys.argv[1:]
assert line[line.index("-accel") + 1] == "kvm"
assert any(word.startswith("sev-snp-guest") for word in line)
serial = line[line.index("-serial") + 1].removeprefix("file:")
with open(serial, "w") as console:
    console.write("sealwright: first program of the verified root\\n")
sys.exit(%s)
"""


def test_a_hardware_image_is_started_where_there_is_such_hardware(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program stands in QEMU's place, as there is no such machine here: it is given the plan, and its end is told."""
    make_image(tmp_path / "image", platform="hardware")
    (tmp_path / "init.toml").write_text("version = 1\n")
    words = ("vm", "launch", tmp_path / "image", "--init-data", tmp_path / "init.toml", "--run", tmp_path / "run")
    monkeypatch.setattr(hardware_guest, "SEV", tmp_path / "sev")
    status, _, err = seal(capsys, *words)
    assert status == 2
    assert "no secure processor" in err
    (tmp_path / "sev").touch()
    qemu = tmp_path / "bin/qemu-system-x86_64"
    qemu.parent.mkdir()
    monkeypatch.setenv("PATH", str(qemu.parent), prepend=os.pathsep)
    for end, expected, told in (("0", 0, ""), ("'sev-snp-guest: SNP_LAUNCH_FINISH'", 1, "SNP_LAUNCH_FINISH")):
        qemu.write_text(f"#!{sys.executable}\n{QEMU % end}")
        qemu.chmod(0o755)
        status, out, err = seal(capsys, *words)
        assert status == expected
        assert "first program of the verified root" in out
        assert told in err
