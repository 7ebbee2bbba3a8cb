"""Forms of text: what they let through, written anew, and what they do not; any line is taken or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fl import FedAvgRecipe, SimEnv, declare_outputs
from fl.errors import JobFailed
from fl.jobs.log_lines import MAX_LINE, lines_bits, rewritten
from fl.jobs.outputs import Outputs

FORMS = ("epoch {int} of {int}: loss {number}", "done", "rate {number} %")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("epoch 1 of 20: loss 0.123456789", "epoch 1 of 20: loss 0.123"),
        ("epoch 0001 of 20: loss 1.5e-03", "epoch 1 of 20: loss 0.0015"),
        ("epoch -0 of 20: loss -0", "epoch 0 of 20: loss 0"),
        ("done", "done"),
        ("rate 99.96 %", "rate 100 %"),
    ],
)
def test_a_line_of_a_declared_form_is_written_anew(line: str, shown: str) -> None:
    assert rewritten(line, FORMS, 3) == shown
    assert rewritten(shown, FORMS, 3) == shown


@pytest.mark.parametrize(
    "line",
    ["", "Done", "done ", "done\n", "epoch 1 of 2000000: loss 1", "epoch 1 of 2: loss nan", "rate 1e99 %", "rate 1",
     "x" * 513, "epoch ١ of 2: loss 1"],
)  # fmt: skip
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"form|characters|below"):
        rewritten(line, FORMS, 3)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=100), st.from_regex(r"epoch -?[0-9]{1,9} of [0-9]{1,9}: loss [-+.0-9e]{1,30}")))
def test_any_line_is_taken_or_refused(line: str) -> None:
    try:
        shown = rewritten(line, FORMS, 4)
    except ValueError:
        return
    assert re.fullmatch(f"[ -~]{{1,{MAX_LINE}}}", shown)
    assert rewritten(shown, FORMS, 4) == shown


@pytest.mark.parametrize(
    "form",
    ["{text}", "{int}{number}", "{int}{int}", "{int}e{int}", "x{int}.", "-{number}", "a{", "é {int}", "", "x" * 201],
)
def test_forms_that_can_be_read_in_two_ways_are_refused(form: str) -> None:
    with pytest.raises(ValidationError):
        Outputs(metrics=(), lines=(form,), line_bytes=10)


def test_forms_and_budget_go_together() -> None:
    for more in ({"lines": ("x",)}, {"line_bytes": 5}):
        with pytest.raises(ValidationError, match="go together"):
            Outputs(metrics=(), **more)
    assert lines_bits((), 0, 5) == 0
    assert lines_bits(("on", "off"), 30, 5) == 14  # ten lines, each one of two, or fewer


SCRIPT = """
from fl import client as flare

flare.init()
while flare.is_running():
    received = flare.receive()
    flare.log_line(f"round {received.current_round} of 2: loss {1 / 3}")
    flare.send(flare.FLModel(params=received.params))
"""


@pytest.mark.parametrize("declared", [True, False])
def test_declared_text_is_seen_by_who_watches_and_other_text_ends_the_job(tmp_path: Path, declared: bool) -> None:
    (tmp_path / "client.py").write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="text",
        initial_model={"w": np.zeros(2, dtype=np.float32)},
        min_clients=1,
        num_rounds=2,
        train_script=str(tmp_path / "client.py"),
    )
    forms = {"lines": ["round {int} of {int}: loss {number}"], "line_bytes": 200} if declared else {}
    declare_outputs(recipe, metrics=[], values=0, digits=2, **forms)
    run = recipe.execute(SimEnv(num_clients=1, workspace_root=tmp_path / "runs"))
    if not declared:
        with pytest.raises(JobFailed) as failure:
            run.get_result()
        assert "site-1: it has none of the declared forms" in failure.value.reasons
        return
    run.get_result()
    said: list[tuple[object, ...]] = []
    run.watch(lambda event: said.append((event.site, event.round, event.text)) if event.kind == "line" else None)
    assert said == [("site-1", number, f"round {number} of 2: loss 0.33") for number in (0, 1)]
