"""Secure aggregation: the sum is right whoever drops out, the server learns nothing else, and its lies are refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from federation_world import SITES, FederationWorld, found_federation, make_job, now
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv, declare_outputs
from fl.aggregation.fixed_point import FixedPoint, check_unit, next_unit, read_tail, tail_of
from fl.aggregation.mask_talk import MaskingSite, Parts, bag, introduced, keys_in, named, parts, read_bag
from fl.aggregation.masking import MaskedSum, Masks, Participant, Round, majority, neighbours, spread
from fl.aggregation.notary import AttestedNotary, SimulatedNotary
from fl.errors import JobFailed, MaskingRefused, RecipeUnusable
from fl.guard.keystream import STRETCH, Keystream
from fl.jobs.settings import MASKED, SecureAggregation
from fl.party import Party
from fl.server.federation import Federation
from fl.tensors import parse
from policies.errors import Refused

Members = Callable[[str], str]


def seeded(seed: int) -> Callable[[int], bytes]:
    stream = Keystream(hashlib.sha256(seed.to_bytes(8, "big")).digest())
    return lambda size: stream.words(size, np.uint8).tobytes()


def zeros(size: int) -> list[Any]:
    return [np.zeros(size, dtype=kind) for kind in (np.uint32, np.uint64)]


def masked(site: Participant, vector: list[Any]) -> list[Any]:
    """A copy of the vector under the site's masks."""
    masks = site.masks()
    copies = [array.copy() for array in vector]
    for array in copies:
        masks.add_to(array)
    return copies


def alike(one: Any, other: Any) -> bool:
    return all(np.array_equal(*arrays) for arrays in zip(one, other, strict=True))


class Play:
    """A round among honest participants, up to where a test takes over."""

    def __init__(self, count: int, member: Members = str, threshold: int | None = None, size: int = 50) -> None:
        self.names = [f"s{number:02}" for number in range(count)]
        members = {name: member(name) for name in self.names}
        self.sites = {name: Participant(name, seeded(number)) for number, name in enumerate(self.names)}
        keys = {name: site.public_keys for name, site in self.sites.items()}
        needed = threshold or majority(len(set(members.values())))
        self.round = Round(b"job", keys, members, needed)
        self.vectors = {
            name: [Keystream(bytes(31) + bytes([number])).words(size, kind) for kind in (np.uint32, np.uint64)]
            for number, name in enumerate(self.names)
        }
        self.total = MaskedSum(self.round, zeros(size))

    def deal(self, silent: tuple[str, ...] = ()) -> None:
        dealt = {name: site.share(self.round) for name, site in self.sites.items() if name not in silent}
        for name, shares in self.total.shares_for(dealt).items():
            self.sites[name].receive(shares)

    def send(self, *lost: str) -> tuple[str, ...]:
        for name in self.names:
            if name not in lost:
                self.total.fold(name, masked(self.sites[name], self.vectors[name]))
        return self.total.survivors

    def sum_of(self, names: tuple[str, ...]) -> Any:
        total = zeros(len(self.vectors["s00"][0]))
        for name in names:
            for array, one in zip(total, self.vectors[name], strict=True):
                array += one
        return total

    def unmask(self, survivors: tuple[str, ...], *gone: str) -> Any:
        present = [name for name in survivors if name not in gone]
        for name in present:
            self.sites[name].confirm(survivors)
        return self.total.unmask({name: self.sites[name].reveal(present) for name in present})


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.data())
def test_the_sum_is_right_whoever_drops_out(count: int, data: st.DataObject) -> None:
    """At each stage: before shares, before the vector, before unmasking; as long as enough members are left."""
    play = Play(count)
    order = data.draw(st.permutations(play.names))
    most = count - majority(count)
    silent = tuple(order[: data.draw(st.integers(0, most))])
    lost = tuple(order[: data.draw(st.integers(len(silent), most))])
    gone = tuple(order[: data.draw(st.integers(len(lost), most))])
    play.deal(silent)
    survivors = play.send(*lost)
    assert set(survivors) == set(play.names) - set(lost)
    assert alike(play.unmask(survivors, *gone), play.sum_of(survivors))


