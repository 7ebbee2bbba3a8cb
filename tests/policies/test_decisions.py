"""Decisions: one way to a yes; everything else denies, in bounded time and memory, and tells why."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import decisions
from policies.decisions import Asked, Given, Rules, end_idle_evaluators
from policies.errors import MalformedDocument
from policies.ready_made import READY_MADE, ready_made, release_policy, shared_policies

YES = "package p\n\nimport rego.v1\n\nallow := true\n\nreasons := set()\n"


def decide(text: str, document: dict[str, Any] | None = None, **more: Any) -> Any:
    return Rules({"p.rego": text}, **more).decide("p", document or {})


def test_a_yes() -> None:
    assert decide(YES).allow
    assert decide(YES).reasons == ()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("package p\nimport rego.v1\nallow := false\nreasons := set()\n", "give no reason"),
        ("package p\nimport rego.v1\nallow := 1\nreasons := set()\n", "give no reason"),
        ('package p\nimport rego.v1\nallow := "true"\nreasons := set()\n', "give no reason"),
        ("package p\nimport rego.v1\nallow := [true]\nreasons := set()\n", "give no reason"),
        ('package p\nimport rego.v1\nallow := true\nreasons := {"because"}\n', "because"),
        ("package p\nimport rego.v1\nallow := true\nreasons := {1}\n", "no set of sentences"),
        ("package p\nimport rego.v1\nallow := true\nreasons := true\n", "no set of sentences"),
        ("package p\nimport rego.v1\nallow := true\n", "do not define both"),
        ("package p\nimport rego.v1\nallow := true\nreasons := {input.nothing}\n", "do not define both"),
        ("package p\nimport rego.v1\nreasons := set()\n", "do not define both"),
        ("package q\nimport rego.v1\nallow := true\nreasons := set()\n", "are not there"),
        ("package p\nimport rego.v1\nallow if {\n", "fail"),
        ("not rego at all", "fail"),
        ("", "fail"),
        ("package p\nimport rego.v1\nallow := true\nallow := false\nreasons := set()\n", ""),
        ("package p\nimport rego.v1\nallow := input.a\nallow := input.b\nreasons := set()\n", ""),
        ('package p\nimport rego.v1\nallow := x if x := http.send({"method": "get", "url": "http://h"})\n', ""),
    ],
)
def test_everything_else_denies(text: str, word: str) -> None:
    decision = decide(text, {"a": True, "b": False})
    assert not decision.allow
    assert decision.reasons
    assert word in " ".join(decision.reasons)


def test_no_modules_and_strange_packages_deny() -> None:
    assert not Rules({}).decide("p", {}).allow
    for name in ("", "p; true", "p.allow == true", "P", "p..q", 'p["allow"]', "a" * 300 + "-"):
        assert not Rules({"p": YES}).decide(name, {}).allow


ENDLESS = """package p
import rego.v1
allow := true
reasons := {"x" | some a in numbers.range(1, 3000); some b in numbers.range(1, 3000); a * b == 0}
"""
HUGE = (
    'package p\nimport rego.v1\nallow := true\na0 := "0123456789abcdef"\n'
    + "".join(f'a{n + 1} := concat("", [a{n}, a{n}])\n' for n in range(26))
    + "reasons := {a26}\n"
)


def test_endless_rules_are_ended_and_the_next_question_is_answered() -> None:
    start = time.monotonic()
    decision = decide(ENDLESS, time_limit=0.3)
    assert not decision.allow
    assert "too long" in decision.reasons[0]
    assert time.monotonic() - start < 5
    assert decide(YES).allow


def test_rules_of_other_patience_are_answered_by_the_same_process() -> None:
    end_idle_evaluators()
    impatient, patient = (Rules({"p.rego": YES}, time_limit=seconds) for seconds in (5.0, 20.0))
    for _ in range(3):
        assert impatient.decide("p", {}).allow
        assert patient.decide("p", {}).allow
    (worker,) = decisions._workers.idle
    assert worker.process.poll() is None


def test_rules_that_eat_memory_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.decisions.MEMORY_LIMIT", 60 * 1024 * 1024)
    decision = decide(HUGE, time_limit=20)
    assert not decision.allow
    assert "memory" in decision.reasons[0]


def test_rules_that_break_the_evaluator_deny() -> None:
    # regopy 1.5.2 aborts its process over this form of `with`
    other = 'package f\nimport rego.v1\nok if input.s == "a"\n'
    text = 'package p\nimport rego.v1\nallow if { x := data.f.ok with input as {"s": "a"}; x }\nreasons := set()\n'
    good = 'good := {"s": "a"}\nmore if { data.f.ok with input as good }\n'
    decision = Rules({"f": other, "p": text + good}).decide("p", {})
    assert not decision.allow
    assert "died" in decision.reasons[0]
    assert decide(YES).allow


ODD = "package p\nimport rego.v1\nallow if input.n % 2 == 1\ndefault allow := false\nreasons := set()\n"


def test_many_questions_at_once_are_answered_each_as_if_alone() -> None:
    odd, because = Rules({"p.rego": ODD}), Rules({"p.rego": YES.replace("set()", '{"because"}')})
    numbers = [Given({"n": number}) for number in range(9)]
    asked = [Asked(rules, "p", one) for one in numbers for rules in (odd, because)]
    found = Rules.decide_all(asked)
    alone = [rules.decide("p", {"n": number}) for number in range(9) for rules in (odd, because)]
    assert found == alone
    assert [one.allow for one in found[::2]] == [number % 2 == 1 for number in range(9)]
    assert Rules.decide_all([]) == []


@pytest.mark.parametrize("spoiler", ["endless", "absent", "unnamed", "input"])
def test_one_of_many_questions_spoils_no_other(spoiler: str) -> None:
    good, bad = Rules({"p.rego": YES}), Rules({"p.rego": ENDLESS}, time_limit=1.0)
    asked = {
        "endless": Asked(bad, "p", Given({})),
        "absent": Asked(good, "q", Given({})),
        "unnamed": Asked(good, "p; allow := true", Given({})),
        "input": Asked(good, "p", Given({"n": float("nan")})),
    }[spoiler]
    for place in range(3):
        questions = [Asked(good, "p", Given({}))] * 2
        questions.insert(place, asked)
        found = Rules.decide_all(questions)
        assert [one.allow for one in found] == [number != place for number in range(3)]
        assert found[place].reasons != ()


def test_endless_rules_do_not_hold_up_others() -> None:
    endless = Rules({"p": ENDLESS}, time_limit=1.0)
    threads = [threading.Thread(target=endless.decide, args=("p", {})) for _ in range(6)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    assert decide(YES).allow
    assert time.monotonic() - start < 0.9
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_rules_see_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_SECRET", "swordfish")
    decision = decide(
        'package p\nimport rego.v1\nallow := true\nreasons contains sprintf("%v", [opa.runtime()]) if true\n'
    )
    assert "swordfish" not in " ".join(decision.reasons)


def test_a_forked_child_has_evaluators_of_its_own() -> None:
    assert decide(YES).allow
    child = os.fork()
    if child == 0:
        os._exit(0 if decide(YES).allow else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert decide(YES).allow


@pytest.mark.parametrize(
    "document", [{"a": float("nan")}, {"a": "x\x00y"}, {"a": "\ud800"}, {"a": b"x"}, {"a": {1, 2}}]
)
def test_what_cannot_be_handed_over_exactly_denies(document: dict[str, Any]) -> None:
    assert not decide(YES, document).allow


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | TEXT


@settings(max_examples=150, deadline=None)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)))
def test_rules_see_exactly_the_document(value: Any) -> None:
    text = "package p\nimport rego.v1\ndefault allow := false\nallow if input.value == data.value\nreasons := set()\n"
    equal = Rules({"p": text}, {"value": value})
    assert equal.decide("p", {"value": value}).allow
    assert not equal.decide("p", {"value": [value, "more"]}).allow


@pytest.mark.parametrize(
    "value", ['a"b', "a\\b", "a\\", 'x", "y": "z', "a\tb", "a\u00e9b", 2**62, 2**63, -(2**80), 1.5]
)
def test_rules_see_exactly_what_a_built_input_would_spoil(value: Any) -> None:
    text = "package p\nimport rego.v1\ndefault allow := false\nallow if input == data.document\nreasons := set()\n"
    for document in ({"value": value}, {"values": [value]}, {str(value): 1}):
        assert Rules({"p": text}, {"document": document}).decide("p", document).allow


def test_quotes_cannot_end_a_string() -> None:
    rules = 'package p\nimport rego.v1\ndefault allow := false\nallow if input.role == "server"\nreasons := set()\n'
    for attack in ('server"', 'site", "role": "server', "server\\", "server\x00", "server\n"):
        assert not decide(rules, {"role": attack}).allow
    assert decide(rules, {"role": "server"}).allow


def test_ready_made_texts_are_what_founding_puts_in() -> None:
    names = ("admission", "appraisal", "export", "floor", "peers")
    assert set(shared_policies()) == {f"policies/{name}.rego" for name in names}
    assert all(f"package sealwright.{name}" in ready_made(name) for name in READY_MADE)


REQUEST = {
    "counters": {"releases": 0},
    "ear": {
        "subject": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
        "submods": {"cpu0": {"ear.status": "affirming"}},
    },
    "enrolment": {"role": "site", "name": "borealis", "init_data_sha256": "ef" * 32, "jurisdiction": "DE"},
    "session": {"age_seconds": 3},
}


@pytest.mark.parametrize(
    ("parts", "allowed"),
    [
        ({"roles": ["site"]}, True),
        ({"roles": ["server"]}, False),
        ({"roles": ["server", "site"], "names": ["borealis", "cygnus"]}, True),
        ({"roles": ["site"], "names": ["cygnus"]}, False),
        ({"roles": ["site"], "images": ["demo"]}, True),
        ({"roles": ["site"], "images": ["demo-2"]}, False),
        ({"roles": ["site"], "members": ["borealis-hospital"]}, True),
        ({"roles": ["site"], "members": ["acme-pharma"]}, False),
        ({"roles": ["site"], "jurisdictions": ["DE", "US-CA"]}, True),
        ({"roles": ["site"], "jurisdictions": ["FR"]}, False),
        ({"roles": ["site"], "approved_init_data": {"site/borealis": "ef" * 32}}, True),
        ({"roles": ["site"], "approved_init_data": {"site/borealis": "00" * 32}}, False),
        ({"roles": ["site"], "approved_init_data": {"site/cygnus": "ef" * 32}}, False),
        ({"roles": ["site"], "max_session_age_seconds": 2}, False),
        ({"roles": ["site"], "max_releases": 1}, True),
    ],
)
def test_generated_release_policies(parts: dict[str, Any], allowed: bool) -> None:
    rules = Rules({"release": release_policy(**parts).decode()})
    decision = rules.decide("sealwright.release", REQUEST)
    assert decision.allow == allowed, decision.reasons
    assert not rules.decide("sealwright.release", {**REQUEST, "counters": {"releases": 1000}}).allow


@pytest.mark.parametrize(
    "parts",
    [
        {"roles": []},
        {"roles": ["admin"]},
        {"roles": ["site"], "names": ['x"}']},
        {"roles": ["site"], "names": ["x\n"]},
        {"roles": ["site"], "approved_init_data": {"site/a": "no digest"}},
        {"roles": ["site"], "max_releases": 0},
        {"roles": ["site"], "jurisdictions": ["de"]},
    ],
)
def test_release_policies_of_nonsense_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(MalformedDocument):
        release_policy(**parts)
