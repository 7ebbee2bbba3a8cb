"""`seal broker`, `seal secret` and `seal audit` as people and scripts use them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main
from attestation.errors import BrokerRefused
from policies.keys import private_pem, write_secret


def seal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    code = ended.value.code
    return (code if isinstance(code, int) else 1), capsys.readouterr().out


def test_a_deposit_an_export_and_an_audit(
    world: Any, broker: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_secret(tmp_path / "member.pem", private_pem(world.member_keys["cygnus-bio"]))
    write_secret(tmp_path / "value", b"a new data key")
    (tmp_path / "root.json").write_bytes(world.root)
    where = ("--broker", f"one={broker.entry.url}", "--root", tmp_path / "root.json", "--key", tmp_path / "member.pem")
    status, out = seal(capsys, "secret", "put", "cygnus-bio/key/data", tmp_path / "value", *where, "--json")
    assert status == 0
    assert json.loads(out)["receipt"]["index"] > 0
    guest = world.guest("site", "south")
    guest.attest()
    assert guest.release("cygnus-bio/key/data") == b"a new data key"
    guest.close()

    status, out = seal(capsys, "secret", "put", "acme-pharma/key/model", tmp_path / "value", *where, "--json")
    assert status == 1
    assert "signature is not acme-pharma" in json.loads(out)["error"]["reasons"][0]
    status, out = seal(capsys, "secret", "put", "no-resource", tmp_path / "value", *where, "--json")
    assert status == 2

    status, out = seal(capsys, "audit", "export", broker.folder, tmp_path / "audit", "--json")
    assert status == 0
    count = json.loads(out)["entries"]
    status, out = seal(capsys, "audit", "verify", tmp_path / "audit", "--trust", tmp_path / "root.json", "--json")
    assert (status, json.loads(out)["entries"]) == (0, count)
    (tmp_path / "audit/entries/00000002.json").write_bytes(b"{}")
    status, out = seal(capsys, "audit", "verify", tmp_path / "audit", "--trust", tmp_path / "root.json")
    assert status == 1
    assert "entries/00000002.json: " in out
    (tmp_path / "other.json").write_bytes(world.root + b" ")
    status, out = seal(capsys, "audit", "verify", tmp_path / "audit", "--trust", tmp_path / "other.json")
    assert status == 1


def test_a_new_broker_has_its_own_secret_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--name", "two", "--member", "acme-pharma", "--url", "https://broker.example:8443", "--json")
    status, out = seal(capsys, "broker", "init", tmp_path / "two", *words)
    assert status == 0
    assert json.loads(out)["entry"]["name"] == "two"
    for name in ("keys/signing.pem", "keys/issuer.pem", "keys/kek", "broker.toml"):
        assert stat.S_IMODE((tmp_path / "two" / name).stat().st_mode) == 0o600
    status, out = seal(capsys, "broker", "init", tmp_path / "two", *words)
    assert status == 2
    assert "already" in json.loads(out)["error"]["what"]


def test_unusable_settings_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broker.toml").write_text('name = "one"\nlisten = "nowhere"\nmore = 1\n')
    for words in (
        ("broker", "run", tmp_path / "missing.toml"),
        ("broker", "run", tmp_path / "broker.toml"),
        ("broker", "run", tmp_path),
        ("audit", "verify", tmp_path / "none", "--trust", tmp_path / "broker.toml"),
        ("audit", "export", tmp_path, tmp_path / "out"),
    ):
        status, out = seal(capsys, *words, "--json")
        assert status == 2
        assert json.loads(out)["error"]["do"]


def test_a_backup_comes_back_and_a_shorter_ledger_does_not(
    world: Any, broker: Any, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = tmp_path / "early.sqlite", tmp_path / "late.sqlite"
    assert seal(capsys, "broker", "backup", broker.folder, early, "--json")[0] == 0
    guest = world.guest("site", "north")
    guest.attest()
    status, out = seal(capsys, "broker", "backup", broker.folder, late, "--json")
    assert (status, stat.S_IMODE(late.stat().st_mode)) == (0, 0o600)
    assert seal(capsys, "broker", "backup", broker.folder, late, "--json")[0] == 2
    status, running = seal(capsys, "broker", "restore", broker.folder, late, "--json")
    assert (status, json.loads(running)["error"]["what"]) == (1, "a broker runs here already")
    broker.stop()
    status, refused = seal(capsys, "broker", "restore", broker.folder, early, "--json")
    assert status == 1
    assert "the database that is there" in json.loads(refused)["error"]["what"]
    assert seal(capsys, "broker", "restore", broker.folder, tmp_path / "none", "--json")[0] == 2
    status, again = seal(capsys, "broker", "restore", broker.folder, late, "--json")
    assert (status, json.loads(again)["entries"]) == (0, json.loads(out)["entries"])
    running_again = tools.start_broker(broker.folder, broker.entry)
    with pytest.raises(BrokerRefused, match="no such session"):
        guest.release("borealis-hospital/key/data")
    guest.attest()
    assert guest.release("borealis-hospital/key/data") == b"north's data key"
    guest.close()
    running_again.stop()
