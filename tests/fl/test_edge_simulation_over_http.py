"""Virtual devices against a real gateway over TLS: each attests it, is let in by its token, trains and reports once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_world import AddingTrainer, EdgeWorld, found_edge
from federation_world import wait_until

from appliance.cli import main
from fl.edge.kits.python.data import Arrays, Dataset
from fl.edge.simulation.over_http import Issuer, simulate_over_http
from fl.edge.simulation.population import Population, PopulationSettings
from fl.edge.simulation.processors import LocalTraining, Skew, SoftmaxRegression, digits
from policies.errors import Refused, Unusable
from policies.keys import private_pem


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("edge"))


class CountingTrainer(AddingTrainer):
    """Adds 0.5, and knows how many examples each device had."""

    sizes: list[int] = []  # noqa: RUF012 - of all trainers of this test

    def train(
        self,
        graph: bytes,
        config: Mapping[str, Any],
        model: Arrays,
        dataset: Dataset,
        rng: np.random.Generator,
        go_on: Callable[[], None],
    ) -> Arrays:
        self.sizes.append(len(dataset))
        return super().train(graph, config, model, dataset, rng, go_on)


def population(devices: int, dropout: float = 0.0) -> Population:
    described = {
        "devices": devices,
        "dropout": dropout,
        "speed": {"median_seconds": 0.05, "sigma": 0.5},
        "availability": {"mean": 1.0, "amplitude": 0.0},
    }
    return Population(PopulationSettings.model_validate(described))


DATA = SoftmaxRegression(digits()[0], Skew(samples=8), LocalTraining(), 1)


def data_of(number: int) -> tuple[Any, Any]:
    inputs, labels = DATA.data_of(np.array([number]))
    return inputs[0], labels[0]


def play(world: EdgeWorld, url: str, people: Population, folder: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"seconds": 4.0, "workers": 2, "production": False, "capabilities": {"os": "linux"}}
    return simulate_over_http(
        [url],
        changes.pop("root", world.root),
        Issuer(changes.pop("issuer", "phones"), world.issuer_key),
        "heart-*",
        people,
        data_of,
        CountingTrainer,
        folder,
        **{**arguments, **changes},
    )


def test_virtual_devices_report_to_a_real_gateway_once_each(world: EdgeWorld, tmp_path: Path) -> None:
    branch, people = world.branch(), population(12)

    def end_when_all_have_reported() -> None:
        branch.over = wait_until(lambda: len(branch.claims().get(1, ())) == 12, 30)

    watch = threading.Thread(target=end_when_all_have_reported)
    watch.start()
    with world.serving(world.gateway(branch)) as (url, _):
        trace = play(world, url, people, tmp_path, seconds=40.0)
    watch.join()
    assert trace.ended == "the job is over"
    assert trace.outcomes["counted"] == 12
    assert trace.contributed == 12
    assert set(CountingTrainer.sizes) == {8}
    branch.claims()
    branch.settle(())
    partial = branch.take()
    assert partial is not None
    assert partial.versions[1].count == 12
    assert partial.versions[1].weight == 12 * 8
    assert [row["version"] for row in trace.versions] == [1]


@pytest.mark.long
def test_devices_that_vanish_do_not_report(world: EdgeWorld, tmp_path: Path) -> None:
    branch, people = world.branch(), population(10, dropout=0.5)
    with world.serving(world.gateway(branch)) as (url, _):
        trace = play(world, url, people, tmp_path, seconds=3.0)
    assert trace.outcomes["vanished"] + trace.outcomes["counted"] <= 10
    assert 0 < trace.outcomes["vanished"] < 10


def test_the_devices_believe_only_their_charter(world: EdgeWorld, tmp_path: Path) -> None:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, _):
        with pytest.raises((Refused, Unusable)):
            play(world, url, population(2), tmp_path, root=world.root[:-1] + b" ")
        with pytest.raises(Refused, match="virtual"):
            play(world, url, population(2), tmp_path, production=True)
        with pytest.raises(Unusable, match="no issuer"):
            play(world, url, population(2), tmp_path, issuer="nobody")
        with pytest.raises(Unusable, match="more than"):
            play(world, url, population(20_001), tmp_path)
    assert branch.claims() == {}


def test_the_command_says_what_it_lacks_and_what_answers(
    world: EdgeWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description, root, key = tmp_path / "devices.toml", tmp_path / "1.root.json", tmp_path / "phones.key"
    description.write_text("[population]\ndevices = 2\n[population.availability]\nmean = 1.0\namplitude = 0.0\n")
    root.write_bytes(world.root)
    key.write_bytes(private_pem(world.issuer_key))
    key.chmod(0o600)

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["site", "simulate-devices", str(description), *words])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    status, said = run("--gateway", "https://127.0.0.1:1")
    assert (status, "--issuer" in said) == (2, True)
    with world.serving(world.gateway(world.branch())) as (url, _):
        words = ["--gateway", url, "--trust", str(root), "--issuer", "phones", "--key", str(key), "--seconds", "1"]
        status, said = run(*words)
        assert (status, "virtual" in said) == (1, True)
        status, said = run(*words, "--virtual", "--json")
    assert status == 0
    assert json.loads(said)["devices"]["registered"] == 2
