"""FedBuff's root: the paper's step, synchronous rounds as an extreme, contributions once, losses told, permits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.edge.accounting import device_epsilon
from fl.edge.branch import TreeBranch
from fl.edge.contract import EdgeJob, ModelVersion, Update, contribution_id
from fl.edge.fedbuff import FedBuff
from fl.edge.partial_sum import PartialSum
from fl.edge.permits import Deal, Demand, Permits
from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EdgeSettings, EvaluatorConfig, ModelManagerConfig
from fl.errors import RecipeUnusable
from fl.tensors import TensorSpec, encode, parse
from fl.transport.memory import SealedMemory

SCHEMA = {"w": TensorSpec("F32", (3,)), "n": TensorSpec("I64", (1,))}
FIRST = np.array([1, 2, 3], np.float32)


def root(models: Mapping[str, Any] | None = None, devices: Mapping[str, Any] | None = None, **more: Any) -> FedBuff:
    chosen = EdgeSettings(
        models=ModelManagerConfig(**{"num_updates_for_model": 2, "global_lr": 1.0, **(models or {})}),
        devices=DeviceManagerConfig(**{"device_selection_size": 4, **(devices or {})}),
        privacy=more.get("privacy"),
    )
    model = encode({"w": (SCHEMA["w"], FIRST.tobytes()), "n": (SCHEMA["n"], b"\7" + bytes(7))})
    return FedBuff(SCHEMA, SealedMemory.of(model), chosen, np.random.default_rng(1), more.get("noise"))


def weights(buff: FedBuff, version: int | None = None) -> npt.NDArray[np.float32]:
    model = buff.models[version or buff.version]
    file = parse(model.view, max_size=model.size)
    assert bytes(file.bytes_of("n")) == b"\7" + bytes(7)  # what is no float stays as it is
    return file.array("w").copy()


class Gateway:
    """A gateway over the pure parts: what its shell does in one exchange, step by step."""

    def __init__(self, buff: FedBuff, number: int) -> None:
        self.buff = buff
        self.origin = f"{number:032x}"
        self.branch = TreeBranch(EdgeJob("job-1", "toy", "edge"), SCHEMA, self.origin, lambda: 0.0)
        self.advance()

    def advance(self) -> None:
        self.branch.advance([ModelVersion(v, "0" * 64, b"", "1" * 64) for v in self.buff.models])

    def report(self, device: int, version: int, value: float, weight: float = 1.0) -> str:
        delta = np.full(3, value, np.float32)
        return self.branch.add(Update(version, {"w": delta}, weight, contribution_id("job-1", version, str(device))))

    def settle(self) -> None:
        self.branch.settle(self.buff.contributions.claim(self.origin, self.branch.claims()))

    def push(self) -> PartialSum | None:
        self.settle()
        partial = self.branch.take()
        if partial is not None:
            self.buff.merge(PartialSum.decoded(partial.encoded(), self.branch.schema, where="test"))
        return partial


def test_a_step_is_the_papers() -> None:
    buff = root({"staleness_weight": True, "global_lr": 0.5})
    one = Gateway(buff, 1)
    one.report(1, 1, 3.0)
    one.report(2, 1, 5.0)
    one.push()
    step = buff.step()
    assert step is not None
    assert (step.version, step.updates, step.staleness) == (2, 2, {0: 2})
    np.testing.assert_allclose(weights(buff), FIRST + 0.5 * 4.0)
    np.testing.assert_array_equal(weights(buff, 1), FIRST)  # devices still train the version of before
    one.advance()
    one.report(3, 1, 8.0, weight=2.0)  # one version behind: 1/sqrt(2)
    one.report(4, 2, 6.0)
    one.push()
    before = weights(buff)
    step = buff.step()
    assert step is not None
    assert step.staleness == {1: 1, 0: 1}
    np.testing.assert_allclose(weights(buff), before + 0.5 * (8.0 * 2 / math.sqrt(2) + 6.0) / 3.0, rtol=1e-6)
    assert buff.step() is None
    buff.close()


@given(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.floats(0.1, 100)), min_size=2, max_size=12), st.integers(1, 4)
)
@settings(max_examples=40, deadline=None)
def test_with_all_devices_in_each_round_it_is_federated_averaging(said: list[tuple[float, float]], many: int) -> None:
    count = len(said)
    synchronous = {"device_selection_size": count, "min_hole_to_fill": count}
    buff = root({"num_updates_for_model": count}, synchronous)
    gateways = [Gateway(buff, number) for number in range(many)]
    for device, (value, weight) in enumerate(said):
        gateways[device % many].report(device, 1, value, weight)
    for one in gateways:
        one.push()
    assert buff.step() is not None
    mean = sum(float(np.float32(value)) * weight for value, weight in said) / sum(weight for _, weight in said)
    np.testing.assert_allclose(weights(buff), FIRST + mean, rtol=1e-5, atol=1e-5)
    buff.close()


def test_a_contribution_counts_once_whichever_gateways_it_reaches() -> None:
    buff = root({"num_updates_for_model": 3}, {"device_selection_size": 8})
    one, two = Gateway(buff, 1), Gateway(buff, 2)
    assert one.report(1, 1, 3.0) == two.report(1, 1, 3.0) == "counted"  # a device tries it: both gateways hold it
    one.settle()
    two.push()  # whoever claims first folds; the other drops it before it is in a sum
    one.push()
    assert buff.buffered == 1
    two.report(1, 1, 900.0)
    two.push()
    assert buff.buffered == 1
    assert not buff.refused
    buff.close()


def test_a_partial_sum_that_comes_again_counts_once_and_one_with_unclaimed_parts_not_at_all() -> None:
    buff = root()
    one = Gateway(buff, 1)
    one.report(1, 1, 3.0)
    partial = one.push()
    assert partial is not None
    assert not buff.merge(partial)
    forged = PartialSum("f" * 32, 0, partial.versions)  # the same contributions by another name
    assert not buff.merge(forged)
    assert "delivered before" in buff.refused.pop()
    other = Gateway(buff, 2)
    other.report(9, 1, 1.0)
    other.branch.claims()
    other.branch.settle(())  # without the root's word
    unclaimed = other.branch.take()
    assert unclaimed is not None
    assert not buff.merge(unclaimed)
    assert "not claimed" in buff.refused.pop()
    assert buff.buffered == 1
    buff.close()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.sampled_from("rspk")), max_size=60))
@settings(max_examples=80, deadline=None)
def test_killed_gateways_lose_their_unsent_sums_alone_and_every_loss_is_told(
    acts: list[tuple[int, int, str]],
) -> None:
    """Reports, claims, pushes and kills in any order: claimed = delivered + lost, and the lost are the killed's."""
    buff = root({"num_updates_for_model": 1000, "max_model_history": 1}, {"device_selection_size": 1000})
    gateways = {number: Gateway(buff, number) for number in range(3)}
    unsent: dict[str, int] = {}
    delivered: set[bytes] = set()
    starts = 3
    for number, device, act in acts:
        one = gateways[number]
        if act == "r":
            one.report(device, 1, 1.0)
        elif act == "s":
            one.settle()
        elif act == "p" and (partial := one.push()) is not None:
            assert not delivered & partial.versions[1].ids
            delivered |= partial.versions[1].ids
        elif act == "k":
            left = one.branch.take()
            if left is not None:
                unsent[one.origin] = left.count
            gateways[number] = Gateway(buff, starts)
            starts += 1
    for one in gateways.values():
        one.push()
    assert not buff.refused
    assert buff.contributions.missing() == unsent
    assert buff.contributions.end(1) == unsent
    buff.close()


