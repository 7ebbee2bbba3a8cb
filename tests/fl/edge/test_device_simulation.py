"""Virtual devices: drawn as described, the same each time, trained in processes; FedBuff learns what FedAvg learns."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fl.edge.contract import Tensors
from fl.edge.settings import DeviceManagerConfig, ModelManagerConfig
from fl.edge.simulation.description import Description, read_description, simulate
from fl.edge.simulation.pool import TrainingPool
from fl.edge.simulation.population import Devices, Population, PopulationSettings
from fl.edge.simulation.processors import LocalTraining, Skew, SoftmaxRegression, digits
from fl.edge.simulation.report import document, last_accuracy, page
from fl.errors import RecipeUnusable, ScriptFailed
from fl.tensors import TensorSpec
from policies.errors import Unusable

SCHEMA = {"w": TensorSpec("F32", (2, 2)), "b": TensorSpec("F32", (2,))}


def described(**changes: Any) -> Description:
    return Description.model_validate(
        {
            "population": {"devices": 5000, "seed": 3},
            "models": {"num_updates_for_model": 20, "max_model_version": 6, "global_lr": 1.0},
            "selection": {"device_selection_size": 40},
            "tree": {"depth": 2, "width": 2, "moment_seconds": 20.0},
            "task_seconds": 240.0,
            "training": {"steps": 3},
            **changes,
        }
    )


def test_equal_descriptions_make_equal_runs() -> None:
    first, second = (simulate(described(), workers=workers) for workers in (1, 2))
    assert asdict(first) == asdict(second)
    assert first.ended == "the last version is made"
    assert first.outcomes["counted"] >= 100
    assert first.outcomes["vanished"] > 0
    assert first.outcomes["refused"] == 0
    other = simulate(described(population={"devices": 5000, "seed": 4}), workers=1)
    assert other.versions != first.versions


def test_the_population_is_as_described() -> None:
    settings = PopulationSettings.model_validate(
        {
            "devices": 1_000_000,
            "dropout": 0.1,
            "speed": {"median_seconds": 30.0, "sigma": 0.5},
            "availability": {"mean": 0.5, "amplitude": 0.4, "spread": 0.0},
        }
    )
    population = Population(settings)
    all_of_them = np.arange(settings.devices)
    assert population.drops(all_of_them, 1).mean() == pytest.approx(0.1, abs=2e-3)
    logs = np.log(population.seconds(all_of_them))
    assert np.median(logs) == pytest.approx(np.log(30.0), abs=5e-3)
    assert logs.std() == pytest.approx(0.5, rel=1e-2)
    shares = [population.are_there(all_of_them, hour * 3600.0).mean() for hour in range(0, 24, 6)]
    assert shares == pytest.approx([0.1, 0.5, 0.9, 0.5], abs=0.01)
    there = population.are_there(all_of_them, 1000.0)
    assert (population.are_there(all_of_them, 1500.0) != there).mean() < 0.005  # nobody flickers
    held = sum(each.nbytes for each in vars(population).values() if isinstance(each, np.ndarray))
    assert held == 9 * settings.devices


def test_devices_that_are_busy_away_or_done_are_not_drawn() -> None:
    population = Population(PopulationSettings.model_validate({"devices": 400}))
    population.busy[:100] = True
    population.last_version[100:200] = 3
    drawn = population.draw(400, 40_000.0, 3)
    assert drawn.size == len(set(drawn.tolist())) > 0
    assert drawn.min() >= 200
    assert population.are_there(drawn, 40_000.0).all()
    population.last_version[200:] = 1
    assert population.draw(400, 40_000.0, 3, again=False).size == 0
    assert population.draw(400, 40_000.0, 4).size > 0


def test_devices_of_a_job_that_uses_them_once_come_once() -> None:
    selection = {"device_selection_size": 40, "device_reuse": False}
    trace = simulate(
        described(population={"devices": 60}, selection=selection, device_wait_timeout=2000.0),
        workers=1,
    )
    assert trace.ended == "no device asked for 2000 s"
    assert trace.contributed == trace.outcomes["counted"] <= 60


class Failing:
    """A processor that fails as it is told."""

    def __init__(self, how: str) -> None:
        self._how = how

    def setup(self) -> None:
        return

    def shutdown(self) -> None:
        return

    def train(self, devices: Devices, model: Tensors, version: int) -> tuple[Tensors, npt.NDArray[np.float64]]:
        if self._how == "raise":
            raise ValueError("no data for these devices")
        if self._how == "end":
            raise SystemExit(3)
        stacked = {name: np.stack([model[name] * device for device in devices]) for name in model}
        return stacked, devices.astype(np.float64)


@pytest.mark.parametrize(("how", "why"), [("raise", "no data for these devices"), ("end", "has ended")])
def test_a_worker_that_fails_is_told_and_no_process_stays(how: str, why: str) -> None:
    model = {name: np.ones(spec.shape, np.float32) for name, spec in SCHEMA.items()}
    with TrainingPool(Failing(how), SCHEMA, 2) as pool, pytest.raises(ScriptFailed, match=why):
        list(pool.train(np.arange(200), model, 1))


def test_a_pool_trains_every_device_once_and_keeps_them_apart() -> None:
    model = {name: np.full(spec.shape, 2, np.float32) for name, spec in SCHEMA.items()}
    devices = np.arange(1000, 1300)
    with TrainingPool(Failing("not"), SCHEMA, 2) as pool:
        found = {at: (tensors, weight) for at, tensors, weight in pool.train(devices, model, 1)}
    assert sorted(found) == list(range(300))
    for at, (tensors, weight) in found.items():
        assert weight == devices[at]
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, model[name] * devices[at])


def test_a_devices_data_are_its_own_and_skewed_as_described() -> None:
    pool, _ = digits()
    skewed, even = (
        SoftmaxRegression(pool, Skew(samples=30, alpha=alpha), LocalTraining(), 1) for alpha in (0.05, 1000.0)
    )
    devices = np.arange(40)
    x, y = skewed.data_of(devices)
    again, _ = skewed.data_of(devices[::-1])
    np.testing.assert_array_equal(again[::-1], x)
    classes = [np.mean([len(set(row.tolist())) for row in each.data_of(devices)[1]]) for each in (skewed, even)]
    assert classes[0] < 4 < 8 < classes[1]
    assert x.shape == (40, 30, 64)
    assert y.shape == (40, 30)


def converged(models: Mapping[str, Any], selection: Mapping[str, Any], **more: Any) -> float:
    made = described(
        population={"devices": 100_000, "seed": 5},
        models={"global_lr": 1.0, "num_updates_for_model": 50, **models},
        selection=selection,
        training={"steps": 10},
        tree={"depth": 2, "width": 3, "moment_seconds": 20.0},
        evaluation={"frequency": 10},
        **more,
    )
    trace = simulate(made, workers=2)
    assert trace.ended == "the last version is made"
    found = last_accuracy(trace)
    assert found is not None
    return found


@pytest.mark.long
def test_asynchronous_training_is_within_a_hundredth_of_synchronous_averaging() -> None:
    synchronous = converged({"max_model_version": 61}, {"device_selection_size": 50, "min_hole_to_fill": 50})
    buffered = converged({"max_model_version": 91, "staleness_weight": True}, {"device_selection_size": 150})
    assert synchronous > 0.92
    assert buffered > synchronous - 0.01


def test_a_run_ends_early_where_it_is_asked_to() -> None:
    trace = simulate(
        described(
            models={"num_updates_for_model": 20, "global_lr": 1.0, "max_model_version": 1000},
            evaluation={"stop_at": 0.8},
        ),
        workers=2,
    )
    assert trace.ended == "the accuracy is reached"
    assert trace.versions[-1]["accuracy"] >= 0.8
    assert len(trace.versions) < 500
    assert simulate(described(most_seconds=40.0), workers=1).ended == "the virtual time is up"


def test_noise_is_in_the_model_of_a_private_run() -> None:
    private = {"clip_norm": 0.5, "noise_multiplier": 0.5}
    one, two = (
        simulate(described(privacy=private), workers=1, random=lambda size, byte=byte: bytes([byte]) * size)
        for byte in (1, 2)
    )
    assert [row["accuracy"] for row in one.versions] != [row["accuracy"] for row in two.versions]
    assert all(row["weight"] == row["updates"] for row in one.versions)


# --- descriptions and reports -----------------------------------------------------------------------------------------


def test_a_report_has_its_numbers_and_three_plots() -> None:
    made = described()
    trace = simulate(made, workers=1)
    report = json.loads(json.dumps(document(trace, made.model_dump(mode="json"))))
    assert report["devices"] == {"registered": 5000, "contributed": trace.contributed}
    assert len(report["versions"]) == 5
    text = page(report)
    assert text.count("<polyline") == 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    body = text[text.index("<svg") : text.rindex("</svg>") + 6]
    assert len(ET.fromstring(f"<p>{body}</p>").findall("svg")) == 3  # noqa: S314 - our own page
    nothing = document(type(trace)(), {"name": "<script>"})
    assert "<script>" not in page(nothing)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("population = 3", "Population"),
        ("[population]\ndevices = 0", "devices"),
        ("[population]\ndevices = 10\nweight = 1", "weight"),
        ("[population]\ndevices = 10\n[tree]\ndepth = 7", "depth"),
        ("[population]\ndevices = 10\n[models]\nglobal_lr = nan", "global_lr"),
        ("[population]\ndevices = 10\n[tree", "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_a_description_that_is_wrong_says_so(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "devices.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(Unusable) as raised:
        read_description(file)
    assert named in str(raised.value)
    with pytest.raises((Unusable, RecipeUnusable)):
        read_description(tmp_path / "absent.toml")


def test_a_description_reads_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text('name = "night"\n[population]\ndevices = 10\n[selection]\nmin_hole_to_fill = 7\n')
    made = read_description(file)
    assert made.name == "night"
    assert made.edge.devices == DeviceManagerConfig(min_hole_to_fill=7)
    assert made.edge.models == ModelManagerConfig()
