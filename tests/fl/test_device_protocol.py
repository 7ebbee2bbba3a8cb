"""The device protocol: its table, its messages, its seals; and a device and a gateway that live through anything.

`Lives` is the property test that every kit's core has to pass: whatever the job, the network and the device's power do,
a device is always in a state of the table, every answer is one that the table has, and it counts once in a version.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from edge_world import SHAPES, EdgeWorld, found_edge, model_of, version_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from attestation.canonical import canonical_bytes
from attestation.hybrid import HybridPrivateKey
from fl.edge.contract import contribution_id
from fl.edge.deltas import DeltaForm, decode_delta, encode_delta
from fl.edge.gateway import Gateway
from fl.edge.kits.python import DeviceSettings
from fl.edge.kits.python.connection import GatewayUnavailable, KeyRotated
from fl.edge.messages import ANSWERS, REQUESTS, Blob, Encoding, JobRequest, TaskAnswer, read_words
from fl.edge.protocol import MASKED, MESSAGES, RULES, SENDS, STATES, STATUSES, TABLE, TRAINED, next_state
from fl.edge.sealing import (
    SEAL_OVERHEAD,
    GroupKeys,
    KeyGone,
    new_group_key,
    open_answer,
    open_blob,
    seal_answer,
    seal_request,
)
from fl.edge.uploads import PieceRefused, Uploads
from fl.errors import MalformedMessage, MalformedTensors
from fl.tensors import parse
from policies.errors import Refused, SealwrightError, Unusable

CHARTER = "ab" * 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("protocol"))


# --- the table --------------------------------------------------------------------------------------------------------


def test_each_message_belongs_to_one_state_and_can_fail() -> None:
    assert len(RULES) == len(TABLE), "a status leads a message to one place"
    assert set(SENDS) == set(STATES) - {"over"}
    assert {message for message, _ in RULES} == set(MESSAGES)
    for message in MESSAGES:
        for status in STATUSES:
            rule = next_state(message, status)
            assert rule.message == message
            assert rule.then in STATES
            assert rule.status == (status if (message, status) in RULES else "ERROR")
        assert next_state(message, "ERROR").waits


def test_a_device_never_waits_for_nothing() -> None:
    """From every state but `over` a device comes to every other, and a rule that stays where it is waits.

    But for a cohort's steps, of which there are five, each taken once (tests/fl/edge/test_cohorts.py).
    """
    for one in TABLE:
        quick = one.message == "selection" or (one.message, one.status) == ("mask", "OK")
        assert one.waits or one.then != one.state or quick, one
    reached = {"idle"}
    for _ in STATES:
        reached |= {one.then for one in TABLE if one.state in reached} | (
            {TRAINED, MASKED} if "training" in reached else set()
        )
    assert reached == set(STATES)


# --- words ------------------------------------------------------------------------------------------------------------


def request_words(**changes: Any) -> dict[str, Any]:
    return {"token": "t", "request": "0" * 32, "answer_key": "1" * 64, "jobs": ["*"], "capabilities": {}, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"more": 1},
        {"request": "0" * 31},
        {"request": "G" * 32},
        {"answer_key": 7},
        {"jobs": []},
        {"jobs": ["a/b"]},
        {"jobs": "*"},
        {"capabilities": {"os": 1}},
        {"capabilities": {str(n): "x" for n in range(65)}},
        {"token": "x" * 5000},
    ],
)
def test_words_that_are_none(changes: dict[str, Any]) -> None:
    read_words(JobRequest, canonical_bytes(request_words()), where="test")
    with pytest.raises(MalformedMessage):
        read_words(JobRequest, canonical_bytes(request_words(**changes)), where="test")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_words(raw: bytes) -> None:
    """They are refused; what is not refused is canonical, and words that may leave out what has a default."""
    for kind in (*REQUESTS.values(), *ANSWERS.values()):
        try:
            words = read_words(kind, raw, where="test")
        except MalformedMessage:
            continue
        assert canonical_bytes(json.loads(raw)) == raw
        assert read_words(kind, words.to_bytes(), where="test") == words


@given(st.floats(0, 86400), st.text(max_size=100), st.sampled_from(STATUSES))
def test_answers_are_read_as_they_were_written(seconds: float, text: str, status: Any) -> None:
    for kind in ANSWERS.values():
        answer = kind(status=status, message=text, retry_seconds=seconds)
        assert read_words(kind, answer.to_bytes(), where="test") == answer


def test_words_have_one_form() -> None:
    raw = TaskAnswer(status="RETRY", retry_seconds=2.5).to_bytes()
    for other in (raw.replace(b",", b", "), raw[:-1] + b',"status":"OK"}', b" " + raw):
        with pytest.raises(MalformedMessage):
            read_words(TaskAnswer, other, where="test")


def test_no_secret_is_printed() -> None:
    words = JobRequest(token="secret-token", request="0" * 32, answer_key="5ec7e7" * 10 + "0000", jobs=("*",))
    blob = Blob(id="0" * 64, key="5ec7e7" * 10 + "0000", sha256="0" * 64, size=1)
    assert not any(secret in repr(one) for secret in ("secret-token", "5ec7e7") for one in (words, blob))


# --- seals ------------------------------------------------------------------------------------------------------------


def test_a_request_opens_for_its_message_its_charter_and_its_group_alone() -> None:
    value = new_group_key()
    keys, key = GroupKeys.parse(value, CHARTER), ec.generate_private_key(ec.SECP256R1())
    body = seal_request("task", b"words", b"tensors", key=key, group_key=keys.public, charter=CHARTER)
    assert len(body) == SEAL_OVERHEAD + 4 + 5 + 7 + 64
    opened = keys.open("task", body)
    assert (opened.words, bytes(opened.tensors)) == (b"words", b"tensors")
    assert opened.is_signed_by(key.public_key())
    assert not opened.is_signed_by(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(Refused):
        keys.open("result", body)
    with pytest.raises(Refused):
        GroupKeys.parse(value, "cd" * 32).open("task", body)
    with pytest.raises(KeyGone):
        GroupKeys.parse(new_group_key(), CHARTER).open("task", body)
    newer = GroupKeys.parse(new_group_key(value), CHARTER)
    assert newer.open("task", body).words == b"words", "an older key of the group opens what was sealed to it"


@given(st.binary(max_size=3000))
def test_bytes_that_no_gateway_opens(raw: bytes) -> None:
    for body in (raw, KEYS.id + raw):
        with pytest.raises((SealwrightError, KeyGone)):
            KEYS.open("result", body)


KEYS = GroupKeys.parse(new_group_key(), CHARTER)


@pytest.mark.parametrize("head", [b"\xff\xff\xff\xff", b"\0\0\0\x41", b"\0"])
def test_lengths_that_lie(head: bytes) -> None:
    from attestation.hybrid import seal
    from fl.edge.sealing import _info

    body = KEYS.id + seal(head + bytes(64), KEYS.public, info=_info(CHARTER, "job", KEYS.id))
    with pytest.raises(MalformedMessage):
        KEYS.open("job", body)


def test_answers_and_blobs_that_were_changed() -> None:
    key, request = secrets.token_bytes(32), secrets.token_hex(16)
    body = seal_answer(b"words", key, request, secrets.token_bytes)
    assert open_answer(body, key, request) == b"words"
    for other in (body[:-1], body + b"\0", bytes([body[0] ^ 1]) + body[1:], b""):
        with pytest.raises(Refused):
            open_answer(other, key, request)
    with pytest.raises(Refused):
        open_answer(body, key, secrets.token_hex(16))
    blob, sealed = KEYS.seal_blob(b"model")
    assert (blob, sealed) == KEYS.seal_blob(b"model"), "every gateway of the group makes the same"
    assert blob.key != KEYS.seal_blob(b"other")[0].key
    assert open_blob(blob, sealed) == b"model"
    for changes in ({"id": "0" * 64}, {"key": "0" * 64}, {"sha256": "0" * 64}, {"size": 4}):
        with pytest.raises(Refused):
            open_blob(blob.model_copy(update=changes), sealed)


def test_cookies_are_a_group_s_own() -> None:
    value = new_group_key()
    keys = GroupKeys.parse(value, CHARTER)
    cookie = keys.cookie(7, device="d", version=1)
    assert keys.cookie_time(cookie, device="d", version=1) == 7
    assert GroupKeys.parse(new_group_key(value), CHARTER).cookie_time(cookie, device="d", version=1) == 7
    assert GroupKeys.parse(new_group_key(), CHARTER).cookie_time(cookie, device="d", version=1) is None
    for claims in ({"device": "e", "version": 1}, {"device": "d", "version": 2}, {"device": "d"}):
        assert keys.cookie_time(cookie, **claims) is None  # type: ignore[arg-type]
    assert keys.cookie_time(f"{8:016x}{cookie[16:]}", device="d", version=1) is None
    assert keys.cookie_time("", device="d", version=1) is None


@pytest.mark.parametrize(
    "value", [b"", bytes(95), bytes(97), new_group_key() * 2, b"".join(map(bytes, [[n] * 96 for n in range(5)]))]
)
def test_values_that_are_no_group_key(value: bytes) -> None:
    with pytest.raises(Unusable):
        GroupKeys.parse(value, CHARTER)


def test_rotating_keeps_a_few_keys() -> None:
    value = b""
    for _ in range(6):
        value = new_group_key(value)
    assert len(value) == 4 * 96
    assert HybridPrivateKey.from_bytes(value[:96]).public_bytes() == GroupKeys.parse(value, CHARTER).public


# --- differences ------------------------------------------------------------------------------------------------------

SCHEMA = parse(model_of(0.0), max_size=1 << 20).schema


@given(st.integers(0, 2**32 - 1), st.sampled_from(get_args(Encoding)), st.booleans())
@settings(max_examples=60)
def test_differences_come_as_they_were_sent(seed: int, encoding: Encoding, compressed: bool) -> None:
    rng = np.random.default_rng(seed)
    shapes = {**SHAPES, "temperature": ()}
    sent = {
        name: np.asarray(rng.normal(scale=10.0 ** rng.integers(-6, 6), size=shape), dtype="<f4")
        for name, shape in shapes.items()
    }
    raw = encode_delta(sent, encoding, rng, compressed=compressed)
    schema = parse(model_of(0.0, shapes), max_size=1 << 20).schema
    come = decode_delta(raw, DeltaForm.of(schema, encoding), compressed=compressed)
    for name, array in sent.items():
        assert (come[name].dtype, come[name].shape) == (np.float32, shapes[name])
        most = {"f32": 0.0, "bf16": 2.0**-8 * np.abs(array), "int8": np.abs(array).max() / 126}[encoding]
        assert np.all(np.abs(come[name] - array) <= most)


def test_rounding_to_int8_is_right_in_the_mean() -> None:
    rng = np.random.default_rng(3)
    sent = {name: np.full(shape, 0.3, "<f4") for name, shape in SHAPES.items()}
    sent["a.bias"][0] = 1.0
    total, form = np.zeros(3), DeltaForm.of(SCHEMA, "int8")
    for _ in range(2000):
        raw = encode_delta(sent, "int8", rng, compressed=False)
        total += decode_delta(raw, form, compressed=False)["a.bias"]
    assert total / 2000 == pytest.approx([1.0, 0.3, 0.3], abs=1e-3)


def test_what_inflates_without_end_is_refused() -> None:
    with pytest.raises(MalformedTensors, match="more than"):
        decode_delta(zlib.compress(bytes(100 << 20)), DeltaForm.of(SCHEMA, "f32"), compressed=True)


@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_difference(raw: bytes, compressed: bool) -> None:
    with pytest.raises(MalformedTensors):
        decode_delta(raw, DeltaForm.of(SCHEMA, "int8"), compressed=compressed)


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_uploads_are_bounded() -> None:
    from hashlib import sha256

    uploads = Uploads(100)
    whole = bytes(range(60))
    digest = sha256(whole).hexdigest()
    assert uploads.put("a", digest, 60, 0, whole[:40], 0.0) == 40
    with pytest.raises(PieceRefused) as caught:
        uploads.put("a", digest, 60, 30, whole[30:], 0.0)
    assert caught.value.offset == 40
    with pytest.raises(PieceRefused):
        uploads.put("a", digest, 60, 40, whole, 0.0)
    assert uploads.put("b", digest, 90, 0, bytes(70), 1.0) == 70, "the oldest makes room"
    assert uploads.offset("a", digest) == 0
    assert uploads.held == 70
    with pytest.raises(PieceRefused):
        uploads.put("c", digest, 200, 0, bytes(150), 2.0)
    assert uploads.held <= 100
    assert uploads.put("d", digest, 60, 0, whole, 3.0) == whole
    with pytest.raises(PieceRefused, match="not what it was named"):
        uploads.put("e", "0" * 64, 60, 0, whole, 3.0)
    uploads.put("f", digest, 60, 0, whole[:10], 4.0)
    uploads.put("g", digest, 60, 0, whole[:10], 1000.0)
    assert uploads.offset("f", digest) == 0, "one that nobody goes on with is dropped"


# --- a device and a gateway, through anything -------------------------------------------------------------------------


class Lossy:
    """The connection of a device to a gateway in the same thread, on which requests and answers may be lost."""

    def __init__(self, machine: Lives) -> None:
        self._machine = machine

    def charter(self, above: int | None) -> bytes | None:
        import json

        from attestation.canonical import b64

        if above == self._machine.world.federation.charter().version:
            return None
        store = self._machine.world.federation.store
        return json.dumps({"files": {name: b64(raw) for name, raw in store.items()}}).encode()

    def proof(self, nonce: str) -> bytes:
        return self._machine.gateway.proof(nonce).encode()

    def send(self, message: Any, sealed: bytes) -> bytes:
        machine = self._machine
        if machine.lose == "request":
            machine.lose = ""
            raise GatewayUnavailable("cut", "test")
        try:
            call = machine.gateway.opened(message, sealed)
        except KeyGone as error:
            raise KeyRotated("test") from error
        assert not isinstance(call, bytes)
        answer = machine.gateway.decide(call)
        assert (message, answer.status) in RULES
        assert machine.device.standing.state == RULES[message, answer.status].state
        if machine.lose == "answer":
            machine.lose = ""
            raise GatewayUnavailable("cut", "test")
        return machine.gateway.sealed(call, answer)

    def blob(self, blob: Blob, have: bytes = b"") -> bytes:
        found = self._machine.gateway.blob(blob.id)
        if found is None:
            raise Refused("gone", where="blob", do="Begin anew.")
        return found[: len(have) + 200]


class Lives(RuleBasedStateMachine):
    """Two gateways of one group in turn; versions come and go; messages are lost; the device is killed."""

    world: EdgeWorld

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = secrets.token_hex(16)
        self.token = self.world.token(self.key, self.name)
        self.version = 1
        self.lose = ""
        self.branches = [self.world.branch(), self.world.branch()]
        self.identity = self.world.identity()
        self.gateways: list[Gateway] = [self.world.gateway(one, identity=self.identity) for one in self.branches]
        self.gateway = self.gateways[0]
        self.counted: list[str] = []
        self.start()

    def start(self) -> None:
        wanted = DeviceSettings(jobs=("heart-*",), capabilities={"os": "linux"}, encoding="f32", wait_seconds=0.0)
        self.device = self.world.device(
            Lossy(self), Path(self.folder.name), key=self.key, token=self.token, settings=wanted
        )

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.device.step()

    @rule(what=st.sampled_from(["request", "answer"]))
    def lose_one(self, what: str) -> None:
        self.lose = what
        self.device.step()
        self.lose = ""

    @rule()
    def kill_the_device(self) -> None:
        self.start()

    @rule()
    def go_to_the_other_gateway(self) -> None:
        self.gateway = self.gateways[self.gateway is self.gateways[0]]

    @rule()
    def kill_the_gateway(self) -> None:
        number = self.gateways.index(self.gateway)
        self.settle()
        self.branches[number] = branch = self.world.branch()
        branch.over = self.branches[1 - number].over
        branch.advance([version_of(self.version, self.world.task)])
        self.gateway = self.gateways[number] = self.world.gateway(branch, identity=self.identity)

    @rule()
    def a_new_version(self) -> None:
        self.settle()
        self.version += 1
        for branch in self.branches:
            branch.advance([version_of(n, self.world.task) for n in range(max(1, self.version - 1), self.version + 1)])

    @rule(forget=st.booleans())
    def rotate(self, forget: bool) -> None:
        self.world.rotate(forget=forget)

    @precondition(lambda self: not self.branches[0].over)
    @rule()
    def end_the_job(self) -> None:
        for branch in self.branches:
            branch.over = True

    @precondition(lambda self: self.device.standing.state == "over")
    @rule()
    def begin_a_life(self) -> None:
        for branch in self.branches:
            branch.over = False
        Path(self.folder.name, "state.json").unlink()
        self.start()

    def settle(self) -> None:
        """What the root does: of all that come for a version, the first of each contribution counts."""
        for branch in self.branches:
            claims = [one for ids in branch.claims().values() for one in ids]
            double = [one for one in claims if one.hex() in self.counted]
            branch.settle(double)
            self.counted += [one.hex() for one in claims if one not in double]
            branch.take()

    @invariant()
    def is_somewhere(self) -> None:
        assert self.device.standing.state in STATES
        assert (self.device.standing.task is not None) == (self.device.standing.state in ("training", "reporting"))

    @invariant()
    def counts_once(self) -> None:
        assert len(set(self.counted)) == len(self.counted)
        own = {contribution_id("job-1", version, f"phones/{self.name}") for version in range(self.version + 1)}
        assert set(self.counted) <= own, "and under its own name alone"

    def teardown(self) -> None:
        for branch in self.branches:  # a device that is let alone comes to report the newest version
            branch.over = False
        if self.device.standing.state == "over":
            self.begin_a_life()
        self.a_new_version()
        for _ in range(12):
            self.device.step()
        self.settle()
        assert contribution_id("job-1", self.version, f"phones/{self.name}") in self.counted
        self.folder.cleanup()


def test_a_device_lives_through_anything(world: EdgeWorld) -> None:
    Lives.world = world
    run_state_machine_as_test(Lives, settings=settings(max_examples=15, stateful_step_count=25, deadline=None))


@pytest.mark.long
def test_a_device_lives_through_anything_for_long(world: EdgeWorld) -> None:
    Lives.world = world
    run_state_machine_as_test(Lives, settings=settings(max_examples=100, stateful_step_count=50, deadline=None))
