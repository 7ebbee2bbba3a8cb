"""The ready-made Rego rules: every `test_*` rule of policies/rego, and what each package does with half a document.

regopy 1.5.2 does not know `with input as …`, only `with input.path as …`: each test module therefore has a `given`
that is its tests' input.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regopy

import policies
from policies.decisions import Rules

REGO = Path(policies.__file__).parent / "rego"
TESTS = sorted(REGO.glob("*_test.rego"))
PACKAGES = sorted(path.stem for path in REGO.glob("*.rego") if not path.stem.endswith("_test"))


def rego_tests() -> list[tuple[str, str]]:
    found = []
    for path in TESTS:
        names = re.findall(r"^(test_\w+)", path.read_text(), re.MULTILINE)
        assert len(names) == len(set(names)), f"{path.name}: a test is defined twice"
        found += [(path.stem, name) for name in names]
    return found


def loaded(stem: str) -> regopy.Interpreter:
    interpreter = regopy.Interpreter()
    for path in (REGO / f"{stem}.rego", REGO / f"{stem.removesuffix('_test')}.rego"):
        interpreter.add_module(path.name, path.read_text())
    return interpreter


def value(interpreter: regopy.Interpreter, query: str) -> list[Any]:
    output = interpreter.query_bundle(interpreter.build(f"x = [v | v := {query}]"))
    assert output.ok(), str(output)
    found: list[Any] = output[0]["x"]
    return found


def given(package: str) -> dict[str, Any]:
    (document,) = value(loaded(f"{package}_test"), f"data.sealwright.{package}_test.given")
    assert isinstance(document, dict)
    return document


def test_every_package_has_tests() -> None:
    assert PACKAGES == ["admission", "appraisal", "export", "floor", "peers", "release"]
    assert [path.stem.removesuffix("_test") for path in TESTS] == PACKAGES
    assert len(rego_tests()) >= 45


@pytest.mark.parametrize(("stem", "name"), rego_tests())
def test_rego(stem: str, name: str) -> None:
    interpreter = loaded(stem)
    interpreter.set_input_term(json.dumps(value(interpreter, f"data.sealwright.{stem}.given")[0]))
    assert value(interpreter, f"data.sealwright.{stem}.{name}") == [True]


def leaves(document: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(document, dict):
        for key in document:
            yield from leaves(document[key], (*path, key))


def without(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    smaller = copy.deepcopy(document)
    place: Any = smaller
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return smaller


UNREAD = {
    # what the ready-made rules do not look at, so that its absence changes nothing
    "admission": {("bundle", "job"), ("bundle", "note"), ("job", "job"), ("job", "name"), ("job", "server")},
    "appraisal": {("appraisal", "claims", "chip_id"), ("enrolment", "name")},
    "export": {("from", "name"), ("job", "recipients"), ("to", "jurisdiction")},
    "peers": {("here", "name"), ("peer", "jurisdiction"), ("peer", "member"), ("peer", "name")},
    "floor": {
        ("at",),
        ("counters",),
        ("counters", "releases"),
        ("counters", "releases_this_boot"),
        ("counters", "releases_to_guest"),
        ("job",),
        ("resource",),
        ("resource", "repository"),
        ("resource", "type"),
        ("resource", "tag"),
        ("session", "protocol"),
        *(
            ("ear", "submods", "cpu0", "ear.trustworthiness-vector", name)
            for name in ("file-system", "runtime-opaque", "sourced-data", "storage-opaque")
        ),
    },
    "release": {
        ("counters", "releases_this_boot"),
        ("counters", "releases_to_guest"),
        ("ear", "subject", "name"),
        ("ear", "subject", "member"),
        ("ear", "subject", "image"),
        ("enrolment",),
        ("enrolment", "role"),
        ("enrolment", "name"),
        ("enrolment", "member"),
        ("enrolment", "image"),
        ("enrolment", "init_data_sha256"),
        ("session", "protocol"),
    },
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_field_never_allows(package: str) -> None:
    rules = Rules({f"{package}.rego": (REGO / f"{package}.rego").read_text()})
    document = given(package)
    name = f"sealwright.{package}"
    assert rules.decide(name, document).allow
    for path in leaves(document):
        decision = rules.decide(name, without(document, path))
        assert decision.allow == (path in UNREAD[package]), path
        assert decision.allow or decision.reasons
    assert not rules.decide(name, {}).allow
