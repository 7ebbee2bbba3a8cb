"""One small job for each recipe, with its plain reference: what the paper's lines give, written out in NumPy.

Site i has one number a_i; its loss is a_i / 2 (w - a_i)^2, so that sites differ in where they pull and how strongly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fl import CyclicRecipe, FedAvgLrRecipe, FedOptRecipe, FedProxRecipe, FedStatsRecipe, ScaffoldRecipe
from fl.local.statistics import with_floor
from fl.recipes.recipe import Recipe

NUMBERS = {"borealis-hospital": 1.0, "cygnus-bio": 3.0}
ROUNDS = 4
STEPS = 3
RATE = 0.1
MU = 0.7
START = np.array([0.5, -2.0, 4.0])

LOOP = """
import numpy as np
from fl import client as flare
from fl.local.fedprox import FedProxLoss

flare.init()
a = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    start = received.params["w"]
    proximal = FedProxLoss(received.meta.get("fedprox_mu", 0.0))
    w = start.copy()
    for _ in range(3):
        w -= 0.1 * (a * (w - a) + proximal.gradient(w, start))
    flare.send(flare.FLModel(params={"w": w}, meta={"NUM_STEPS_CURRENT_ROUND": a}, metrics={"a": a}))
"""
DIFFERENCES = LOOP.replace('{"w": w}', '{"w": w - start}, params_type="DIFF"')
SCAFFOLD = """
from fl import client as flare
from fl.local.scaffold import ControlVariates

flare.init()
a = float(flare.data_path("number.txt").read_text())
variates = ControlVariates()
while flare.is_running():
    variates.receive(flare.receive())
    w = variates.params["w"].copy()
    for _ in range(3):
        w -= 0.1 * (a * (w - a) + variates.correction("w"))
    flare.send(variates.answer({"w": w}, steps=3, lr=0.1, metrics={"a": a}))
"""
NEWTON = """
import numpy as np
from fl import client as flare
from fl.local.newton import newton_update

flare.init()
a = float(flare.data_path("number.txt").read_text())
random = np.random.default_rng(int(a))
features = random.normal(size=(40 * int(a), 3))
labels = features @ [1.0, -2.0, 0.5] + random.normal(size=len(features)) > 0.3
while flare.is_running():
    flare.send(newton_update(flare.receive(), features, labels))
"""

STATISTICS = """
import numpy as np
from fl import client as flare
from fl.local.statistics import statistics_update

flare.init()
a = float(flare.data_path("number.txt").read_text())
values = np.random.default_rng(int(a)).normal([1e6, 5.0], [a, 1.0], size=(100 * int(a), 2))
values[0, 1] = np.nan
while flare.is_running():
    flare.send(statistics_update(flare.receive(), values))
"""
FEATURES = {"weight": (1e6 - 20.0, 1e6 + 20.0), "age": (0.0, 10.0)}


def trained(w: Any, a: float, mu: float = 0.0, correction: Any = 0.0) -> Any:
    """A site's steps from w."""
    y = w.copy()
    for _ in range(STEPS):
        y = y - RATE * (a * (y - a) + mu * (y - w) + correction)
    return y


def mean_of(values: dict[float, Any]) -> Any:
    """The mean, weighted by the sites' numbers."""
    return sum(a * value for a, value in values.items()) / sum(values)


def fedprox() -> dict[str, Any]:
    w = START
    for _ in range(ROUNDS):
        w = mean_of({a: trained(w, a, MU) for a in NUMBERS.values()})
    return {"w": w}


def fedopt(optimizer: str, lr: float) -> dict[str, Any]:
    x, m, v = START, 0.0 * START, 0.0 * START + 0.01**2
    for _ in range(ROUNDS):
        delta = mean_of({a: trained(x, a) - x for a in NUMBERS.values()})
        if optimizer == "sgd":
            m = 0.5 * m + delta
            x = x + lr * m
            continue
        m = 0.8 * m + 0.2 * delta
        v = 0.9 * v + 0.1 * delta**2 if optimizer == "adam" else v - 0.1 * delta**2 * np.sign(v - delta**2)
        x = x + lr * m / (np.sqrt(v) + 0.01)
    return {"w": x}


def cyclic() -> dict[str, Any]:
    w = START
    for _ in range(ROUNDS):
        for a in NUMBERS.values():
            w = trained(w, a)
    return {"w": w}