def test_forty_sites_on_a_sparse_graph_with_some_lost() -> None:
    play = Play(40, size=1000)
    degrees = {len(around) for around in play.round.graph.values()}
    assert degrees == {16}
    play.deal(("s03",))
    survivors = play.send("s03", "s07", "s11", "s30")
    assert alike(play.unmask(survivors), play.sum_of(survivors))


@settings(max_examples=50, deadline=None)
@given(st.integers(17, 200), st.binary(min_size=1, max_size=8))
def test_the_graph_is_regular_mutual_and_its_seed_s_own(count: int, seed: bytes) -> None:
    names = [f"s{number}" for number in range(count)]
    graph = neighbours(names, seed)
    assert len({len(around) for around in graph.values()}) == 1
    assert all(name in graph[other] and other != name for name in names for other in graph[name])
    assert graph == neighbours(reversed(names), seed)


def test_one_masked_vector_tells_nothing() -> None:
    """All its bytes look drawn at random: of 400,000 bits of zeros half are set, and another round's are others."""
    plays = [Play(3, size=6250), Play(3, size=6250)]
    plays[1].round = Round(b"another", plays[1].round.keys, plays[1].round.members, plays[1].round.threshold)
    found = []
    for play in plays:
        play.total = MaskedSum(play.round, zeros(6250))
        play.deal()
        found.append(masked(play.sites["s00"], zeros(6250)))
    for vector in (array for arrays in found for array in arrays):
        assert abs(np.unpackbits(vector.view(np.uint8)).mean() - 0.5) < 0.005
    assert not alike(*found)
    first = np.concatenate([array.view(np.uint8) for array in found[0]])[: 75_000 // 16 * 16]
    assert len(np.unique(first.reshape(-1, 16), axis=0)) == len(first) // 16, "no block of the keystream comes twice"


def test_members_count_not_machines() -> None:
    """Nine machines of one member and one of another are two members: three are asked for, and there is no sum."""
    with pytest.raises(MaskingRefused, match="2 members take part"):
        Play(10, lambda name: "one" if name != "s09" else "two", threshold=3)


def test_a_sum_over_one_member_s_many_machines_and_one_victim_is_not_signed() -> None:
    play = Play(6, lambda name: {"s04": "victim", "s05": "third"}.get(name, "liar"), threshold=3)
    play.deal()
    play.send("s05")
    with pytest.raises(MaskingRefused, match="the sum would be over 2 members, and is over at least 3"):
        play.sites["s04"].confirm(play.total.survivors)


def test_sites_of_one_member_hold_one_share() -> None:
    play = Play(4, lambda name: "one" if name in ("s00", "s01") else name)
    dealt = {name: site.share(play.round) for name, site in play.sites.items()}
    for name, shares in play.total.shares_for(dealt).items():
        play.sites[name].receive(shares)
    assert play.sites["s00"]._shares["s03"] == play.sites["s01"]._shares["s03"]
    assert play.sites["s00"]._shares["s03"] != play.sites["s02"]._shares["s03"]


def test_no_site_says_both_secrets_of_another() -> None:
    """A lying server names other survivors to get the other half of a secret: each site signs and reveals once."""
    play = Play(5)
    play.deal()
    survivors = play.send()
    victim, site = play.names[0], play.sites["s01"]
    site.confirm(survivors)
    with pytest.raises(MaskingRefused, match="second time"):
        site.confirm(tuple(name for name in survivors if name != victim))
    revealed = site.reveal(survivors)
    with pytest.raises(MaskingRefused, match="revealed before"):
        site.reveal(survivors)
    assert all(len(share) == 32 for share in revealed.values())


def test_without_enough_signatures_nothing_is_revealed() -> None:
    play = Play(5)
    play.deal()
    survivors = play.send()
    play.sites["s00"].confirm(survivors)
    with pytest.raises(MaskingRefused, match="2 members have signed"):
        play.sites["s00"].reveal(["s00", "s01"])


@pytest.mark.parametrize("play_it", ["early", "twice", "foreign", "without", "unasked"])
def test_steps_out_of_turn_are_refused(play_it: str) -> None:
    play = Play(3)
    site = play.sites["s00"]
    if play_it == "early":
        with pytest.raises(MaskingRefused, match="no keys yet"):
            site.masks()
        return
    if play_it == "foreign":
        keys = {**play.round.keys, "s00": play.round.keys["s01"]}
        with pytest.raises(MaskingRefused, match="this site's own"):
            site.share(Round(b"job", keys, play.round.members, 2))
        keys = {**play.round.keys, "s02": play.round.keys["s01"]}
        with pytest.raises(MaskingRefused, match="two sites have one key"):
            site.share(Round(b"job", keys, play.round.members, 2))
        return
    play.deal()
    if play_it == "unasked":
        with pytest.raises(MaskingRefused, match="before there is anything to unmask"):
            site.confirm(play.names)
        return
    site.masks()
    if play_it == "twice":
        with pytest.raises(MaskingRefused, match="masked before"):
            site.masks()
    else:
        with pytest.raises(MaskingRefused, match="do not have this one"):
            site.confirm(["s01", "s02"])


def test_changed_and_moved_shares_are_refused() -> None:
    play = Play(3)
    dealt = {name: play.sites[name].share(play.round) for name in play.names}
    good = play.total.shares_for(dealt)
    changed = bytearray(good["s00"]["s01"])
    changed[5] ^= 1
    for shares in ({"s01": bytes(changed)}, {"s01": good["s00"]["s02"]}, {"s01": good["s02"]["s01"]}, {"s09": b"x"}):
        with pytest.raises(MaskingRefused):
            play.sites["s00"].receive(shares)


def test_a_false_share_is_noticed() -> None:
    play = Play(4)
    play.deal()
    survivors = play.send("s03")
    for name in survivors:
        play.sites[name].confirm(survivors)
    revealed = {name: dict(play.sites[name].reveal(survivors)) for name in survivors}
    revealed["s00"]["s03"] = bytes(32)
    with pytest.raises(MaskingRefused, match="do not join to it: a site has lied"):
        play.total.unmask(revealed)


units = st.one_of(st.none(), st.integers(-10, 20).map(lambda power: 2.0**power))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 100), units, st.sampled_from([np.float32, np.float64]))
def test_a_mean_comes_back_within_its_precision(data: st.DataObject, count: int, unit: float | None, kind: Any) -> None:
    """Of sites at the limit, too: nothing wraps around. The bound is that of the module's first lines."""
    fixed = FixedPoint(16.0, count, unit)
    reach = 65536.0 if unit is None else unit
    total, sum_of_weights, wanted = np.zeros(3, dtype=fixed.dtype), 0.0, np.zeros(3)
    for _ in range(data.draw(st.integers(2, count))):
        weight = data.draw(st.floats(max(2**-20, reach / 64), min(65536, 4 * reach)))
        most = 16.0 * min(1.0, reach / weight) * (1 - 2**-20)
        parts_of = data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
        values = np.array([part * most for part in parts_of], dtype=kind)
        wanted += values.astype(np.float64) * weight
        sum_of_weights += weight
        total += fixed.steps_of(values, weight)
    exact = wanted / sum_of_weights
    bound = count * count * 16 * reach / (2**32 if unit is not None else 2**54) / sum_of_weights
    rounding = (2**-22 if kind is np.float32 else 2**-50) * 16
    assert np.abs(fixed.read(total, sum_of_weights) - exact).max() <= bound * 1.001 + rounding


