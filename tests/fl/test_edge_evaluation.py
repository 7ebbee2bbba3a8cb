"""Versions of an edge job are evaluated at its root, in a sandbox; the best is kept, and a good one ends the job."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_world import SERVER, FederationWorld, wait_until
from test_edge_tree import EDGE, NAMES, Tree, bundle_of, found_tree

from fl.edge.contract import Update, contribution_id
from fl.edge.evaluating import DATA_FILE, GRAPH_FILE, accuracy, evaluation_files
from fl.edge.settings import EvaluatorConfig
from fl.errors import JobFailed, RecipeUnusable
from fl.jobs.bundle import Bundle, make_bundle
from fl.jobs.settings import JobSettings
from fl.local.graph import parse_graph
from fl.server.evaluator import SandboxedEvaluator
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory

CORNERS = EvaluatorConfig(custom_dataset={"data": [[1.0, 0.0], [0.0, 1.0]], "label": [0, 1]})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_tree(tmp_path_factory.mktemp("world"))


def corners_bundle(**more: Any) -> Bundle:
    """A job of a 2 by 2 matrix that ends when it tells two corners apart."""
    edge = EDGE.model_copy(
        update={"models": EDGE.models.model_copy(update={"max_model_version": 9}), "eval_frequency": 1}
    )
    plain = bundle_of(edge).settings.model_dump()
    selection = {"metric": "accuracy", "mode": "max", "stop_at": 0.9, "patience": None}
    settings = JobSettings.model_validate(
        {**plain, "model": {"weight": {"dtype": "F32", "shape": (2, 2)}}, "selection": selection, **more}
    )
    files = evaluation_files(torch.nn.Linear(2, 2, bias=False), CORNERS)
    return make_bundle(Path("/nonexistent-folder"), settings, {"training.pte": b"a graph", **files})


def model_of(weight: list[list[float]]) -> SealedMemory:
    spec = {"weight": {"dtype": "F32", "shape": (2, 2)}}
    schema = JobSettings.model_validate({**bundle_of().settings.model_dump(), "model": spec}).schema_of_model
    return SealedMemory.of(encode({"weight": (schema["weight"], np.array(weight, "<f4").tobytes())}))


@pytest.mark.long
def test_a_graph_measures_what_its_network_does() -> None:
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    inputs, labels = torch.randn(600, 5), torch.randint(0, 4, (600,))
    files = evaluation_files(net, EvaluatorConfig(custom_dataset={"data": inputs, "label": labels}))
    data = parse(files[DATA_FILE], max_size=1 << 20)
    assert data.array("data").shape == (600, 5)
    wanted = float((net(inputs).argmax(dim=1) == labels).float().mean())
    measured = accuracy(parse_graph(files[GRAPH_FILE]), dict(net.state_dict()), inputs, labels)
    assert measured == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"data": [[1.0]], "label": [0, 1]}, "one label for each row"),
        ({"data": [], "label": []}, "one label for each row"),
        ({"data": ["x"], "label": [0]}, "no numbers"),
        ({"data": [[1.0, 0.0]]}, "exactly data and label"),
    ],
)
def test_test_data_that_are_none_say_so(data: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeUnusable, match=words):
        evaluation_files(torch.nn.Linear(2, 2), EvaluatorConfig(custom_dataset=data))


def test_a_bundle_without_its_evaluation_is_refused() -> None:
    with pytest.raises(JobFailed, match="with which versions are evaluated"):
        SandboxedEvaluator(bundle_of(), "job-1", 1, lambda model: None)


@pytest.mark.long
def test_the_root_evaluates_keeps_the_best_and_ends_with_a_good_one(world: FederationWorld, tmp_path: Path) -> None:
    world.told.clear()
    bundle = corners_bundle()
    world.approve(bundle, NAMES)
    steps = {1: [[0.0, 1.0], [1.0, 0.0]], 2: [[2.0, -2.0], [-2.0, 2.0]]}  # wrong in both corners, then right in both
    with world.server() as address, ExitStack() as ends, world.client(address) as client:
        tree = Tree(world, ends, bundle, None, address, [])  # type: ignore[arg-type]
        gateway, _ = tree.gateway("gate-1", address, SERVER)
        with model_of([[0.0, 0.0], [0.0, 0.0]]) as first:
            job = client.submit(bundle, first, roster=NAMES, recipients=("acme-pharma/ada",))
        assert wait_until(lambda: job in gateway.branches() and bool(gateway.branches()[job].current())), world.told
        branch = gateway.branches()[job]
        for version, step in steps.items():
            assert wait_until(lambda v=version: branch.current()[-1].version == v, 30), world.told
            for device in range(4):
                name = contribution_id(job, version, str(device))
                assert branch.add(Update(version, {"weight": np.array(step, np.float32)}, 1.0, name)) == "counted"
        assert wait_until(lambda: client.report(job).status.over, 30), world.told
        report = client.report(job)
        assert report.status == "finished", report.reasons
        made = client.download(job, tmp_path / "result", ledgers=None)
        for name in ("model", "best_model"):
            raw = (made / f"{name}.safetensors").read_bytes()
            np.testing.assert_allclose(parse(raw, max_size=1 << 20).array("weight"), [[2.0, -1.0], [-1.0, 2.0]])
        events = list(client.watch(job, timeout=10))
        told = [event.values["accuracy"] for event in events if event.kind == "aggregated"]
        assert told == [0.0, 1.0]
        assert [event.round for event in events if event.kind == "best"] == [0, 1]
    assert not tree.errors


@pytest.mark.long
def test_a_graph_that_is_none_ends_its_job_and_nothing_else(world: FederationWorld) -> None:
    """What an author wrote into the graph is no operation: the sandbox refuses it, and the job says that it failed."""
    bundle = corners_bundle()
    graph = bundle.files[GRAPH_FILE].replace(b'"mm.default"', b'"eval.default"')
    assert graph != bundle.files[GRAPH_FILE]
    files = {**bundle.files, GRAPH_FILE: graph}
    broken = make_bundle(Path("/nonexistent-folder"), bundle.settings, files)
    with (
        SandboxedEvaluator(broken, "job-1", 1, lambda model: None) as evaluator,
        model_of([[1.0, 0.0], [0.0, 1.0]]) as model,
        pytest.raises(JobFailed),
    ):
        evaluator.measure(model)
