"""The trusted loop: no code of the bundle's runs, each record is bounded, and costs are what dp-accounting says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fl import FedAvgRecipe, SimEnv, train_privately
from fl.errors import RecipeUnusable
from fl.guard.accounting import debited, epsilon
from fl.guard.keystream import Keystream
from fl.jobs.privacy import DpSgd
from fl.local.dp_sgd import clip, per_record_gradients, train, what_runs
from fl.local.graph import OPERATIONS, export_graph, parse_graph

PRIVACY = DpSgd(
    data="train.safetensors", loss="cross_entropy", steps=8, sample_rate=0.25, expected_batch=25.0,
    learning_rate=0.5, max_grad_norm=1.0, noise_multiplier=1.0, delta=1e-5,
)  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()


def records(count: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(count, 4, generator=generator)
    return features, (features[:, 0] > 0).long()


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_graph_is_the_model() -> None:
    model = network()
    graph = parse_graph(export_graph(model, torch.zeros(1, 4)))
    example = torch.randn(1, 4)
    assert torch.allclose(graph.run(parameters(model), example), model(example))


def test_gradients_are_each_record_s_own() -> None:
    """They are those of plain autograd on that record alone; another record in the batch changes nothing."""
    model = network()
    features, labels = records(5)
    gradients = per_record_gradients(parse_graph(export_graph(model, torch.zeros(1, 4))), PRIVACY)
    together = gradients(parameters(model), features, labels)
    for row in range(5):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(features[row : row + 1]), labels[row : row + 1]).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(together[name][row], parameter.grad, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1e6, 1e30, math.inf, -math.inf, math.nan])
def test_no_record_moves_the_sum_by_more_than_the_bound(value: float) -> None:
    gradients = {"a": torch.full((3, 2, 2), value), "b": torch.full((3, 5), value)}
    clipped = clip(gradients, 1.0)
    norms = sum(tensor.double().flatten(1).square().sum(dim=1) for tensor in clipped.values())
    assert torch.isfinite(torch.as_tensor(norms)).all()
    assert float(torch.as_tensor(norms).max()) <= 1.0 + 1e-6


def test_one_record_with_an_overflowing_loss_leaves_no_trace_but_noise() -> None:
    """The attack: a graph that turns one record into infinity, so that its presence shows as a NaN."""
    features, labels = records(40)
    features[7] = 1e38
    model = network()
    graph = parse_graph(export_graph(model, torch.zeros(1, 4)))
    trained = train(graph, parameters(model), features, labels, PRIVACY.model_copy(update={"sample_rate": 1.0}))
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())


def test_the_noise_is_as_large_as_it_says() -> None:
    """Without a record taking part, one step is noise alone: its standard deviation is checked over 10,000 numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100)).eval()
    graph = parse_graph(export_graph(model, torch.zeros(1, 100)))
    once = PRIVACY.model_copy(
        update={"steps": 1, "loss": "mse", "sample_rate": 1e-12, "noise_multiplier": 3.0, "max_grad_norm": 2.0}
    )
    before = parameters(model)
    after = train(graph, before, torch.zeros(4, 100), torch.zeros(4, 100), once)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(moved.std()) == pytest.approx(3.0 * 2.0 * once.learning_rate / once.expected_batch, rel=0.05)


def test_the_keystream_s_numbers_are_normal_and_its_key_s_own() -> None:
    sample = Keystream(bytes(32)).normal(100_001)
    assert sample.mean() == pytest.approx(0, abs=0.02)
    assert sample.std() == pytest.approx(1, abs=0.02)
    assert np.abs(sample).max() < 8.7
    assert np.array_equal(sample, Keystream(bytes(32)).normal(100_001))
    assert not np.array_equal(sample[:10], Keystream(b"\1" * 32).normal(10))


