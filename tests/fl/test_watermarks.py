"""Watermarks: a leaked model names its site, also after noise and further training; nobody is named for nothing."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import MODEL_KEY, SITES, FederationWorld, found_federation, make_job
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from appliance.cli import main
from fl import FedAvgRecipe, SimEnv
from fl.errors import RecipeUnusable
from fl.guard.watermark import FALSE_ALARMS, marked, trace, watermark_key
from fl.tensors import TensorFile, parse
from policies.errors import Unusable

NAMES = [f"site-{number:02}" for number in range(50)]
KEY = watermark_key(b"k" * 32, "job")


def file_of(tensors: dict[str, Any]) -> TensorFile:
    raw = save(tensors)
    return parse(raw, max_size=len(raw))


def model(seed: int, size: int = 40_000) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        "layer.weight": (draw.standard_normal((size // 100, 100)) * 0.05).astype(np.float32),
        "layer.bias": draw.standard_normal(100).astype(np.float32),
        "half": draw.standard_normal(4000).astype(np.float16),
        "count": np.arange(1000),
    }


def handed(tensors: dict[str, Any], site: str, strength: float = 0.01) -> dict[str, Any]:
    with marked(file_of(tensors), KEY, site, strength) as memory:
        file = parse(memory.view, max_size=memory.size)
        found = {name: file.array(name).copy() for name in tensors}
        file.raw.release()
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return model(1)


def test_a_mark_moves_each_number_a_hundredth_and_leaves_the_small_and_the_whole_alone(plain: dict[str, Any]) -> None:
    found = handed(plain, "site-07")
    moved = np.abs(found["layer.weight"] - plain["layer.weight"])
    assert moved == pytest.approx(np.full_like(moved, 0.01 * np.sqrt((plain["layer.weight"] ** 2).mean())), rel=1e-3)
    assert np.abs(found["half"].astype(float) - plain["half"]).mean() == pytest.approx(0.01, rel=0.1)
    for name in ("layer.bias", "count"):
        assert np.array_equal(found[name], plain[name])


def in_steps(value: Any) -> Any:
    step = np.abs(value).max() / 127
    return np.round(value / step) * step


ATTACKS: dict[str, Any] = {
    "as it was": lambda value, draw: value,
    "with noise ten times as strong": lambda value, draw: value + draw.standard_normal(value.shape) * value.std() * 0.1,
    "scaled": lambda value, draw: value * 1.02,
    "in half precision": lambda value, draw: value.astype(np.float16),
    "pruned by half": lambda value, draw: np.where(np.abs(value) > np.median(np.abs(value)), value, 0),
    "in steps of eight bits": lambda value, draw: in_steps(value),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_among_fifty_sites_the_leak_is_named(plain: dict[str, Any], attack: str) -> None:
    draw = np.random.default_rng(5)
    leaked = {
        name: ATTACKS[attack](value, draw).astype(np.float16 if attack == "in half precision" else value.dtype)
        for name, value in handed(plain, "site-31").items()
    }
    found = trace(file_of(leaked), KEY, NAMES, file_of(plain))
    assert [one.site for one in found if one.named] == ["site-31"], found[:3]
    assert found[0].bound * len(NAMES) <= FALSE_ALARMS < found[1].bound * len(NAMES)


def test_a_model_that_was_trained_further_names_its_leak(plain: dict[str, Any]) -> None:
    """Gradient descent on other data, of which a hundred steps move the numbers more than the mark did."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(100, 400), torch.nn.ReLU(), torch.nn.Linear(400, 1))
    first = {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}
    net.load_state_dict({name: torch.from_numpy(value) for name, value in handed(first, "site-12").items()})
    inputs, wanted = torch.randn(512, 100), torch.randn(512, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(inputs), wanted).backward()
        optimizer.step()
    trained = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    moved = np.sqrt(((trained["0.weight"] - first["0.weight"]) ** 2).mean() / (first["0.weight"] ** 2).mean())
    assert moved > 0.02
    found = trace(file_of(trained), KEY, NAMES, file_of(first))
    assert [one.site for one in found if one.named] == ["site-12"]


def test_two_that_share_a_leak_are_both_named(plain: dict[str, Any]) -> None:
    one, other = handed(plain, "site-01"), handed(plain, "site-02")
    mixed = {name: ((value.astype(np.float64) + other[name]) / 2).astype(value.dtype) for name, value in one.items()}
    found = trace(file_of(mixed), KEY, NAMES, file_of(plain))
    assert {suspicion.site for suspicion in found if suspicion.named} == {"site-01", "site-02"}


def test_a_large_model_is_traced_without_a_known_one() -> None:
    large = {"w": (np.random.default_rng(9).standard_normal(1_000_000) * 0.05).astype(np.float32)}
    found = trace(file_of(handed(large, "site-40")), KEY, NAMES)
    assert [one.site for one in found if one.named] == ["site-40"]


