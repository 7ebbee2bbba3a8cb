"""A server that is killed and takes a masked round up: sites give the same update under fresh masks, and a server that
only feigns it has no second sum of the round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SITES, found_federation, make_job
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.canonical import b64, unb64
from fl.aggregation.mask_talk import (
    MaskingSite,
    Step,
    bag,
    introduced,
    keys_in,
    named,
    read_bag,
    read_revealed,
    round_of,
    signed_before,
)
from fl.aggregation.masking import MaskedSum, Masks
from fl.aggregation.notary import SimulatedNotary
from fl.errors import MaskingRefused
from fl.jobs.progress import JobEvent
from fl.jobs.settings import MASKED, MASKED_TAIL, JobSettings, SecureAggregation
from fl.model import ParamsType
from fl.recipes.masked import UNIT, _Leader
from fl.server.federation import Federation
from fl.site.job import SiteJob
from fl.transport.frames import Deliver
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

NAMES = ["a", "b", "c"]
RUNS = ["1" * 32, "2" * 32, "3" * 32]
NUMBERS = 100_000
SECURE = SecureAggregation()
JOB = JobSettings.model_validate(
    {
        "name": "x", "recipe": "fedavg", "num_rounds": 2, "min_clients": 2, "train_script": "x.py",
        "framework": "numpy", "model": {"w": {"dtype": "F32", "shape": (NUMBERS,)}},
        "outputs": {"metrics": ("loss",), "values": 0}, "secure_aggregation": SECURE.model_dump(),
    }
)  # fmt: skip


class Play:
    """Three sites, and a server that may begin a round again and again."""

    def __init__(self, numbers: int = NUMBERS) -> None:
        self.notary = SimulatedNotary("job", NAMES)
        job = JOB if numbers == NUMBERS else JOB.model_validate(
            {**JOB.model_dump(), "model": {"w": {"dtype": "F32", "shape": (numbers,)}}}
        )  # fmt: skip
        self.sites = {name: MaskingSite(name, job, SECURE, self.notary) for name in NAMES}
        self.updates: dict[str, Stored] = {}
        self.numbers = numbers

    def hear(self, site: str, step: Step, body: str, run: str, number: int = 0) -> str:
        return self.sites[site].hear(number, step, body, run)

    def exchange(
        self, run: str, *, number: int = 0, among: Sequence[str] = NAMES, unit: float | None = None
    ) -> MaskedSum:
        """Keys and shares; the sum that the sites' vectors are to be folded into."""
        tokens = {name: self.hear(name, "keys", "", run, number) for name in among}
        keys = {name: keys_in(self.notary, name, token, number) for name, token in tokens.items()}
        kinds = (np.uint64 if unit is None else np.uint32, np.uint64)
        sizes = (self.numbers, 2)
        arrays = [np.zeros(size, dtype=kind) for size, kind in zip(sizes, kinds, strict=True)]
        total = MaskedSum(round_of(self.notary, keys, number, SECURE, unit), arrays)
        message = introduced(tokens, unit)
        dealt = {name: read_bag(self.hear(name, "shares", message, run, number)) for name in among}
        shares = total.shares_for(
            {name: {other: unb64(text, where=name) for other, text in texts.items()} for name, texts in dealt.items()}
        )
        for name, own in shares.items():
            self.hear(name, "dealt", bag({other: b64(share) for other, share in own.items()}), run, number)
            if name != "c":
                self.sites[name].prepare()  # those who have the time, in every run
        return total

    def mask(self, total: MaskedSum, *, number: int = 0, among: Sequence[str] = NAMES) -> None:
        """Each site's vector, folded: made anew where an earlier run had one."""
        for name in among:
            if name in self.updates:
                with self.updates[name] as before:
                    self.updates[name] = self.sites[name].masked_again(number, before)
            else:
                values = np.full(self.numbers, 0.1 * (1 + NAMES.index(name)), dtype=np.float32)
                self.updates[name] = self.sites[name].masked(number, [values], {"loss": 0.5}, 2.0)
            total.fold(name, [self.updates[name].tensors().array(one) for one in (MASKED, MASKED_TAIL)])

    def unmask(self, total: MaskedSum, run: str, *, among: Sequence[str] = NAMES, number: int = 0) -> Any:
        signed = {name: self.hear(name, "survivors", named(among), run, number) for name in among}
        shares = {}
        for name in among:
            texts = read_revealed(self.hear(name, "unmask", bag(signed), run, number)).texts
            shares[name] = {other: unb64(text, where=name) for other, text in texts.items()}
        return [array.copy() for array in total.unmask(shares)]