def test_old_versions_end_and_what_comes_for_them_is_late() -> None:
    buff = root({"max_num_active_model_versions": 2, "max_model_history": 5, "num_updates_for_model": 1})
    one, slow = Gateway(buff, 1), Gateway(buff, 2)
    slow.report(8, 1, 1.0)
    slow.settle()  # claimed, folded, not sent
    for version in (1, 2):
        one.report(1, version, 1.0)
        one.push()
        step = buff.step()
        one.advance()
    assert sorted(buff.models) == [2, 3]
    assert step is not None
    assert step.lost == {slow.origin: 1}
    slow.push()
    assert buff.late == 1
    assert buff.buffered == 0
    buff.close()


def test_devices_count_once_in_a_job_that_does_not_use_them_again() -> None:
    buff = root({"num_updates_for_model": 1}, {"device_reuse": False})
    claim = bytes(32)
    assert buff.contributions.claim("a", {1: [claim]}) == []
    buff.contributions.begin(2)
    assert buff.contributions.claim("a", {2: [claim]}) == [claim]
    buff.close()


def test_noise_is_scaled_to_what_one_device_may_change() -> None:
    drawn: list[int] = []

    def noise(count: int) -> npt.NDArray[np.float64]:
        drawn.append(count)
        return np.ones(count)

    private = DevicePrivacy(clip_norm=3.0, noise_multiplier=2.0)
    buff = root(privacy=private, noise=noise)
    one = Gateway(buff, 1)
    for device in (1, 2):
        one.report(device, 1, 0.0)
    one.push()
    assert buff.step() is not None
    assert drawn == [3]
    np.testing.assert_allclose(weights(buff), FIRST + 2.0 * 3.0 / 2)
    with pytest.raises(ValueError, match="noise"):
        root(privacy=private)
    buff.close()


# --- permits ----------------------------------------------------------------------------------------------------------


def test_so_many_devices_have_a_task_and_no_more() -> None:
    buff = root({"num_updates_for_model": 1}, {"device_selection_size": 3, "min_hole_to_fill": 2})
    assert buff.demand("a", Demand(waiting=2)) == 2
    assert buff.demand("b", Demand(waiting=9)) == 0  # one hole: two are waited for
    assert buff.demand("a", Demand(returned=1)) == 2
    assert buff.demand("b", Demand(waiting=9)) == 2
    assert buff.under_way == 3
    buff.drop("b")  # a gateway dies: its devices' places go to others
    assert buff.demand("a", Demand(returned=1, waiting=5)) == 4
    buff.close()


