"""Bundles: one digest for all that can run, strict paths, and no byte that is not accounted for."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.errors import MalformedMessage, RecipeUnusable
from fl.jobs.bundle import Bundle, make_bundle, parse_bundle
from fl.jobs.settings import JobSettings, TensorSettings

SETTINGS = JobSettings(
    name="hello",
    recipe="fedavg",
    num_rounds=2,
    min_clients=2,
    train_script="client.py",
    train_args=("--batch_size", "32"),
    framework="numpy",
    model={"w": TensorSettings(dtype="F32", shape=(2, 3))},
)
CODE = b"print('hello')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "client.py").write_bytes(CODE)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "net.py").write_bytes(b"x = 1\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "secret").write_bytes(b"no")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "client.pyc").write_bytes(b"no")
    return tmp_path


def rebuilt(manifest: Any, data: bytes) -> bytes:
    text = manifest if isinstance(manifest, bytes) else rfc8785.dumps(manifest)
    return struct.pack(">8sII", b"SEALBNDL", 1, len(text)) + text + data


def document(**changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(CODE).hexdigest()
    manifest = {
        "version": 1,
        "files": [{"path": "client.py", "sha256": digest, "size": len(CODE)}],
        "job": SETTINGS.model_dump(mode="json"),
    }
    return {**manifest, **changes}


def test_a_bundle_is_every_plain_file_and_the_same_every_time(folder: Path) -> None:
    bundle = make_bundle(folder, SETTINGS)
    assert sorted(bundle.files) == ["client.py", "parts/net.py", "requirements.lock"]
    assert bundle.settings == SETTINGS
    assert make_bundle(folder, SETTINGS).raw == bundle.raw
    assert parse_bundle(bundle.raw).digest == bundle.digest
    (folder / "client.py").write_bytes(CODE + b"#")
    assert make_bundle(folder, SETTINGS).digest != bundle.digest
    more = SETTINGS.model_copy(update={"num_rounds": 3})
    assert make_bundle(folder, more).digest != make_bundle(folder, SETTINGS).digest


def test_links_and_odd_names_are_refused(folder: Path) -> None:
    (folder / "link.py").symlink_to("/etc/passwd")
    with pytest.raises(RecipeUnusable, match=r"link.py is a link"):
        make_bundle(folder, SETTINGS)
    (folder / "link.py").unlink()
    (folder / "linked").symlink_to("/etc")
    with pytest.raises(RecipeUnusable, match="linked is a link"):
        make_bundle(folder, SETTINGS)
    (folder / "linked").unlink()
    (folder / "a b.py").write_bytes(b"")
    with pytest.raises(RecipeUnusable, match="may not be in a bundle"):
        make_bundle(folder, SETTINGS)


def file_entry(path: str) -> dict[str, Any]:
    return {"path": path, "sha256": hashlib.sha256(CODE).hexdigest(), "size": len(CODE)}


@pytest.mark.parametrize(
    ("manifest", "data", "complaint"),
    [
        (document(files=[file_entry("../client.py")]), CODE, "not allowed"),
        (document(files=[file_entry("/client.py")]), CODE, "not allowed"),
        (document(files=[file_entry("a/./b.py")]), CODE, "not allowed"),
        (document(files=[file_entry("a//b.py")]), CODE, "not allowed"),
        (document(files=[file_entry("client.py\n")]), CODE, "not allowed"),
        (document(files=[file_entry("client.py"), file_entry("client.py")]), CODE * 2, "sorted by path, each once"),
        (document(files=[file_entry("client.py"), file_entry("a.py")]), CODE * 2, "sorted by path"),
        (document(files=[file_entry("client.py"), file_entry("client.py/x")]), CODE * 2, "also a folder"),
        (document(files=[file_entry("other.py")]), CODE, "not among the files"),
        (document(), CODE[:-1] + b"X", "not what the manifest says"),
        (document(), CODE[:-1], "not what the manifest says"),
        (document(), CODE + b"x", "1 bytes follow"),
        (document(extra=1), CODE, "extra"),
        (document(version=2), CODE, "version"),
        (document(job={**SETTINGS.model_dump(mode="json"), "recipe": "shell"}), CODE, "recipe"),
        (document(job={**SETTINGS.model_dump(mode="json"), "num_rounds": 10**9}), CODE, "num_rounds"),
        (json.dumps(document()).encode(), CODE, "not canonical"),
        (b"{", CODE, "not JSON"),
        (b"[" * 100_000, CODE, "not JSON"),
    ],
)
def test_a_malformed_bundle_is_refused_with_its_reason(manifest: Any, data: bytes, complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint):
        parse_bundle(rebuilt(manifest, data))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_changes_the_digest_or_is_refused(at: int, flip: int) -> None:
    good = rebuilt(document(), CODE)
    bundle = parse_bundle(good)
    raw = bytearray(good)
    raw[at % len(raw)] ^= flip
    try:
        changed: Bundle | None = parse_bundle(bytes(raw))
    except MalformedMessage:
        changed = None
    assert changed is None or changed.digest != bundle.digest
