"""Every verb of the command: help with an example, and one sentence when it is interrupted."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from appliance.cli import NOUNS

SEAL = [sys.executable, "-m", "appliance.cli"]
NO_JSON = {"audit witness", "broker run", "job run", "vm boot", "vm launch"}
"""Verbs that run something else until it ends; what they print is what runs in them."""


def leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every command below this one that has no further verbs, with its words."""
    below = getattr(command, "commands", None)
    if not below:
        yield " ".join(words), command
        return
    for name, verb in below.items():
        yield from leaves(verb, (*words, name))


VERBS = {
    name: verb
    for noun in NOUNS
    for name, verb in leaves(get_command(importlib.import_module(f"appliance.commands.{noun}").app), (noun,))
}


def test_the_tree_has_the_nouns_of_the_contract() -> None:
    assert len(VERBS) > 40
    assert {name.split()[0] for name in VERBS} == set(NOUNS)
    assert {"charter kit", "charter test-policy", "job submit", "audit verify", "vm launch", "demo"} <= set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_its_help_has_an_example_that_names_it(name: str) -> None:
    noun, *verb = name.split()
    app = importlib.import_module(f"appliance.commands.{noun}").app
    shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    help_text = " ".join(shown.output.split())
    assert "Example" in help_text
    assert f"seal {name}" in help_text.split("Example", 1)[1]


@pytest.mark.parametrize("name", sorted(set(VERBS) - NO_JSON))
def test_it_prints_one_object_if_asked(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in VERBS[name].params)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verb_ends_in_one_sentence(tmp_path: Path, number: signal.Signals) -> None:
    """A verb that waits (for a broker that is not there) is told to end: a status that says so, and no traceback."""
    (tmp_path / "root.json").write_text("{}")
    words = ["broker", "check", "one=https://127.0.0.1:1", "--root", str(tmp_path / "root.json"), "--wait", "60"]
    process = subprocess.Popen([*SEAL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stop = threading.Timer(3.0, process.send_signal, (number,))
    stop.start()
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        stop.cancel()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert "seal: broker check was " in err
