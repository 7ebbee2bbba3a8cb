"""The attested path over real TLS: a job from submission to a verified result, and everyone who may not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, make_job
from safetensors.numpy import load_file


@pytest.fixture
def world(tmp_path: Path) -> FederationWorld:
    return found_federation(tmp_path)


def test_a_job_runs_from_submission_to_a_verified_result(world: FederationWorld, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, num_rounds=3, initial_model={"w": np.zeros(3, dtype=np.float32)})
    world.approve(bundle)
    with (
        world.server() as address,
        world.site(address, SITES[0], number=1.0),
        world.site(address, SITES[1], number=3.0),
        world.client(address) as client,
        model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        events = list(client.watch(job, timeout=60))
        report = client.report(job)
        assert report.status.value == "finished", report
        folder = client.download(job, tmp_path / "result", ledger=None)
        assert [found.job for found in client.reports().jobs] == [job]
        assert client.reports().sites == SITES
    assert load_file(folder / "model.safetensors")["w"].tolist() == [6, 6, 6]
    record = json.loads((folder / "job.json").read_text())
    assert record["status"] == "finished"
    assert record["rounds"][2]["metrics"] == {"m": 2.0}
    assert [event.text for event in events if event.kind == "status"] == ["running", "finished"]
    assert sum(event.kind == "value" for event in events) == 6
    assert [kind for kind, _ in world.ledger].count("result") == 1
    assert [document.get("event") for kind, document in world.ledger if kind == "job"].count("taken") == 2
