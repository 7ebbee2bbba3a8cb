"""The command's shell: usage errors are one clear sentence with exit status 2, in words and in JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SEAL = [sys.executable, "-m", "appliance.cli"]


def seal(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEAL, *words], capture_output=True, text=True, timeout=60, check=False)


def test_an_unknown_noun_is_named_in_one_sentence() -> None:
    result = seal("frobnicate")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "No such command 'frobnicate'" in result.stderr


def test_an_unknown_option_under_json_is_an_error_object() -> None:
    result = seal("doctor", "--colour", "--json")
    assert result.returncode == 2
    assert set(json.loads(result.stdout)["error"]) == {"what", "where", "do"}


def test_no_arguments_show_the_nouns() -> None:
    result = seal()
    assert result.returncode == 2
    for noun in ("image", "evidence", "charter", "job", "audit", "demo", "doctor"):
        assert noun in result.stderr + result.stdout


def test_doctor_reports_every_check_as_one_object() -> None:
    result = seal("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["for"] == "demo"
    assert result.returncode == (0 if report["ok"] else 1)
    assert all(finding["ok"] or finding["do"] for finding in report["findings"])


def test_doctor_names_the_purposes_it_knows() -> None:
    result = seal("doctor", "--for", "moon")
    assert result.returncode == 2
    assert "Name one of demo, guest-host." in result.stderr


def test_what_cannot_be_written_is_one_error_that_names_it(tmp_path: Path) -> None:
    result = seal("site", "key", str(tmp_path / "no-such-folder" / "data.key"), "--json")
    assert result.returncode == 2
    error = json.loads(result.stdout)["error"]
    assert error["what"] == "No such file or directory"
    assert str(tmp_path / "no-such-folder") in error["where"]
    assert "Traceback" not in result.stderr