def test_no_task_before_enough_nodes_are_there() -> None:
    buff = root(devices={"initial_min_client_num": 2})
    assert buff.demand("a", Demand(waiting=1)) == 0
    assert buff.demand("b", Demand(waiting=1)) == 1
    assert buff.demand("a", Demand()) == 1
    buff.close()


@given(
    st.sampled_from(["balanced", "random"]),
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(0, 200),
)
def test_permits_are_dealt_all_to_those_that_wait(strategy: str, waiting: list[int], permits: int) -> None:
    deal = Deal(strategy, np.random.default_rng(3))
    for number, count in enumerate(waiting):
        deal.report(str(number), Demand(waiting=count))
    deal.give(permits)
    dealt = [deal.granted_to(str(number)) for number in range(len(waiting))]
    assert sum(dealt) == deal.under_way == min(permits, sum(waiting))
    assert all(got <= wanted for got, wanted in zip(dealt, waiting, strict=True))
    if strategy == "balanced":  # nobody who could take more has less than another has, but for a remainder
        short = [got for got, wanted in zip(dealt, waiting, strict=True) if got < wanted]
        assert not short or max(dealt) - min(short) <= 1


def test_a_device_that_vanishes_costs_nothing() -> None:
    permits = Permits(10.0)
    permits.grant(3, 0.0)
    assert permits.take(0.0)
    assert permits.take(1.0)
    permits.give_back()
    assert (permits.returned, permits.under_way, permits.left) == (1, 1, 1)
    permits.expire(11.0)  # the other never came back, and nobody wanted the third
    assert (permits.returned, permits.given_up, permits.under_way, permits.left) == (3, 1, 0, 0)
    assert not permits.take(11.0)
    permits.give_back()  # it comes back too late: its place is another's already
    assert permits.returned == 3


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_have_flares_names_and_defaults() -> None:
    models, devices = ModelManagerConfig(), DeviceManagerConfig()
    assert models.model_dump() == {
        "max_num_active_model_versions": 3,
        "max_model_version": 20,
        "update_timeout": 5,
        "num_updates_for_model": 100,
        "max_model_history": 10,
        "staleness_weight": False,
        "global_lr": 0.01,
    }
    assert devices.model_dump() == {
        "device_selection_size": 100,
        "initial_min_client_num": 1,
        "min_hole_to_fill": 1,
        "device_reuse": True,
        "device_sampling_strategy": "balanced",
    }
    assert [ModelManagerConfig(staleness_weight=True).weight_of(tau) for tau in (0, 3)] == [1, 0.5]
    assert [ModelManagerConfig(staleness_weight="hinge").weight_of(tau) for tau in (4, 5)] == [1, 1 / 11]
    assert ModelManagerConfig().weight_of(9) == 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ModelManagerConfig(max_model_version=1), "max_model_version"),
        (lambda: ModelManagerConfig(staleness_weight="slowly"), "staleness_weight"),  # type: ignore[arg-type]
        (lambda: ModelManagerConfig(global_lr=float("nan")), "global_lr"),
        (lambda: ModelManagerConfig(learning_rate=1.0), "learning_rate"),  # type: ignore[call-arg]
        (lambda: DeviceManagerConfig(device_selection_size=2, min_hole_to_fill=3), "min_hole_to_fill"),
        (lambda: DeviceManagerConfig(device_sampling_strategy="best"), "device_sampling_strategy"),  # type: ignore[arg-type]
        (lambda: EvaluatorConfig(), "custom_dataset"),
        (lambda: EdgeSettings(models=ModelManagerConfig(num_updates_for_model=101)), "device_selection_size"),
    ],
)
def test_settings_that_are_wrong_say_so(make: Any, named: str) -> None:
    with pytest.raises(RecipeUnusable) as raised:
        make()
    assert named in str(raised.value)


def test_what_privacy_costs_a_device() -> None:
    """Against the closed form of one Gaussian mechanism (Balle and Wang 2018): Renyi's bound is above it, not far."""
    once = EdgeSettings(
        devices=DeviceManagerConfig(device_reuse=False),
        privacy=DevicePrivacy(clip_norm=1.0, noise_multiplier=1.0, delta=1e-5),
    )
    single = device_epsilon(once)
    assert 4.377 < single < 5.1
    often = EdgeSettings(models=ModelManagerConfig(max_model_version=10), privacy=once.privacy)
    assert device_epsilon(often) > 3 * single
    one_alive = EdgeSettings(
        models=ModelManagerConfig(max_model_version=10, max_num_active_model_versions=1), privacy=once.privacy
    )
    assert single < device_epsilon(one_alive) < device_epsilon(often)
    with pytest.raises(RecipeUnusable, match="no privacy"):
        device_epsilon(EdgeSettings())
