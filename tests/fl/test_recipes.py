"""Every recipe against its plain reference, in a simulation and over the attested path; and what makes one unusable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_world import SITES, FederationWorld, found_federation
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_jobs import JOBS, NUMBERS, START, recipe_of
from safetensors.numpy import load_file

from fl import SimEnv
from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobFailed, RecipeUnusable
from fl.jobs.bundle import make_bundle, parse_bundle
from fl.jobs.settings import FedOptOptions
from fl.local.fedprox import FedProxLoss
from fl.local.scaffold import ControlVariates
from fl.local.statistics import with_floor
from fl.model import FLModel, ParamsType, params_of, schema_of, tensors_of
from fl.recipes.fedopt import ServerOptimizer
from fl.recipes.scaffold import CONTROL, ScaffoldRecipe
from fl.tensors import BLOCK, encode, parse


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def simulation(folder: Path) -> SimEnv:
    for name, number in NUMBERS.items():
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "number.txt").write_text(str(number))
    return SimEnv(clients=list(NUMBERS), data=folder / "data", workspace_root=folder / "runs")


def assert_reference(name: str, result: Path) -> None:
    found = load_file(result / "model.safetensors")
    wanted = JOBS[name][3]()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", JOBS)
def test_a_simulation_gives_what_the_paper_gives(name: str, tmp_path: Path) -> None:
    run = recipe_of(name, tmp_path).execute(simulation(tmp_path))
    assert_reference(name, run.get_result())
    record = json.loads((run.get_result() / "job.json").read_text())
    assert [sorted(entry["updates"]) for entry in record["rounds"]] == [sorted(NUMBERS)] * len(record["rounds"])


@pytest.mark.parametrize("name", ["fedprox", "fedopt-yogi", "cyclic", "scaffold", "lr-newton", "fedstats"])
def test_the_attested_path_gives_the_same(name: str, world: FederationWorld, server: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    bundle = make_bundle(recipe.folder, recipe.settings)
    assert parse_bundle(bundle.raw).settings == recipe.settings
    world.approve(bundle)
    with (
        world.site(server, SITES[0], number=NUMBERS[SITES[0]]),
        world.site(server, SITES[1], number=NUMBERS[SITES[1]]),
        world.client(server) as client,
        recipe.first_model() as model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        assert [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1] == "finished"
        assert_reference(name, client.download(job, tmp_path / "result", ledgers=None))


def test_the_optimizer_steps_over_blocks_and_leaves_integers_to_the_mean(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    model = {"w": random.normal(size=BLOCK + 17).astype(np.float32), "n": np.array([3, 4])}
    schema = schema_of(tensors_of(model))
    options = recipe_of("fedopt-adam", tmp_path).settings.options
    assert isinstance(options, FedOptOptions)
    optimizer, mean = ServerOptimizer(options, schema), WeightedMean(schema, ParamsType.FULL)
    w, m, v = model["w"].astype(np.float64), 0.0, 0.01**2
    for _ in range(2):
        updates = [random.normal(size=BLOCK + 17).astype(np.float32) for _ in range(2)]
        for update, weight in zip(updates, (1.0, 3.0), strict=True):
            mean.fold(parse(encode(tensors_of({"w": update, "n": np.array([8, 8])})), max_size=1 << 30), weight)
        raw = encode(tensors_of(model))
        with mean.result(parse(raw, max_size=len(raw)), step=optimizer.step) as result:
            read = params_of(parse(result.view, max_size=result.size), "numpy")
            model = {name: array.copy() for name, array in read.items()}
            del read
        delta = (updates[0] + 3.0 * updates[1]) / 4 - w
        m = 0.8 * m + 0.2 * delta
        v = 0.9 * v + 0.1 * delta**2
        w = w + 0.1 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(model["w"], w, rtol=1e-4, atol=1e-5)
    assert model["n"].tolist() == [8, 8]


def test_cyclic_goes_on_without_a_site_that_fails_at_its_turn(tmp_path: Path) -> None:
    recipe = recipe_of("cyclic", tmp_path, min_clients=1)
    script = tmp_path / "code" / "client.py"
    script.write_text(
        script.read_text().replace("    received", "    if a == 3: raise SystemExit('ill')\n    received", 1)
    )
    run = recipe.execute(simulation(tmp_path))
    assert run.get_status() == "finished"
    w = load_file(run.get_result() / "model.safetensors")["w"]
    np.testing.assert_allclose(w, 1 + (START - 1) * 0.9 ** (3 * 4))


def test_cyclic_fails_where_a_site_too_few_is_left(tmp_path: Path) -> None:
    recipe = recipe_of("cyclic", tmp_path)
    script = tmp_path / "code" / "client.py"
    script.write_text(
        script.read_text().replace("    received", "    if a == 3: raise SystemExit('ill')\n    received", 1)
    )
    run = recipe.execute(simulation(tmp_path))
    with pytest.raises(JobFailed, match="1 updates, 2 are needed") as failure:
        run.get_result()
    assert any("cygnus-bio: " in reason and "ill" in reason for reason in failure.value.reasons)


def test_a_random_cycle_is_the_same_again_for_the_same_seed(tmp_path: Path) -> None:
    env = simulation(tmp_path)
    models = []
    for seed in (1, 1, 2, 3, 4):
        run = recipe_of("cyclic", tmp_path, order="random", seed=seed).execute(env)
        models.append(load_file(run.get_result() / "model.safetensors")["w"].tolist())
    assert models[0] == models[1]
    assert any(model != models[0] for model in models[2:])


def test_the_proximal_term_is_the_papers() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    received = {name: value.clone() for name, value in network.state_dict().items()}
    network[1].weight.requires_grad_(False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape)
    loss = FedProxLoss(0.3)(network, received)
    trainable = [(name, one) for name, one in network.named_parameters() if one.requires_grad]
    wanted = 0.15 * sum(float(((one.detach() - received[name]) ** 2).sum()) for name, one in trainable)
    assert loss.item() == pytest.approx(wanted)
    loss.backward()
    for name, parameter in trainable:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 0.3 * (parameter.detach() - received[name]))
    with pytest.raises(ValueError, match="mu"):
        FedProxLoss(-1)


def test_control_variates_correct_a_torch_network_and_leave_its_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    (tmp_path / "client.py").write_text("")
    recipe = ScaffoldRecipe(
        min_clients=1, initial_model=network, train_script=str(tmp_path / "client.py"), num_rounds=1
    )
    parameters = {name for name, _ in network.named_parameters()}
    assert {name for name in recipe.settings.model if name.startswith(CONTROL)} == {CONTROL + one for one in parameters}

    state: dict[str, Any] = {name: value.clone() for name, value in network.state_dict().items()}
    control = {name: torch.randn(state[name].shape) for name in parameters}
    variates = ControlVariates()
    variates.receive(FLModel(params={**state, **{CONTROL + name: value for name, value in control.items()}}))
    assert variates.params.keys() == state.keys()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(8, 3)).square().sum().backward()
    plain = {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
    variates.correct(network)
    optimizer.step()
    sent = variates.answer(network.state_dict(), steps=1, lr=0.1)
    assert sent.params.keys() == recipe.settings.model.keys()
    assert sent.params["1.num_batches_tracked"] == 1
    for name in parameters:
        torch.testing.assert_close(sent.params[name], -0.1 * (plain[name] + control[name]), atol=1e-6, rtol=1e-4)
        # c_i was 0, so that c_i+ - c_i is the plain gradient
        torch.testing.assert_close(sent.params[CONTROL + name], plain[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("fedprox", {"mu": -1.0}, "mu"),
        ("fedprox", {"mu": float("nan")}, "mu"),
        ("fedopt-sgd", {"optimizer": "adagrad"}, "optimizer"),
        ("fedopt-sgd", {"lr": 0.0}, "lr"),
        ("fedopt-adam", {"beta2": 1.0}, "beta2"),
        ("cyclic", {"order": "backwards"}, "order"),
        ("cyclic", {"seed": -1}, "seed"),
        ("scaffold", {"params_type": "FULL"}, "params_type"),
        ("scaffold", {"initial_model": {"flag": np.zeros(2, dtype=np.bool_)}}, "initial_model"),
        ("lr-newton", {"num_features": 0}, "num_features"),
        ("lr-newton", {"damping_factor": 1.5}, "damping_factor"),
        ("fedstats", {"features": {}}, "features"),
        ("fedstats", {"features": {"a/b": (0.0, 1.0)}}, "features"),
        ("fedstats", {"features": {"age": (1.0, 1.0)}}, "age"),
        ("fedstats", {"bins": 0}, "bins"),
        ("fedstats", {"min_count": 1}, "min_count"),
        ("fedprox", {"initial_model": None}, "exactly one"),
    ],
)
def test_a_wrong_argument_of_a_recipe_is_named(
    name: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeUnusable, match=complaint):
        recipe_of(name, tmp_path, **changes)


def test_settings_with_another_recipes_options_are_refused(tmp_path: Path) -> None:
    found = recipe_of("fedprox", tmp_path).settings
    for changes in ({"recipe": "fedavg"}, {"options": None}, {"recipe": "scaffold"}):
        with pytest.raises(ValueError, match="options are not those of"):
            type(found).model_validate({**found.model_dump(), **changes})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 20), st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_a_histogram_with_a_floor_tells_of_enough_records_or_of_none(
    counts: list[int], outside: int, floor: int
) -> None:
    total = sum(counts) + outside
    if total < floor:
        return  # such a feature is left out whole
    shown = with_floor(np.array(counts), total, floor)
    assert all(value == 0 or value == count >= floor for value, count in zip(shown, counts, strict=True))
    hidden = total - shown.sum()
    assert hidden == 0 or hidden >= floor


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("sent.params['histogram'][0, 0] = 1", "histogram tells of fewer than 5 records"),
        ("sent.params['count'][1] = 4", "count tells of fewer than 5 records"),
        ("sent.params['count'][1] = 7.5", "count holds what is no count"),
        ("sent.params['histogram'][0, 0] = -9", "histogram holds what is no count"),
    ],
)
def test_a_site_that_tells_of_a_few_records_is_refused(line: str, complaint: str, tmp_path: Path) -> None:
    recipe = recipe_of("fedstats", tmp_path)
    answer = "flare.send(statistics_update(flare.receive(), values))"
    script = tmp_path / "code" / "client.py"
    told = f"sent = statistics_update(flare.receive(), values)\n    if a == 3: {line}\n    flare.send(sent)"
    script.write_text(script.read_text().replace(answer, told))
    run = recipe.execute(simulation(tmp_path))
    with pytest.raises(JobFailed) as failure:
        run.get_result()
    assert any(f"cygnus-bio: its {complaint}" in reason for reason in failure.value.reasons)


def test_a_feature_with_too_few_values_is_left_out(tmp_path: Path) -> None:
    recipe = recipe_of("fedstats", tmp_path, min_count=101)
    run = recipe.execute(simulation(tmp_path))
    found = load_file(run.get_result() / "model.safetensors")
    assert found["weight/count"] == 300, "the site with 100 records tells nothing"
    assert found["age/count"] == 299


def test_a_reviewer_is_shown_a_recipes_options(tmp_path: Path) -> None:
    digest = recipe_of("fedprox", tmp_path).export(tmp_path / "out")
    seal = Path(sys.executable).parent / "seal"
    command = [seal, "job", "show", tmp_path / "out" / "job.bundle"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert digest in shown
    assert 'options  {"mu":0.7}' in shown