def test_what_it_costs() -> None:
    """One full-batch step is the Gaussian mechanism; its known bound and the accountant's agree. Debits sum up."""
    one = PRIVACY.model_copy(update={"steps": 1, "sample_rate": 1.0, "noise_multiplier": 4.0})
    classic = math.sqrt(2 * math.log(1.25 / one.delta)) / 4.0
    assert 0.5 * classic < epsilon(one, 1) < classic
    costs = [debited(PRIVACY, round_) for round_ in range(5)]
    assert sum(cost for cost, _ in costs) == math.ceil(epsilon(PRIVACY, 5) * 10**6)
    assert [delta for _, delta in costs] == [10_000_000, 0, 0, 0, 0]
    assert costs[0][0] > costs[1][0] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["nodes"][0].update(op="from_file.default"), "may not stand in a graph"),
        (lambda d: d["nodes"][0].update(op="__import__"), "may not stand in a graph"),
        (lambda d: d["nodes"][0].update(op="bernoulli.default"), "may not stand in a graph"),
        (lambda d: d["nodes"][0].update(op="add_.Tensor"), "may not stand in a graph"),
        (lambda d: d["nodes"][0].update(args=["os.system"]), "neither number"),
        (lambda d: d["nodes"][0].update(args=[{"ref": "later"}]), "later or nowhere"),
        (lambda d: d["nodes"][0].update(name=d["input"]), "defined twice"),
        (lambda d: d["nodes"][0].update(code="1"), "exactly name, op and args"),
        (lambda d: d.update(output="nothing"), "output"),
        (lambda d: d.update(more=1), "exactly version"),
        (lambda d: d.update(version=2), "another version"),
    ],
)
def test_a_graph_that_is_no_pure_graph_is_refused(change: object, words: str) -> None:
    document = json.loads(export_graph(network(), torch.zeros(1, 4)))
    change(document)  # type: ignore[operator]
    with pytest.raises(RecipeUnusable, match=words):
        parse_graph(json.dumps(document).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_graph_or_refused(raw: bytes) -> None:
    with pytest.raises(RecipeUnusable):
        parse_graph(raw)


def test_no_operation_draws_writes_or_reads_anything() -> None:
    """What is allowed is functional by torch's own word: no mutation, no alias writing, no randomness."""
    for name in OPERATIONS - {"getitem"}:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload)
        assert not operation._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in operation.tags, name


def test_models_with_state_or_randomness_make_no_graph() -> None:
    for model, words in (
        (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval(), "state of its own"),
        (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()).train(), "may not stand in a graph"),
    ):
        with pytest.raises(RecipeUnusable, match=words):
            export_graph(model, torch.zeros(1, 4))


def make_recipe(folder: Path) -> FedAvgRecipe:
    model = network()
    (folder / "model.graph.json").write_bytes(export_graph(model, torch.zeros(1, 4)))
    recipe = FedAvgRecipe(
        name="private", model=model, min_clients=2, num_rounds=2, train_script=str(folder / "model.graph.json")
    )
    train_privately(recipe, **PRIVACY.model_dump(exclude_defaults=True))
    return recipe


def test_a_private_job_learns(tmp_path: Path) -> None:
    for site in ("site-1", "site-2"):
        (tmp_path / "data" / site).mkdir(parents=True)
        features, labels = records(200)
        save_file({"features": features, "labels": labels}, tmp_path / "data" / site / "train.safetensors")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "evil.py").write_text("raise SystemExit('this must not run')")
    recipe = make_recipe(tmp_path / "code")
    run = recipe.execute(SimEnv(num_clients=2, data=tmp_path / "data", workspace_root=tmp_path / "runs"))
    model = network()
    model.load_state_dict(load_file(run.get_result() / "model.safetensors"))
    features, labels = records(200)
    assert float((model(features).argmax(dim=1) == labels).float().mean()) > 0.8


def test_nothing_but_the_graph_is_in_the_sandbox(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    graph = (tmp_path / "model.graph.json").read_bytes()
    files, script = what_runs({"model.graph.json": graph, "evil.py": b"1"}, recipe.settings, "model.graph.json")
    assert script == "loop.py"
    assert set(files) == {"loop.py", "graph.json", "privacy.json"}
    with pytest.raises(RecipeUnusable, match="no graph"):
        what_runs({"model.graph.json": b"import os"}, recipe.settings, "model.graph.json")


def test_private_training_has_no_other_way_out(tmp_path: Path) -> None:
    from fl import declare_outputs

    recipe = make_recipe(tmp_path)
    with pytest.raises(RecipeUnusable, match="no metrics"):
        declare_outputs(recipe, metrics=["loss"])
    assert recipe.settings.fixed_weight
