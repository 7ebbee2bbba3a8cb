"""`seal charter propose --image`: reference values go into a charter from the image, verified, not typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from charter_world import issuer

from cvm_image.generate import generate_image
from cvm_image.signing import create_signing_keys
from cvm_image.verify import file_digest, load_image

MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")
AT = ("--at", "2026-03-01T12:00:00Z")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "appliance.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def done(*words: object) -> Any:
    finished = run(*words, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("probe").mkdir()
    Path("probe/__init__.py").write_text("")
    Path("probe/entry.py").write_text("def main(guest):\n    return 0\n")
    generate_image(
        Path("image"),
        name="probe",
        keys=create_signing_keys(Path("keys")),
        packages=[Path("probe")],
        entry="probe.entry",
        svn=3,
    )
    return Path("image")


def found_charter() -> None:
    for name in (*MEMBERS, "broker"):
        assert run("charter", "key", f"{name}.key", "--public", f"{name}.pub").returncode == 0
    text = 'name = "tumour-atlas"\nplatform = "virtual"\ntrust_domain = "virtual.research.example"\nthreshold = 2\n'
    text += "".join(f'\n[[members]]\nname = "{name}"\npublic_key_file = "{name}.pub"\n' for name in MEMBERS)
    Path("issuer.pem").write_text(issuer("broker-1"))
    text += '\n[[brokers]]\nname = "broker-1"\nmember = "acme-pharma"\nurl = "https://127.0.0.1:8443"\n'
    text += 'signing_key_file = "broker.pub"\nissuer_certificate_file = "issuer.pem"\n'
    text += f'\n[[virtual_roots]]\nproduct = "Milan"\nark_spki_sha256 = "{"aa" * 32}"\n'
    Path("consortium.toml").write_text(text)


def test_the_reference_values_are_those_of_the_verified_folder(image: Path) -> None:
    found_charter()
    told = run("charter", "init", "consortium.toml", "--out", "founding.json", *AT)
    assert told.returncode == 0, told.stderr
    for name in MEMBERS[:2]:
        assert run("charter", "sign", "founding.json", "--key", f"{name}.key", "--yes", *AT).returncode == 0
    published = run("charter", "publish", "founding.json", "--to", "charter", "--broker-key", "broker.key", *AT)
    assert published.returncode == 0, published.stderr
    words = ["charter", "propose", "charter", "--image", image, "--out", "change.json", *AT]
    proposal = done(*words, "--builder", "keys/builder.pem", "--role", "server", "--role", "site")
    assert any("probe" in change["sentence"] for change in proposal["changes"])
    for name in MEMBERS[:2]:
        signed = run("charter", "sign", "change.json", "--key", f"{name}.key", "--yes", *AT)
        assert signed.returncode == 0, signed.stderr
    assert (
        run("charter", "publish", "change.json", "--to", "charter", "--broker-key", "broker.key", *AT).returncode == 0
    )
    target = next(Path("charter/targets/images").glob("*.probe.json"))
    reference = json.loads(target.read_bytes())
    manifest = load_image(image)
    assert reference["manifest_sha256"] == file_digest(image / "manifest.dsse.json")
    assert (reference["svn"], reference["roles"]) == (3, ["server", "site"])
    assert reference["measurements"] == [one.model_dump() for one in manifest.measurements]

    shutil.copytree(image, "changed")
    Path("changed/cmdline").write_text("changed")
    words[4] = Path("changed")
    refused = run(*words, "--builder", "keys/builder.pem", "--role", "site")
    assert refused.returncode == 1
    assert "cmdline: the file was changed" in refused.stderr
    words[4] = image
    for missing, sentence in (
        (["--role", "site"], "builder is not named"),
        (["--builder", "keys/builder.pem"], "has no role"),
        (["--builder", "keys/builder.pem", "--role", "emperor"], "roles.0"),
    ):
        unusable = run(*words, *missing)
        assert unusable.returncode == 2, unusable.stderr
        assert sentence in unusable.stderr + unusable.stdout
