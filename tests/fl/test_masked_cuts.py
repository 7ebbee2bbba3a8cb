"""A connection that is cut in the middle of an exchange of secure aggregation: the site comes back, is asked once more,
answers the same, and the round's sum has its update."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, make_job
from proxies import Proxy, passing_proxy
from safetensors.numpy import load_file

from fl.aggregation.mask_talk import MaskingSite
from fl.aggregation.notary import SimulatedNotary
from fl.errors import MalformedMessage, MaskingRefused
from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings, SecureAggregation
from fl.model import ParamsType
from fl.server.federation import Federation
from fl.server.job import RemoteSite
from fl.server.task import Task
from fl.site.job import SiteJob
from fl.tensors import encode
from fl.transport.memory import SealedMemory

SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
add = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    flare.send(flare.FLModel(params={"w": flare.receive().params["w"] + np.float32(add)}))
"""


class Spoken:
    """A site that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said: list[tuple[int, str, str]] = []
        self.heard = threading.Event()

    def give(self, task: Any) -> None:
        raise AssertionError("nobody has a task")

    def say(self, round_: int, step: Any, body: str) -> None:
        self.said.append((round_, step, body))
        self.heard.set()

    def end(self, why: str) -> None:
        self.said.append((-1, "end", why))


def test_a_site_that_is_back_is_asked_once_more_and_only_what_it_has_not_answered() -> None:
    events: list[JobEvent] = []
    federation = Federation(
        "job", {}, ParamsType.FULL, min_sites=2, round_seconds=5, observe=events.append, pause_seconds=30
    )
    here, away, back = Spoken("a"), Spoken("b"), Spoken("b")
    for site in (here, away):
        federation.join(site)
    answers: dict[str, str] = {}
    asking = threading.Thread(target=lambda: answers.update(federation.ask(3, "shares", {"a": "x", "b": "y"})))
    asking.start()
    assert here.heard.wait(5)
    assert away.heard.wait(5)
    federation.hear("a", 3, "shares", "from a")
    federation.suspend("b", "cut", cut=True)
    assert federation.resume(back)
    assert back.said == [(3, "shares", "y")]
    federation.hear("b", 3, "shares", "from b")
    asking.join(5)
    assert answers == {"a": "from a", "b": "from b"}
    federation.hear("b", 3, "shares", "from b, which it had sent before the cut")
    with pytest.raises(MalformedMessage, match="out of turn"):
        federation.hear("a", 3, "shares", "from a, twice, without a cut")
    federation.suspend("b", "cut", cut=True)
    third = Spoken("b")
    assert federation.resume(third)
    assert third.said == []


class Given(Spoken):
    """One that also takes tasks."""

    def give(self, task: Any) -> None:
        self.heard.set()


def test_what_nobody_answers_is_said_again_to_a_site_that_is_back_in_its_round_and_not_after_it() -> None:
    federation = Federation(
        "job", {}, ParamsType.FULL, min_sites=2, round_seconds=20, observe=lambda _: None, pause_seconds=30
    )
    here, away, back, late = Given("a"), Given("b"), Given("b"), Given("b")
    for site in (here, away):
        federation.join(site)
    bodies = {"a": "x", "b": "y", "gone": "z"}
    with SealedMemory.of(encode({})) as model:
        task = Task(3, 9, model)
        rounds = iter(federation.train(task, meanwhile=lambda: federation.tell(3, "dealt", bodies)))
        counted: list[str] = []
        round_ = threading.Thread(target=lambda: counted.extend(update.site for update in rounds))
        round_.start()
        assert here.heard.wait(5)
        assert away.heard.wait(5)
        federation.suspend("b", "cut", cut=True)
        assert federation.resume(back)
        assert back.said == [(3, "dealt", "y")]
        with pytest.raises(MalformedMessage, match="out of turn"):
            federation.hear("a", 3, "dealt", "")
        for name in "ab":
            update = SealedMemory.of(encode({}))
            federation.submit(name, 3, update, params_type=ParamsType.FULL, weight=1, metrics={})
        round_.join(5)
        assert sorted(counted) == ["a", "b"]
    federation.suspend("b", "cut", cut=True)
    assert federation.resume(late)
    assert late.said == []


def test_a_site_answers_the_same_twice_and_another_question_never() -> None:
    """So a server gains nothing by pretending a cut: no second set of shares, survivors or secrets is to be had."""
    secure = SecureAggregation()
    settings = JobSettings.model_validate(
        {
            "name": "x", "recipe": "fedavg", "num_rounds": 2, "min_clients": 2, "train_script": "x.py",
            "framework": "numpy", "model": {"w": {"dtype": "F32", "shape": (2,)}},
            "outputs": {"metrics": (), "values": 0}, "secure_aggregation": secure.model_dump(),
        }
    )  # fmt: skip
    from fl.aggregation.mask_talk import bag, introduced, named, read_bag

    names = ["a", "b", "c"]
    sites = {name: MaskingSite(name, settings, secure, SimulatedNotary("job", names)) for name in names}
    tokens = {name: site.hear(0, "keys", "") for name, site in sites.items()}
    assert sites["a"].hear(0, "keys", "") == tokens["a"]
    message = introduced(tokens, None)
    dealt = {name: read_bag(site.hear(0, "shares", message)) for name, site in sites.items()}
    assert read_bag(sites["a"].hear(0, "shares", message)) == dealt["a"]
    asked = {"dealt": bag({other: dealt[other]["a"] for other in ("b", "c")}), "survivors": named(names)}
    others = {"dealt": bag({"b": dealt["b"]["a"]}), "survivors": named(["a", "b"]), "unmask": bag({})}
    with pytest.raises(MaskingRefused, match="were others"):
        sites["a"].hear(0, "shares", introduced({name: tokens[name] for name in ("a", "b")}, None))
    for name in ("b", "c"):
        sites[name].hear(0, "dealt", bag({other: dealt[other][name] for other in names if other != name}))
    for step in ("dealt", "survivors"):
        if step == "survivors":
            for site in sites.values():
                site.masked(0, [np.zeros(2, dtype=np.float32)], {}, 1.0).close()
        first = sites["a"].hear(0, step, asked[step])  # type: ignore[arg-type]
        assert sites["a"].hear(0, step, asked[step]) == first  # type: ignore[arg-type]
        with pytest.raises(MaskingRefused, match="were others"):
            sites["a"].hear(0, step, others[step])  # type: ignore[arg-type]
    with pytest.raises(MaskingRefused, match="masked before"):
        sites["a"].masked(0, [np.zeros(2, dtype=np.float32)], {}, 1.0)
    confirmed = {name: sites[name].hear(0, "survivors", named(names)) for name in names}
    assert sites["a"].hear(0, "unmask", bag(confirmed)) == sites["a"].hear(0, "unmask", bag(confirmed))
    with pytest.raises(MaskingRefused, match="were others"):
        sites["a"].hear(0, "unmask", others["unmask"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


@pytest.mark.parametrize(
    "step", ["shares", "survivors", *(pytest.param(one, marks=pytest.mark.long) for one in ("keys", "dealt", "unmask"))]
)
def test_a_cut_in_the_middle_of_an_exchange_costs_its_time_and_nothing_else(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The site's connections end as it is about to answer, or to hear what nobody answers: that goes into nothing, and
    the site is back after a second."""
    model = np.zeros(3, dtype=np.float32)
    bundle, first = make_job(
        tmp_path,
        f"# {step}\n{SCRIPT}",
        initial_model={"w": model},
        num_rounds=3,
        round_seconds=60,
        secure_aggregation=True,
    )
    world.approve(bundle)
    proxies: list[Proxy] = []
    cuts: list[str] = []
    answer, say = SiteJob._answer, RemoteSite.say

    def cut_at(site: str, said: str, round_: int) -> None:
        if site == SITES[1] and said == step and round_ == (0 if step == "keys" else 1) and not cuts:
            cuts.append(step)
            proxies[0].cut()
            threading.Timer(1.0, proxies[0].mend).start()

    def answering(self: SiteJob, round_: int, asked: Any, body: str, run: str) -> None:
        assert asked != "dealt", "the server does not wait for an answer to this"
        cut_at(self._site, asked, round_)
        answer(self, round_, asked, body, run)

    def saying(self: RemoteSite, round_: int, said: Any, body: str) -> None:
        if said == "dealt":
            cut_at(self.name, said, round_)
        say(self, round_, said, body)

    monkeypatch.setattr(SiteJob, "_answer", answering)
    monkeypatch.setattr(RemoteSite, "say", saying)
    with (
        passing_proxy(server) as proxy,
        world.site(server, SITES[0], number=1.0),
        world.site(proxy.address, SITES[1], number=3.0, patience=60.0),
        world.client(server) as client,
    ):
        proxies.append(proxy)
        job = client.submit(bundle, first, roster=None, recipients=["acme-pharma/ada"])
        events = list(client.watch(job, timeout=90))
        assert [event.text for event in events if event.kind == "status"][-1] == "finished", client.report(job).reasons
        folder = client.download(job, tmp_path / "result", ledgers=None)
    assert cuts == [step]
    assert [event.kind for event in events if event.kind in {"paused", "resumed", "lost"}] == ["paused", "resumed"]
    counted = [(event.round, event.site) for event in events if event.kind == "update"]
    assert sorted(counted) == [(round_, site) for round_ in (0, 1, 2) for site in sorted(SITES)]
    assert load_file(folder / "model.safetensors")["w"] == pytest.approx(model + 3 * 2, abs=1e-5)
