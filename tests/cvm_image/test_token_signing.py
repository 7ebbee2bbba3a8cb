"""An image is signed by keys that a PKCS#11 token (SoftHSM) holds and never gives away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attestation.evidence.id_block import ID_AUTH_SIZE, ID_BLOCK_SIZE, verify_id_block
from cvm_image.files import read_public_key
from cvm_image.verify import verify_image

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PACKAGE = "def main(guest):\n    return 0\n"


@pytest.mark.skipif(not SOFTHSM.exists(), reason="SoftHSM is not installed (apt install softhsm2)")
def test_builder_id_and_author_key_stay_in_their_token(tmp_path: Path) -> None:
    pytest.importorskip("pkcs11")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nlog.level = ERROR\n")
    (tmp_path / "pin").touch(0o600)
    (tmp_path / "pin").write_text("1234\n")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/__init__.py").write_text("")
    (tmp_path / "probe/entry.py").write_text(PACKAGE)
    # the library reads its configuration once, so each command is a process of its own
    env = {**os.environ, "SOFTHSM2_CONF": str(tmp_path / "softhsm.conf")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from appliance.cli import main; main()", "image", *words]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)

    init = ["softhsm2-util", "--init-token", "--free", "--label", "builders", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run(init, check=True, capture_output=True, timeout=30, env=env)
    uri = f"pkcs11:token=builders;object=release?module-path={SOFTHSM}"
    made = run("keys", "keys", "--token", uri, "--pin-file", "pin")
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["builder.pem", "token.txt"]
    assert "PRIVATE" not in "".join(path.read_text() for path in (tmp_path / "keys").iterdir())
    again = run("keys", "other", "--token", uri, "--pin-file", "pin")
    assert (again.returncode, "of this name already" in again.stderr) == (2, True)

    words = ["generate", "image", "--name", "probe", "--keys", "keys", "--package", "probe", "--entry", "probe.entry"]
    built = run(*words, "--pin-file", "pin")
    assert built.returncode == 0, built.stderr
    manifest = verify_image(tmp_path / "image", read_public_key(tmp_path / "keys/builder.pem"))
    blocks, auths = ((tmp_path / "image" / name).read_bytes() for name in ("id-block", "id-auth"))
    who = verify_id_block(blocks[:ID_BLOCK_SIZE], auths[:ID_AUTH_SIZE])
    assert who.id_key_digest.hex() == manifest.id_key_digest
    assert who.author_key_digest is not None
    assert who.author_key_digest.hex() == manifest.author_key_digest

    without = run(*words)
    assert (without.returncode, "PIN is missing" in without.stderr) == (2, True)
    (tmp_path / "pin").write_text("0000\n")
    wrong = run(*words, "--pin-file", "pin")
    assert (wrong.returncode, "cannot be used" in wrong.stderr) == (2, True)
    assert "Traceback" not in wrong.stderr + without.stderr
