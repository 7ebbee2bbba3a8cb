"""An MLflow run of a job, in a folder that `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows.

It is written where the result is opened, from the job's record: nothing of a job goes to a tracking server from where
the job runs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fl.errors import RecipeUnusable

BATCH: Final = 1000
"""Metrics that MLflow takes at once."""


def require_mlflow() -> None:
    """Raises RecipeUnusable if MLflow is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise RecipeUnusable("MLflow is not installed", where="tracking_type", do="pip install 'sealwright[mlflow]'")


def write_mlflow(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a finished job's `record` (job.json) as a run into the store in `folder`, which is made.

    Mean metrics are named `global/NAME`, each site's own and what its script logged `site/SITE/NAME`; the step is the
    round, from 0. Raises RecipeUnusable.
    """
    require_mlflow()
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    found = client.get_experiment_by_name(record["name"])
    experiment = (
        client.create_experiment(record["name"], artifact_location=(folder / "artifacts").resolve().as_uri())
        if found is None
        else found.experiment_id
    )
    run = client.create_run(experiment, run_name=str(record["job"])).info.run_id
    for name in ("recipe", "num_rounds", "min_clients", "model_sha256"):
        value = record.get(name)
        client.log_param(run, name, json.dumps(value) if isinstance(value, list | dict) else value)
    metrics = [Metric(name, value, 0, step) for name, value, step in _metrics(record)]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])
    client.set_terminated(run)


def _metrics(record: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    for row in record.get("rounds", []):
        for site, update in row["updates"].items():
            for name, value in update["metrics"].items():
                yield f"site/{site}/{name}", value, row["round"]
        for name, value in row["metrics"].items():
            yield f"global/{name}", value, row["round"]
    for logged in record.get("values", []):
        for name, value in logged.items():
            if name not in {"site", "step"}:
                yield f"site/{logged['site']}/{name}", value, logged["step"]
