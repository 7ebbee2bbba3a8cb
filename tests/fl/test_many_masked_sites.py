"""Secure aggregation of a hundred sites, of which ten are lost: with attested keys, and as a whole simulated job."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from federation_world import MEMBERS, found_federation, now
from safetensors.numpy import load_file

from attestation.canonical import b64, unb64
from fl import FedAvgRecipe, SimEnv
from fl.aggregation.fixed_point import FixedPoint, read_tail
from fl.aggregation.mask_talk import (
    MAX_PART,
    MaskingSite,
    Parts,
    bag,
    introduced,
    keys_in,
    named,
    parts,
    read_bag,
    read_revealed,
    round_of,
)
from fl.aggregation.masking import MaskedSum
from fl.aggregation.notary import AttestedNotary
from fl.jobs.settings import MASKED, MASKED_TAIL, JobSettings, SecureAggregation
from fl.party import Party
from fl.tensors import NUMPY_DTYPE, parse

pytestmark = pytest.mark.long
COUNT = 100


def received(body: str) -> str:
    """The message as it comes out of its frames."""
    joined = Parts()
    found = [joined.add(piece, more=more) for piece, more in parts(body)]
    assert found[-1] is not None
    return found[-1]


@pytest.mark.parametrize("unit", [None, 16.0])
def test_a_hundred_attested_sites_of_which_ten_are_lost(tmp_path: Path, unit: float | None) -> None:
    """Introductions of a hundred sites do not fit one frame; a round's sum is over the ninety that are left."""
    names = [f"site-{number:02}" for number in range(COUNT)]
    world = found_federation(tmp_path, dict(zip(names, cycle(MEMBERS), strict=False)))
    secure = SecureAggregation()
    settings = JobSettings.model_validate(
        {
            "name": "many", "recipe": "fedavg", "num_rounds": 2, "min_clients": 2, "train_script": "x.py",
            "framework": "numpy", "model": {"w": {"dtype": "F32", "shape": (50,)}},
            "outputs": {"metrics": (), "values": 0}, "secure_aggregation": secure.model_dump(),
        }
    )  # fmt: skip
    notaries = {}
    for name in names:
        identity = world.identity("site", name, seconds=600)
        party = Party(lambda identity=identity: identity, world.charter, now, world.record, lambda _: None)
        notaries[name] = AttestedNotary(party, names, "ab" * 32)
    sites = {name: MaskingSite(name, settings, secure, notary) for name, notary in notaries.items()}
    reader = notaries[names[0]]
    tokens = {name: site.hear(0, "keys", "") for name, site in sites.items()}
    message = introduced(tokens, unit)
    assert len(message) > MAX_PART
    round_ = round_of(reader, {name: keys_in(reader, name, tokens[name], 0) for name in names}, 0, secure, unit)
    kinds = settings.schema_of_masked(64 if unit is None else 32)
    total = MaskedSum(round_, [np.zeros(kind.elements, dtype=NUMPY_DTYPE[kind.dtype]) for kind in kinds.values()])
    dealt = {name: read_bag(site.hear(0, "shares", received(message))) for name, site in sites.items()}
    raw = {name: {other: unb64(text, where=name) for other, text in own.items()} for name, own in dealt.items()}
    for name, shares in total.shares_for(raw).items():
        sites[name].hear(0, "dealt", received(bag({other: b64(share) for other, share in shares.items()})))
    lost = set(names[::10])
    weights = {name: 1.0 + number for number, name in enumerate(names)}
    for number, name in enumerate(names):
        with sites[name].masked(0, [np.full(50, number / 100, dtype=np.float32)], {}, weights[name]) as memory:
            update = parse(memory.view, max_size=1 << 20)
            if name not in lost:
                total.fold(name, [update.array(one).copy() for one in (MASKED, MASKED_TAIL)])
            update.raw.release()
    survivors = total.survivors
    assert len(survivors) == 90
    confirmed = {name: sites[name].hear(0, "survivors", named(survivors)) for name in survivors}
    answers = {name: read_revealed(sites[name].hear(0, "unmask", received(bag(confirmed)))) for name in survivors}
    numbers, tail = total.unmask(
        {
            name: {other: unb64(text, where=name) for other, text in answer.texts.items()}
            for name, answer in answers.items()
        }
    )
    _, weight = read_tail(tail, COUNT)
    assert weight == sum(weights[name] for name in survivors)
    mean = sum(weights[name] * names.index(name) / 100 for name in survivors) / weight
    assert FixedPoint(secure.limit, COUNT, unit).read(numbers, weight) == pytest.approx(np.full(50, mean), abs=1e-5)


SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
number = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    received = flare.receive()
    if number % 10 == 0 and received.current_round == 1:
        raise SystemExit(3)
    moved = {"w": received.params["w"] + np.float32(number / 100)}
    flare.send(flare.FLModel(params=moved, meta={"NUM_STEPS_CURRENT_ROUND": number}))
"""


def test_a_job_of_a_hundred_clients_of_which_ten_drop_out(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="many",
        initial_model={"w": np.zeros(50, dtype=np.float32)},
        min_clients=80,
        num_rounds=3,
        train_script=str(tmp_path / "client.py"),
        secure_aggregation=True,
    )
    run = recipe.execute(SimEnv(num_clients=COUNT, workspace_root=tmp_path / "runs"))
    found = load_file(run.get_result() / "model.safetensors")["w"]
    everyone = np.arange(1, COUNT + 1)
    left = everyone[everyone % 10 != 0]
    means = [float((one * one / 100).sum() / one.sum()) for one in (everyone, left, left)]
    assert found == pytest.approx(np.full(50, sum(means)), abs=3e-5)