def test_masks_of_a_new_run_do_not_take_the_place_of_those_that_are_at_work() -> None:
    """Its server is killed while a site masks: what leaves under the first run's masks has all of them."""
    play = Play()
    play.exchange(RUNS[0])
    site = play.sites["a"]
    halves = np.split(np.full(play.numbers, 0.1, dtype=np.float32), 2)

    def differences() -> Any:
        yield halves[0]
        play.exchange(RUNS[1])  # which prepares the site's next masks
        yield halves[1]

    with site.masked(0, differences(), {"loss": 0.5}, 2.0) as memory:
        found = memory.tensors().array(MASKED).copy()
    worn = site._worn
    assert worn is not None
    assert worn.run == RUNS[0]
    Masks((seed, not adds) for seed, adds in worn.seeds).add_to(found)
    assert len(np.unique(found)) == 1, "every number was the same, and is, under its own masks alone"


@pytest.mark.parametrize("unit", [None, 32.0])
def test_a_round_that_is_run_again_has_the_same_sum_under_other_masks(unit: float | None) -> None:
    """Whatever of the first run was lost: its sum, its survivors, or the vectors alone."""
    play = Play()
    first = play.exchange(RUNS[0], unit=unit)
    play.mask(first)
    vectors = {name: memory.tensors().array(MASKED).copy() for name, memory in play.updates.items()}
    once = play.unmask(first, RUNS[0])
    second = play.exchange(RUNS[1], unit=unit)
    play.mask(second)
    for name, memory in play.updates.items():
        assert play.sites[name].worn_in == RUNS[1]
        assert np.mean(memory.tensors().array(MASKED) == vectors[name]) < 0.01
    third = play.exchange(RUNS[2], unit=unit)  # the second server was killed, too
    play.mask(third)
    again = play.unmask(third, RUNS[2])
    assert all(np.array_equal(*arrays) for arrays in zip(once, again, strict=True))


def test_no_second_sum_over_others_is_signed() -> None:
    """The attack: all three in one run, and two of them in a feigned one, would tell the third's update."""
    play = Play(10)
    total = play.exchange(RUNS[0])
    play.mask(total)
    play.unmask(total, RUNS[0])
    total = play.exchange(RUNS[1], among=["a", "b"])
    play.mask(total, among=["a", "b"])
    with pytest.raises(MaskingRefused, match="signed before, and were others"):
        play.unmask(total, RUNS[1], among=["a", "b"])
    with pytest.raises(MaskingRefused):
        play.hear("a", "unmask", bag({}), RUNS[1])


def test_a_run_s_keys_are_its_own_and_nothing_of_a_run_before_is_answered() -> None:
    play = Play(10)
    total = play.exchange(RUNS[0])
    play.mask(total)
    signed = {name: play.hear(name, "survivors", named(NAMES), RUNS[0]) for name in NAMES}
    with pytest.raises(MaskingRefused, match="has been before"):
        play.hear("a", "keys", "", RUNS[0])
    token = play.hear("a", "keys", "", RUNS[1])
    assert play.hear("a", "keys", "", RUNS[1]) == token, "asked once more after a cut"
    assert play.sites["a"].is_outworn
    for step, body in {"survivors": named(NAMES), "unmask": bag(signed), "dealt": bag({})}.items():
        with pytest.raises(MaskingRefused, match="out of turn"):
            play.hear("a", step, body, RUNS[0])  # type: ignore[arg-type]
    assert play.hear("b", "unmask", bag(signed), RUNS[0]), "b has heard of no other run"
    play.updates.clear()
    play.exchange(RUNS[1], number=1)
    for run in RUNS:
        with pytest.raises(MaskingRefused, match="round 0 has been before"):
            play.hear("a", "keys", "", run, 0)