def scaffold() -> dict[str, Any]:
    x, c = START, 0.0 * START
    own = dict.fromkeys(NUMBERS.values(), 0.0 * START)
    for _ in range(ROUNDS):
        changes = []
        for a in own:
            y = trained(x, a, correction=c - own[a])
            fresh = own[a] - c + (x - y) / (STEPS * RATE)
            changes.append((y - x, fresh - own[a]))
            own[a] = fresh
        x = x + 0.9 * np.mean([y for y, _ in changes], axis=0)
        c = c + np.sum([change for _, change in changes], axis=0) / len(own)
    return {"w": x}


def newton() -> dict[str, Any]:
    """The minimum itself, by plain gradient descent on the pooled records until nothing moves."""
    rows, targets = [], []
    for a in NUMBERS.values():
        random = np.random.default_rng(int(a))
        features = random.normal(size=(40 * int(a), 3))
        rows.append(features)
        targets.append(features @ [1.0, -2.0, 0.5] + random.normal(size=len(features)) > 0.3)
    design = np.column_stack([np.concatenate(rows), np.ones(sum(map(len, rows)))])
    labels = np.concatenate(targets)
    penalty = 0.02 * np.array([1.0, 1.0, 1.0, 0.0])
    w = np.zeros(4)
    for _ in range(6000):
        w = w + design.T @ (labels - 1 / (1 + np.exp(-design @ w))) / len(labels) - penalty * w
    return {"weights": w}


def statistics() -> dict[str, Any]:
    found: dict[str, Any] = {}
    tables = []
    for a in NUMBERS.values():
        table = np.random.default_rng(int(a)).normal([1e6, 5.0], [a, 1.0], size=(100 * int(a), 2))
        table[0, 1] = np.nan
        tables.append(table)
    for at, (name, bounds) in enumerate(FEATURES.items()):
        columns = [table[~np.isnan(table[:, at]), at] for table in tables]
        pooled = np.concatenate(columns)
        found[f"{name}/count"] = len(pooled)
        found[f"{name}/mean"] = pooled.mean()
        found[f"{name}/variance"] = pooled.var(ddof=1)
        found[f"{name}/edges"] = np.linspace(*bounds, 9)
        found[f"{name}/histogram"] = sum(
            with_floor(np.histogram(column, bins=8, range=bounds)[0], len(column), 5) for column in columns
        )
    return found


Job = tuple[type[Recipe], str, dict[str, Any], Callable[[], dict[str, Any]]]
ADAPTIVE = {"beta1": 0.8, "beta2": 0.9, "tau": 0.01}
JOBS: dict[str, Job] = {
    "fedprox": (FedProxRecipe, LOOP, {"mu": MU}, fedprox),
    "fedopt-sgd": (
        FedOptRecipe,
        DIFFERENCES,
        {"lr": 0.8, "momentum": 0.5, "params_type": "DIFF"},
        lambda: fedopt("sgd", 0.8),
    ),
    "fedopt-adam": (FedOptRecipe, LOOP, {"optimizer": "adam", "lr": 0.1, **ADAPTIVE}, lambda: fedopt("adam", 0.1)),
    "fedopt-yogi": (FedOptRecipe, LOOP, {"optimizer": "yogi", "lr": 0.1, **ADAPTIVE}, lambda: fedopt("yogi", 0.1)),
    "cyclic": (CyclicRecipe, LOOP, {}, cyclic),
    "scaffold": (ScaffoldRecipe, SCAFFOLD, {"lr": 0.9}, scaffold),
    "lr-newton": (FedAvgLrRecipe, NEWTON, {"num_features": 3, "l2": 0.02, "num_rounds": 6}, newton),
    "fedstats": (FedStatsRecipe, STATISTICS, {"features": FEATURES, "bins": 8, "min_count": 5}, statistics),
}


def recipe_of(name: str, folder: Path, **changes: Any) -> Recipe:
    """The recipe of JOBS, its script written into `folder`/code."""
    kind, script, arguments, _ = JOBS[name]
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(script)
    model = {} if kind in {FedAvgLrRecipe, FedStatsRecipe} else {"initial_model": {"w": START}}
    rounds = {} if kind is FedStatsRecipe else {"num_rounds": ROUNDS}
    shared = {"name": name, "min_clients": 2, **rounds, "train_script": str(code / "client.py")}
    return kind(**{**shared, "round_seconds": 30, **model, **arguments, **changes})