@pytest.mark.parametrize("unit", [None, 1.0])
def test_numbers_beyond_the_limit_are_refused(unit: float | None) -> None:
    fixed = FixedPoint(16.0, 5, unit)
    for beyond in (16.1, -1e30, np.inf):
        with pytest.raises(MaskingRefused, match="a number is beyond 16"):
            fixed.steps_of(np.array([beyond]), 1.0)
    if unit is not None:
        with pytest.raises(
            MaskingRefused, match=r"a number is beyond 0\.16, which is what one may be at a weight of 100"
        ):
            fixed.steps_of(np.array([0.2]), 100.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(2**-20, 65536 * 1000), st.integers(1, 1000))
def test_a_unit_is_within_a_factor_of_two_of_what_is_wanted(weights: float, sites: int) -> None:
    unit = next_unit(max(weights, sites * 2**-20), sites)
    assert 1 <= unit / (16 * max(weights, sites * 2**-20) / sites) < 2
    for none in (0.0, -1.0, 3.0, np.nan, np.inf, 2.0**60, 2.0**-60):
        with pytest.raises(MaskingRefused, match="no unit"):
            check_unit(none)


def test_metrics_and_weights_come_back_and_have_bounds() -> None:
    tails = [tail_of([0.5, -3.0], 10.0), tail_of([1.5, 1.0], 30.0)]
    assert [weight for _, weight in tails] == [10.0, 30.0]
    metrics, weights = read_tail(tails[0][0] + tails[1][0], 2)
    assert metrics == pytest.approx([1.25, 0.0])
    assert weights == 40.0
    for bad, weight in (([0.0, 1e9], 1.0), ([0.0, np.nan], 1.0), ([0.0, 0.0], 0.0), ([0.0, 0.0], 1e6)):
        with pytest.raises(MaskingRefused):
            tail_of(bad, weight)
    with pytest.raises(MaskingRefused, match="the sum of weights is none"):
        read_tail(np.zeros(3, dtype=np.uint64), 2)