def test_nobody_is_named_for_nothing(plain: dict[str, Any]) -> None:
    """Models without a mark, and those of other owners: two hundred keys, fifty sites each; and scores that are spread
    as the bound says they may be."""
    drifted = {name: value for name, value in model(2).items() if name != "count"}
    scores = []
    for number in range(200):
        key = watermark_key(number.to_bytes(32, "big"), "job")
        found = trace(file_of({"w": drifted["layer.weight"][:40]}), key, NAMES)
        assert not any(one.named for one in found)
        scores += [one.score for one in found]
    for level in (1.0, 2.0, 3.0):
        share = float(np.mean(np.array(scores) > level))
        assert share <= math.exp(-(level**2) / 2) + 0.005
    assert not any(
        one.named for one in trace(file_of(handed(plain, "site-03")), watermark_key(b"x" * 32, "job"), NAMES)
    )
    assert not any(one.named for one in trace(file_of(plain), KEY, NAMES, file_of(plain)))


@settings(max_examples=30, deadline=None)
@given(st.integers(256, 3000), st.floats(-1e6, 1e6, width=32), st.sampled_from([np.float16, np.float32, np.float64]))
def test_any_model_is_marked_and_any_is_looked_at(size: int, value: float, kind: Any) -> None:
    tensors = {"w": np.full(size, max(-1e4, min(1e4, value)), dtype=kind)}
    found = handed(tensors, "site-00")
    assert found["w"].dtype == kind
    assert len(trace(file_of(found), KEY, NAMES[:3], file_of(tensors))) == 3


def test_what_cannot_be_compared_is_said(plain: dict[str, Any]) -> None:
    with pytest.raises(Unusable, match="256 numbers or more"):
        trace(file_of({"other": plain["layer.weight"]}), KEY, NAMES, file_of(plain))
    with pytest.raises(Unusable, match="not finite"):
        trace(file_of({"w": np.full(300, np.nan, dtype=np.float32)}), KEY, NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params_type": "FULL"}, "sites send differences"),
        ({"watermark": {"strength": 3}}, "less than or equal to 0.1"),
        ({"watermark": {"colour": 1}}, "watermark"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "client.py").write_text("pass")
    arguments = {"initial_model": {"w": np.zeros(2, dtype=np.float32)}, "min_clients": 2, "watermark": True}
    with pytest.raises(RecipeUnusable, match=words):
        FedAvgRecipe(train_script=str(tmp_path / "client.py"), **{**arguments, **change})


TRAIN = """
import numpy as np
from fl import client as flare

flare.init()
while flare.is_running():
    received = flare.receive()
    np.save("received.npy", received.params["w"])
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(0.5)}))
"""


@pytest.mark.parametrize("secure", [False, True])
def test_what_sites_send_back_has_no_mark(tmp_path: Path, secure: bool) -> None:
    """Each gets a model of its own; the mean of their differences moves the plain one, plain or under masks."""
    (tmp_path / "client.py").write_text(TRAIN)
    first = np.random.default_rng(4).standard_normal(3000).astype(np.float32)
    recipe = FedAvgRecipe(
        name="marks",
        initial_model={"w": first},
        min_clients=3,
        num_rounds=2,
        train_script=str(tmp_path / "client.py"),
        watermark=True,
        secure_aggregation=secure,
    )
    folder = recipe.execute(SimEnv(num_clients=3, workspace_root=tmp_path / "runs")).get_result()
    assert load_file(folder / "model.safetensors")["w"] == pytest.approx(first + 1, abs=1e-5)
    got = [np.load(folder / f"site-{number}" / "received.npy") for number in (1, 2, 3)]
    assert all(0.3 < float((one != other).mean()) < 0.7 for one, other in pairwise(got))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


LEAK = """
import numpy as np
from fl import client as flare

flare.init()
wanted = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    zero = {"w": received.params["w"] * np.float32(0)}
    flare.send(flare.FLModel(params=received.params if wanted == 2.0 else zero, params_type="DIFF"))
"""


def test_the_owner_traces_a_leak_of_an_attested_job(
    world: FederationWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One site gives its model away (here by its update, which the test takes at the server): the owner learns whose
    it was from the result's record and the model key, by the command."""
    first = np.random.default_rng(6).standard_normal(5000).astype(np.float32)
    bundle, sent = make_job(tmp_path, LEAK, name="marks", num_rounds=1, initial_model={"w": first}, watermark=True)
    world.approve(bundle)
    with (
        world.server() as server,
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=2.0),
        world.client(server) as client,
        sent,
    ):
        job = client.submit(bundle, sent, roster=None, recipients=["acme-pharma/ada"])
        last = [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]
        assert last == "finished", client.report(job).reasons
        folder = client.download(job, tmp_path / "result", ledgers=None)
    # The mean of the two differences is half of what the second site had received.
    leaked = (load_file(folder / "model.safetensors")["w"] - first) * 2
    (tmp_path / "leaked.safetensors").write_bytes(save({"w": leaked}))
    (tmp_path / "result" / "model.safetensors").write_bytes(save({"w": first}))
    (tmp_path / "model.key").write_bytes(MODEL_KEY)

    def command(*words: Any, status: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["job", "trace", *(str(word) for word in words), "--key", str(tmp_path / "model.key"), "--json"])
        assert ended.value.code == status
        return capsys.readouterr().out

    told = json.loads(command(tmp_path / "leaked.safetensors", tmp_path / "result"))
    assert told["named"] == [SITES[1]]
    assert {one["site"] for one in told["sites"]} == set(SITES)
    command(tmp_path / "result" / "model.safetensors", tmp_path / "result", status=1)
    (tmp_path / "model.key").write_bytes(b"short")
    command(tmp_path / "leaked.safetensors", tmp_path / "result", status=2)