def test_an_update_is_written_in_one_way() -> None:
    """In finer steps a feigned run would tell more digits of the sum than the round had."""
    play = Play(10)
    play.mask(play.exchange(RUNS[0], unit=32.0))
    with pytest.raises(MaskingRefused, match="written in other steps before"):
        play.exchange(RUNS[1], unit=16.0)


def test_without_masks_of_the_run_nothing_is_masked_again() -> None:
    play = Play(10)
    with pytest.raises(MaskingRefused, match="nothing was masked"):
        play.sites["a"].masked_again(0, SealedMemory.of(b"-"))
    play.mask(play.exchange(RUNS[0]))
    play.hear("a", "keys", "", RUNS[1])
    play.sites["a"].close()
    with pytest.raises(MaskingRefused, match="no masks for round 0"):
        play.sites["a"].masked_again(0, play.updates["a"])


def test_a_site_says_what_it_has_signed_and_no_other_set() -> None:
    play = Play(10)
    total = play.exchange(RUNS[0], among=["a", "b"])
    play.mask(total, among=["a", "b"])
    assert signed_before(play.notary, "a", play.hear("a", "keys", "", RUNS[1]), 0) is None, "it has signed nothing yet"
    total = play.exchange(RUNS[2], among=["a", "b"])
    play.mask(total, among=["a", "b"])
    play.unmask(total, RUNS[2], among=["a", "b"])
    token = play.hear("a", "keys", "", RUNS[1])
    assert signed_before(play.notary, "a", token, 0) == {"a", "b"}
    keys_in(play.notary, "a", token, 0)
    for lie in (["a"], ["nobody"], "b", [1], {"b": 1}):
        forged = json.dumps({**json.loads(token), "without": lie})
        with pytest.raises(MaskingRefused):
            keys_in(play.notary, "a", forged, 0)


def test_what_was_never_masked_does_not_leave() -> None:
    """A vector is written over fresh memory, in which anything may be: short of numbers, it goes nowhere."""
    play = Play(10)
    play.exchange(RUNS[0])
    with pytest.raises(MaskingRefused, match="9 of 10 numbers were masked"):
        play.sites["a"].masked(0, [np.zeros(9, dtype=np.float32)], {"loss": 0.5}, 2.0)