def test_streams_cancel() -> None:
    vector = np.arange(200_000, dtype=np.uint32)
    key = os.urandom(32)
    Masks([(key, True)]).add_to(vector)
    assert not np.array_equal(vector, np.arange(200_000, dtype=np.uint32))
    Masks([(key, False)]).add_to(vector)
    assert np.array_equal(vector, np.arange(200_000, dtype=np.uint32))


@given(
    st.lists(st.tuples(st.integers(1, 700_000), st.sampled_from([np.uint32, np.uint64])), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_masks_are_the_same_in_one_hand_and_in_many(shapes: list[tuple[int, Any]], fresh: bool) -> None:
    """Also where a number reaches from one stretch of the stream into the next."""
    seeds = [(bytes([number]) * 32, number % 2 == 0) for number in range(5)]
    one, many = ([np.arange(size, dtype=kind) for size, kind in shapes] for _ in range(2))
    masks = Masks(seeds)
    for array in one:
        if fresh:
            array.fill(0)
        for start in range(0, array.size, 65_536):
            masks.add_to(array[start : start + 65_536])
    spread(seeds, many, hands=3, fresh=fresh)
    assert alike(one, many)


def test_a_keystream_may_be_taken_up_at_each_stretch_and_has_no_block_twice() -> None:
    whole = Keystream(bytes(32)).words(3 * STRETCH // 8)
    for number in range(3):
        here = slice(number * STRETCH // 8, (number + 1) * STRETCH // 8)
        assert np.array_equal(Keystream(bytes(32), number).words(STRETCH // 8), whole[here])
    assert len(np.unique(whole)) == len(whole)
    plain = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(15) + b"\2")).encryptor()
    assert plain.update(bytes(STRETCH)) == whole[: STRETCH // 8].tobytes(), "SP 800-38D, 6.5: counters from 2 on"


def test_masks_that_were_made_ahead_are_the_same_and_are_given_once() -> None:
    seeds = [(os.urandom(32), True), (os.urandom(32), False)]
    sizes = ((150_001, np.uint32), (3, np.uint64))
    vectors, others = ([np.arange(size, dtype=kind) for size, kind in sizes] for _ in range(2))
    early, late = Masks(seeds), Masks(seeds)
    early.make([np.zeros(size, dtype=kind) for size, kind in sizes])
    for part in (vectors[0][:65536], vectors[0][65536:], vectors[1]):
        early.add_to(part)
    for array in others:
        late.add_to(array)
    assert alike(vectors, others)
    early.make([np.zeros(4, dtype=np.uint32)])
    with pytest.raises(MaskingRefused, match="made for other numbers"):
        early.add_to(np.zeros(5, dtype=np.uint32))
    play = Play(3)
    play.deal()
    site = play.sites["s00"]
    ahead = site.ahead()
    assert site.ahead() is None
    with pytest.raises(MaskingRefused, match="before there is anything to unmask"):
        site.confirm(play.names)  # nothing has left yet, whatever was made
    assert site.masks() is ahead
    with pytest.raises(MaskingRefused, match="masked before"):
        site.masks()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 350_000))
def test_a_long_message_comes_in_pieces(size: int) -> None:
    body = "x" * size
    joined = Parts()
    found = [joined.add(piece, more=more) for piece, more in parts(body)]
    assert found[-1] == body
    assert found[:-1] == [None] * (len(found) - 1)


def test_a_message_without_end_is_refused() -> None:
    joined = Parts()
    for _ in range(83):
        assert joined.add("x" * 100_000, more=True) is None
    with pytest.raises(MaskingRefused, match="more than"):
        joined.add("x" * 100_000, more=True)


# --- jobs -------------------------------------------------------------------------------------------------------------

SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
number = int(flare.get_site_name()[-1])
while flare.is_running():
    received = flare.receive()
    if number == LOST and received.current_round == 1:
        raise SystemExit(3)
    moved = {name: value + np.float32(number / 3) for name, value in received.params.items()}
    flare.send(flare.FLModel(params=moved, metrics={"loss": number / 7}, meta={"NUM_STEPS_CURRENT_ROUND": 10 * number}))
"""


def simulate(folder: Path, *, secure: Any, lost: int = 0, clients: int = 5, rounds: int = 3) -> dict[str, Any]:
    folder.mkdir()
    (folder / "client.py").write_text(SCRIPT.replace("LOST", str(lost)))
    recipe = FedAvgRecipe(
        name="sums",
        initial_model={"a": np.ones((3, 4), dtype=np.float32), "b": np.zeros(5, dtype=np.float64)},
        min_clients=3,
        num_rounds=rounds,
        train_script=str(folder / "client.py"),
        secure_aggregation=secure,
    )
    declare_outputs(recipe, metrics=["loss"], values=0)
    run = recipe.execute(SimEnv(num_clients=clients, workspace_root=folder / "runs"))
    return dict(load_file(run.get_result() / "model.safetensors"))


@pytest.mark.parametrize("lost", [0, 2])
def test_it_gives_what_plain_averaging_gives(tmp_path: Path, lost: int) -> None:
    """Weighted, over three rounds, with a client that dies in the middle of the second."""
    plain = simulate(tmp_path / "plain", secure=False, lost=lost)
    masked = simulate(tmp_path / "masked", secure=True, lost=lost)
    for name, value in plain.items():
        assert np.abs(masked[name] - value).max() < 1e-6


def test_too_few_members_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as failure:
        simulate(tmp_path / "few", secure={"min_members": 5}, lost=2)
    assert any("the sum would be over 4 members, and is over at least 5" in one for one in failure.value.reasons)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secure_aggregation": {"bits": 99}}, "bits"),
        ({"secure_aggregation": True, "aggregator": "client.py"}, "excludes it"),
        ({"secure_aggregation": True, "initial_model": {"n": np.zeros(2, dtype=np.int64)}}, "model of floats"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, change: Mapping[str, Any], words: str) -> None:
    (tmp_path / "client.py").write_text("pass")
    arguments = {
        "initial_model": {"w": np.zeros(2, dtype=np.float32)},
        "min_clients": 2,
        "train_script": str(tmp_path / "client.py"),
        **change,
    }
    with pytest.raises(RecipeUnusable, match=words):
        FedAvgRecipe(**arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


TRAIN = """
import numpy as np
from fl import client as flare

flare.init()
add = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    steps = {"NUM_STEPS_CURRENT_ROUND": 3 if add == 1 else 1}
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(add)}, meta=steps))
"""


def test_attested_sites_give_a_server_sums_alone(
    world: FederationWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server folds is masked: none of its numbers is a site's; the result is the weighted mean."""
    seen: list[Any] = []
    fold = MaskedSum.fold

    def watched(self: MaskedSum, site: str, vector: Any) -> None:
        seen.append(vector[0].copy())
        fold(self, site, vector)

    monkeypatch.setattr(MaskedSum, "fold", watched)
    bundle, model = make_job(tmp_path, TRAIN, name="sums", secure_aggregation=True)
    world.approve(bundle)
    with (
        world.server() as server,
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=5.0),
        world.client(server) as client,
        model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        last = [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]
        assert last == "finished", client.report(job).reasons
        folder = client.download(job, tmp_path / "result", ledgers=None)
    assert load_file(folder / "model.safetensors")["w"] == pytest.approx(np.full(3, 2 * (3 * 1 + 1 * 5) / 4), abs=1e-5)
    assert len(seen) == 4
    assert [vector.dtype for vector in seen] == [np.uint64] * 2 + [np.uint32] * 2
    assert all(vector.max() > np.iinfo(vector.dtype).max >> 6 for vector in seen)


def party(world: FederationWorld, site: str) -> Party:
    identity = world.identity("site", site, seconds=600)
    return Party(lambda: identity, world.charter, now, world.record, lambda _: None)


def test_only_attested_keys_of_the_roster_are_taken(world: FederationWorld) -> None:
    """The server, or a member, puts keys of its own into the list: each site finds out by itself."""
    parties = {site: party(world, site) for site in SITES}
    record = "ab" * 32
    notaries = {site: AttestedNotary(one, SITES, record) for site, one in parties.items()}
    secure = SecureAggregation()
    settings_ = make_settings(secure)
    sites = {site: MaskingSite(site, settings_, secure, notaries[site]) for site in SITES}
    tokens = {site: one.hear(0, "keys", "") for site, one in sites.items()}
    reader = AttestedNotary(parties[SITES[0]], SITES, record)
    assert all(len(key) == 32 for site in SITES for key in keys_in(reader, site, tokens[site], 0))
    false = MaskingSite("x", settings_, secure, SimulatedNotary("x", SITES)).hear(0, "keys", "")
    stranger = AttestedNotary(party(world, SITES[1]), SITES, "cd" * 32)
    other_job = MaskingSite(SITES[1], settings_, secure, stranger).hear(0, "keys", "")
    expired = world.identity("site", SITES[1], seconds=1, age=3600)
    stale = AttestedNotary(Party(lambda: expired, world.charter, now, world.record, lambda _: None), SITES, record)
    old = MaskingSite(SITES[1], settings_, secure, stale).hear(0, "keys", "")
    for token, words in (
        (false, "malformed"),
        (tokens[SITES[0]], "not who it says"),
        (other_job, "not for this round"),
        (old, "EAR|expired|lease"),
    ):
        with pytest.raises(Refused, match=words):
            keys_in(reader, SITES[1], token, 0)
    with pytest.raises(Refused, match="not on the job's roster"):
        keys_in(reader, "stranger", tokens[SITES[0]], 0)
    with pytest.raises(Refused, match="not for this round"):
        keys_in(reader, SITES[0], tokens[SITES[0]], 1)
    with pytest.raises(MaskingRefused, match="a sum is over at least 2"):
        sites[SITES[0]].hear(0, "shares", introduced({SITES[0]: tokens[SITES[0]]}, None))