class Named:
    """A site that answers nothing by itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def give(self, task: Any) -> None:
        raise AssertionError("nobody has a task")

    def say(self, round_: int, step: Any, body: str) -> None:
        raise AssertionError("nobody is asked")

    def end(self, why: str) -> None:
        return


@pytest.mark.parametrize(
    ("claims", "left", "lost"),
    [
        ({}, NAMES, []),
        ({"a": "c", "b": "c"}, ["a", "b"], []),
        ({"a": "c", "b": "c", "c": ""}, ["a", "b"], ["c"]),  # c lies, and is of no set of two that it could break
        ({"a": ""}, ["b", "c"], ["a"]),  # d, of whose round it speaks, is not there
    ],
)
def test_who_takes_part_again_follows_from_what_was_signed(
    claims: dict[str, str], left: list[str], lost: list[str]
) -> None:
    roster = [*NAMES, *([] if claims != {"a": ""} else ["d"])]
    notary = SimulatedNotary("job", roster)
    sites = {name: MaskingSite(name, JOB, SECURE, notary) for name in NAMES}
    tokens = {name: site.hear(0, "keys", "", RUNS[0]) for name, site in sites.items()}
    for name, without in claims.items():
        tokens[name] = json.dumps({**json.loads(tokens[name]), "without": without.split()})
    events: list[JobEvent] = []
    federation = Federation("job", {}, ParamsType.FULL, min_sites=1, round_seconds=5, observe=events.append)
    for name in NAMES:
        federation.join(Named(name))
    leader = _Leader(federation, JOB, SECURE, notary, {UNIT: np.array([32.0])})
    assert leader._unit == 32.0
    assert leader.state[UNIT].tolist() == [32.0]
    assert sorted(leader._of_before(0, dict(tokens))) == left
    assert sorted(federation.lost) == lost


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([*([name] for name in NAMES), NAMES]),
        st.sampled_from(RUNS[:2]),
        st.sampled_from(["keys", "shares", "dealt", "mask", "survivors", "unmask"]),
        st.sampled_from([NAMES, ["a", "b"], ["b", "c"]]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_a_site_signs_one_set_a_round_whatever_it_is_asked(operations: list[Any]) -> None:
    """A server that asks anything of anybody in any order, in two runs."""
    play = Play(4)
    tokens: dict[str, dict[str, str]] = {run: {} for run in RUNS}
    dealt: dict[str, dict[str, dict[str, str]]] = {run: {} for run in RUNS}
    signed: dict[str, set[tuple[str, ...]]] = {name: set() for name in NAMES}
    confirmed: dict[str, dict[str, str]] = {run: {} for run in RUNS}
    revealed: dict[tuple[str, str], set[str]] = {}
    play.mask(play.exchange(RUNS[0]))
    for site, run, step, names in ((site, *rest) for sites, *rest in operations for site in sites):
        try:
            if step == "keys":
                tokens[run][site] = play.hear(site, "keys", "", run)
            elif step == "shares":
                dealt[run][site] = read_bag(play.hear(site, "shares", introduced(tokens[run], None), run))
            elif step == "dealt":
                own = {other: texts[site] for other, texts in dealt[run].items() if site in texts}
                play.hear(site, "dealt", bag(own), run)
            elif step == "mask":
                with play.sites[site]._changed:
                    ready = play.sites[site]._has_masks(0)
                if ready:
                    play.mask(_Into(), among=[site])  # type: ignore[arg-type]
            elif step == "survivors":
                confirmed[run][site] = play.hear(site, "survivors", named(names), run)
                signed[site].add(tuple(names))
            else:
                answer = play.hear(site, "unmask", bag(confirmed[run]), run)
                revealed.setdefault((site, run), set()).add(bag(read_revealed(answer).texts))
        except MaskingRefused:
            continue
    assert all(len(sets) <= 1 for sets in signed.values())
    assert all(len(answers) == 1 for answers in revealed.values())
    for (site, _), answers in revealed.items():
        assert all(len(unb64(text, where=site)) == 32 for answer in answers for text in read_bag(answer).values())


class _Into:
    def fold(self, site: str, vector: Any) -> None:
        """Nobody looks at it."""


SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
while flare.is_running():
    flare.send(flare.FLModel(params={"w": flare.receive().params["w"] + np.float32(1)}))
"""


@pytest.mark.long
def test_an_update_under_another_run_s_masks_is_in_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded, it would make noise of the model."""
    world = found_federation(tmp_path)
    bundle, model = make_job(tmp_path, SCRIPT, num_rounds=1, secure_aggregation=True)
    world.approve(bundle)
    honest = SiteJob._named

    def of_another(self: SiteJob, head: Deliver) -> Deliver:
        found = honest(self, head)
        return found if self._site == SITES[0] else found.model_copy(update={"run": RUNS[0]})

    monkeypatch.setattr(SiteJob, "_named", of_another)
    with (
        world.server() as server,
        world.site(server, SITES[0]),
        world.site(server, SITES[1]),
        world.client(server) as client,
        model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        events = list(client.watch(job, timeout=60))
        assert events[-1].text == "failed"
        assert "under the masks of another run" in client.report(job).sites[SITES[1]]
    assert [event.site for event in events if event.kind == "update"] in ([], [SITES[0]])