def make_settings(secure: SecureAggregation) -> Any:
    from fl.jobs.settings import JobSettings

    return JobSettings.model_validate(
        {
            "name": "x", "recipe": "fedavg", "num_rounds": 2, "min_clients": 2, "train_script": "x.py",
            "framework": "numpy", "model": {"w": {"dtype": "F32", "shape": (2,)}},
            "outputs": {"metrics": (), "values": 0}, "secure_aggregation": secure.model_dump(),
        }
    )  # fmt: skip


def test_a_false_signature_counts_for_nothing(world: FederationWorld) -> None:
    """The server signs survivors itself, in a member's name: the site reveals nothing."""
    record, secure = "ab" * 32, SecureAggregation()
    settings_ = make_settings(secure)
    parties = {site: party(world, site) for site in SITES}
    sites = {
        site: MaskingSite(site, settings_, secure, AttestedNotary(one, SITES, record)) for site, one in parties.items()
    }
    tokens = {site: one.hear(0, "keys", "") for site, one in sites.items()}
    dealt = {site: read_bag(one.hear(0, "shares", introduced(tokens, None))) for site, one in sites.items()}
    first, second = SITES
    sites[first].hear(0, "dealt", bag({second: dealt[second][first]}))
    with sites[first].masked(0, [np.ones(2, dtype=np.float32)], {}, 1.0) as memory:
        assert parse(memory.view, max_size=1 << 16).array(MASKED).shape == (2,)
    mine = sites[first].hear(0, "survivors", named(SITES))
    forged = AttestedNotary(party(world, second), SITES, record).sign({"round": "x", "survivors": list(SITES)})
    with pytest.raises(Refused):
        sites[first].hear(0, "unmask", bag({first: mine, second: forged}))
    with pytest.raises(MaskingRefused, match="1 members have signed"):
        sites[first].hear(0, "unmask", bag({first: mine}))


def test_a_unit_of_one_site_s_own_is_noticed() -> None:
    """A server that has the others' numbers rounded to nothing would see one alone: the digest has the unit."""
    names, secure = ["a", "b", "c"], SecureAggregation()
    sites = {name: MaskingSite(name, make_settings(secure), secure, SimulatedNotary("job", names)) for name in names}
    tokens = {name: site.hear(0, "keys", "") for name, site in sites.items()}
    units = {"a": 1.0, "b": 2.0**16, "c": 2.0**16}
    dealt = {name: read_bag(site.hear(0, "shares", introduced(tokens, units[name]))) for name, site in sites.items()}
    with pytest.raises(MaskingRefused, match="the share of a is not its own"):
        sites["b"].hear(0, "dealt", bag({other: dealt[other]["b"] for other in ("a", "c")}))
    sites["b"].close()
    with pytest.raises(MaskingRefused, match="there are no masks for round 0"):
        sites["b"].masked(0, [np.zeros(2, dtype=np.float32)], {}, 1.0)
    wide = SecureAggregation(bits=64)
    site = MaskingSite("a", make_settings(wide), wide, SimulatedNotary("job", names))
    keys = {**tokens, "a": site.hear(0, "keys", "")}
    with pytest.raises(MaskingRefused, match="numbers of 64 bits in every round"):
        site.hear(0, "shares", introduced(keys, 1.0))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["shares", "dealt", "survivors", "unmask"]), st.text(max_size=200))
def test_any_message_is_taken_or_refused(step: Any, body: str) -> None:
    secure = SecureAggregation()
    site = MaskingSite("a", make_settings(secure), secure, SimulatedNotary("job", ["a", "b", "c"]))
    site.hear(0, "keys", "")
    with pytest.raises(Refused):
        site.hear(0, step, body)


def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    federation = Federation(
        "job",
        {},
        params_type="FULL",
        min_sites=1,
        round_seconds=1,
        observe=lambda _: None,  # type: ignore[arg-type]
    )
    with pytest.raises(Exception, match="out of turn"):
        federation.hear("a", 0, "keys", "")
