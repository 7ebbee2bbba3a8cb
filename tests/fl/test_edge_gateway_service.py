"""Devices and a gateway over real TLS: what a device believes, what a gateway admits, what a stranger can do."""

from __future__ import annotations

import http.client
import json
import re
import secrets
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_world import JOB, SHAPES, AddingTrainer, EdgeWorld, found_edge, model_of, version_of
from federation_world import now
from proxies import ending_proxy

from fl.edge import reference
from fl.edge.kits.python import DeviceSettings, GatewayConnection, Trust
from fl.edge.kits.python.connection import GatewayUnavailable
from fl.edge.messages import JobAnswer, JobRequest, MaskRequest, read_words
from fl.edge.protocol import MESSAGES
from fl.edge.sealing import open_answer, seal_request
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.devices import TaskApproval
from policies.errors import CharterRefused, Refused


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("edge"))


@pytest.fixture
def connect() -> Iterator[Any]:
    opened: list[GatewayConnection] = []

    def connected(url: str) -> GatewayConnection:
        opened.append(GatewayConnection(url, timeout=10.0))
        return opened[-1]

    yield connected
    for one in opened:
        one.close()


def steps(device: Any, wanted: str, most: int = 30) -> None:
    """Go on until the device is in the state `wanted`."""
    for _ in range(most):
        if device.standing.state == wanted:
            return
        device.step()
    raise AssertionError(f"the device is {device.standing.state}")


def test_a_device_trains_a_version_and_counts_once(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        device = world.device(connect(url), tmp_path)
        steps(device, "reporting")
        steps(device, "joined")
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        partial = call(lambda _: branch.take())
        assert partial.count == 1
        assert np.allclose(partial.versions[1].sums["a.weight"], 0.5 * 8), "weighed by its eight examples"
        device.step()
        assert device.standing.state == "joined", "the same device is not given the same version again"
        branch.advance([version_of(1, world.task), version_of(2, world.task)])
        steps(device, "reporting")
        assert device.standing.task is not None
        assert device.standing.task.version == 2


def test_a_device_that_is_restarted_with_a_task_goes_on_with_it(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    with world.serving(world.gateway(world.branch())) as (url, _):
        steps(world.device(connect(url), tmp_path), "training")
        again = world.device(connect(url), tmp_path)
        assert again.standing.state == "training"
        again.step()
        assert again.standing.state == "reporting", "the charter that approves its task is fetched first"


def test_a_task_is_waited_for(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch = world.branch(permits=0)
    with world.serving(world.gateway(branch)) as (url, call):
        settings = DeviceSettings(jobs=(JOB,), capabilities={"os": "linux"}, wait_seconds=20.0)
        device = world.device(connect(url), tmp_path, settings=settings)
        steps(device, "joined")
        waiting = threading.Thread(target=device.step)
        waiting.start()
        while not call(lambda service: service._waiting):
            waiting.join(0.01)
        call(lambda _: branch.grant(1))
        call(lambda service: service.news())
        waiting.join(10)
        assert device.standing.state == "training"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measurement": "99" * 48}, "the measurement of gateway/gate is no approved image's"),
        ({"seconds": 60, "age": 100}, "the EAR ended at"),
        ({"host_data": "00" * 32}, "is enrolled with other init-data"),
        ({"broker_key": Ed25519PrivateKey.generate()}, "the EAR's signature is not broker one's"),
    ],
)
def test_a_gateway_that_is_not_attested_gets_nothing(
    world: EdgeWorld, connect: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    gateway = world.gateway(world.branch(), identity=world.identity(**changes))
    with world.serving(gateway) as (url, _):
        device = world.device(connect(url), tmp_path)
        sent: list[bytes] = []
        device._connection.send = lambda message, sealed: sent.append(sealed)  # type: ignore[method-assign,assign,func-returns-value]
        world.events.clear()
        assert device.step() > 0
        name, details = world.events[-1]
        assert name == "refused"
        assert any(said in reason for reason in details["reasons"]), details
        assert not sent
        assert device.standing.state == "idle"


def test_a_guest_of_another_role_is_no_gateway(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    gateway = world.gateway(world.branch(), identity=world.federation.identity("server", "hub"))
    with world.serving(gateway) as (url, _):
        world.events.clear()
        world.device(connect(url), tmp_path).step()
        assert any("its EARs are those of server/hub" in reason for reason in world.events[-1][1]["reasons"])


def test_a_device_in_production_refuses_the_virtual_platform(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    with world.serving(world.gateway(world.branch())) as (url, _):
        device = world.device(connect(url), tmp_path, trust=Trust(world.root))
        world.events.clear()
        device.step()
        assert "virtual platform" in world.events[-1][1]["why"]
        with pytest.raises(CharterRefused, match="no charter that holds"):
            device._trust.charter(now())


def test_a_charter_of_others_is_refused(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    other = found_edge(tmp_path)
    with world.serving(world.gateway(world.branch())) as (url, _):
        raw = connect(url).charter(None)
        with pytest.raises(CharterRefused):
            Trust(other.root, production=False).follow(raw, now())


def test_a_proof_is_over_the_nonce_of_its_device(world: EdgeWorld, connect: Any) -> None:
    with world.serving(world.gateway(world.branch())) as (url, _):
        connection, trust = connect(url), Trust(world.root, production=False)
        trust.follow(connection.charter(None), now())
        nonce = secrets.token_hex(16)
        raw = connection.proof(nonce)
        assert trust.appraise(raw, nonce, now()).name == "gate"
        with pytest.raises(Refused, match="another nonce"):
            trust.appraise(raw, secrets.token_hex(16), now())
        changed = json.loads(raw)
        head, body, signature = changed["word"].split(".")
        changed["word"] = ".".join((head, body, signature[:-4] + ("AAAA" if signature[-4:] != "AAAA" else "BBBB")))
        with pytest.raises(Refused, match="its word is not its own"):
            trust.appraise(json.dumps(changed).encode(), nonce, now())


def test_a_task_that_is_not_approved_does_not_run(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch, trainer = world.branch(), AddingTrainer()
    strange = type(world.task)(JOB, "executorch", b"graph", {"batch_size": 4, "lr": 9.5})
    branch.advance([version_of(1, strange)], {strange.digest: strange})
    with world.serving(world.gateway(branch)) as (url, _):
        device = world.device(connect(url), tmp_path, trainer=trainer)
        steps(device, "training")
        device.step()
        assert "the charter approves no device task" in world.events[-1][1]["why"]
        assert (device.standing.state, trainer.trained) == ("joined", 0)


def test_filters_are_the_app_s_own_and_those_of_its_that_the_task_names(
    world: EdgeWorld, connect: Any, tmp_path: Path
) -> None:
    task = type(world.task)(JOB, "executorch", b"graph", {"filters_in": ["zero"], "filters_out": ["twice", "twice"]})
    approval = TaskApproval(task=task.digest, job=JOB, expires=now() + timedelta(days=1))
    world.federation.change(Changes(put=files_of([approval])))
    branch = world.branch()
    branch.advance([], {})
    branch.advance([version_of(1, task)], {task.digest: task})
    seen: list[Any] = []

    def zero(model: Any) -> Any:
        seen.append(model["a.bias"][0])
        return {name: 0 * array for name, array in model.items()}

    def twice(delta: Any) -> Any:
        return {name: 2 * array for name, array in delta.items()}

    def last(delta: Any) -> Any:
        seen.append(delta["a.bias"][0])
        return delta

    with world.serving(world.gateway(branch)) as (url, _):
        connection = connect(url)
        device = world.device(connection, tmp_path / "one", filters={"zero": zero, "twice": twice}, filters_out=[last])
        steps(device, "reporting")
        assert seen == [1.0, 2.0], "the model's own number; then the difference of 0.5, twice doubled"
        other = world.device(connection, tmp_path / "two", filters={"twice": twice})
        steps(other, "training")
        other.step()
        assert "no filter zero for filters_in" in world.events[-1][1]["why"]
        assert other.standing.state == "joined"


def test_an_approval_for_another_job_or_that_has_expired_is_none(
    world: EdgeWorld, connect: Any, tmp_path: Path
) -> None:
    path = f"code/device-{world.task.digest}.json"
    good = world.federation.charter().files[path]
    branch = world.branch()
    try:
        for change, said in (
            ({"job": "sleep"}, "approved for the job sleep"),
            ({"expires": now() - timedelta(days=1)}, "has expired"),
        ):
            words = {"task": world.task.digest, "job": JOB, "expires": now() + timedelta(days=1), **change}
            world.federation.change(Changes(put=files_of([TaskApproval(**words)])))
            with world.serving(world.gateway(branch)) as (url, _):
                device = world.device(connect(url), tmp_path / said)
                steps(device, "training")
                device.step()
                assert said in world.events[-1][1]["why"]
    finally:
        world.federation.change(Changes(put={path: good}))


def asking(world: EdgeWorld, connection: GatewayConnection, token: str, key: Any, **changes: Any) -> JobAnswer:
    """A job request made by hand, and its answer."""
    words = JobRequest(
        token=token,
        request=secrets.token_hex(16),
        answer_key=secrets.token_hex(32),
        jobs=("*",),
        capabilities={"os": "linux"},
    )
    body = seal_request(
        "job",
        words.to_bytes(),
        b"",
        **{"key": key, "group_key": world.keys().public, "charter": world.federation.charter().id, **changes},
    )
    answer = connection.send("job", body)
    return read_words(JobAnswer, open_answer(answer, bytes.fromhex(words.answer_key), words.request), where="job")


def test_who_may_ask(world: EdgeWorld, connect: Any) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    other = ec.generate_private_key(ec.SECP256R1())
    old = now() - timedelta(days=100)
    with world.serving(world.gateway(world.branch())) as (url, _):
        connection = connect(url)
        assert asking(world, connection, world.token(key), key).status == "OK"
        for token, said in (
            (world.token(other), "not signed by the device of its token"),
            (world.token(key, signing_key=Ed25519PrivateKey.generate()), "signature"),
            (
                world.token(key, issuer=world.issuer.model_copy(update={"name": "others"})),
                "issues none in this charter",
            ),
            (world.token(key, at=old), "not good now"),
            (world.token(key, at=now() + timedelta(days=1)), "not good now"),
            (world.token(key, seconds=world.issuer.token_seconds + 1), "longer than its issuer may"),
            (world.token(key, charter="0" * 64), "for another charter"),
            ("x.y.z", "the token is none"),
        ):
            answer = asking(world, connection, token, key)
            assert (answer.status, answer.job) == ("INVALID_REQUEST", None)
            assert said in answer.message
        assert asking(world, connection, world.token(key, jobs=("sleep-*",)), key).status == "NO_JOB"


def test_what_a_stranger_or_a_balancer_can_do(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    """Between device and gateway there is nothing to read, to change, to turn to another use, or to count twice."""
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        connection = connect(url)
        device, seen = world.device(connection, tmp_path), []
        send = connection.send

        def tapped(message: Any, sealed: bytes) -> bytes:
            answer = send(message, sealed)
            seen.append((message, sealed, answer))
            return answer

        connection.send = tapped
        steps(device, "reporting")
        steps(device, "joined")
        token = device._token.encode()
        for _, sealed, answer in seen:
            assert token not in sealed
            assert b"job-1" not in sealed + answer
            assert b"a.weight" not in sealed
        message, sealed, first = seen[-1]
        assert message == "result"
        again = send("result", sealed)
        assert again[:12] != first[:12], "a request that comes again is answered under another nonce"
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        assert call(lambda _: branch.take()).count == 1, "and counts once"
        for changed in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:-1], sealed + b"\0"):
            with pytest.raises(Refused, match="HTTP 400"):
                send("result", changed)
        with pytest.raises(Refused, match="HTTP 400"):
            send("job", sealed)  # a result for a job's request
        with pytest.raises(Refused, match="none to this request"):
            open_answer(first, secrets.token_bytes(32), secrets.token_hex(16))


def test_through_a_balancer_that_ends_tls(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    """A real one: it reads and writes all that passes, and finds neither model, nor update, nor token in it."""
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        with ending_proxy(tmp_path, url.removeprefix("https://"), tls_to=True) as (balancer, _):
            device = world.device(connect(f"https://{balancer.address}"), tmp_path / "device")
            steps(device, "reporting")
            steps(device, "joined")
            device._connection.close()
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        assert call(lambda _: branch.take()).count == 1
    seen = bytes(balancer.seen)
    assert b"POST /edge/" in seen
    assert device.standing.state == "joined"
    for hidden in (device._token.encode(), b"a.weight", np.full(8, 1, np.float32).tobytes(), b"heart-rate"):
        assert hidden not in seen


def test_a_key_that_was_rotated(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, _):
        device = world.device(connect(url), tmp_path)
        steps(device, "training")
        world.rotate()
        steps(device, "joined")  # what was begun under the older key ends under it
        assert world.events[-1][1]["status"] == "OK"
        world.rotate(forget=True)
        branch.advance([version_of(2, world.task)])
        assert device.step() > 0, "the key is gone"
        steps(device, "reporting")
        world.rotate(forget=True)
        steps(device, "joined")
        assert "no gateway gave this device this task" in world.events[-1][1]["message"]


def test_a_result_in_pieces(world: EdgeWorld, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.edge.kits.python.device.UPLOAD_FROM", 1000)
    shapes = {"w": (500, 400)}
    branch = world.branch(shapes=shapes)
    with world.serving(world.gateway(branch)) as (url, _):
        connection = connect(url)
        device = world.device(connection, tmp_path)
        steps(device, "reporting")
        pieces: list[str] = []
        through, whole = connection._call, connection.upload

        def breaking(method: str, path: str, *arguments: Any, **more: Any) -> Any:
            if method == "PUT":
                pieces.append(arguments[1]["Upload-Offset"])
                if len(pieces) == 3:
                    raise GatewayUnavailable("cut", "test")
            return through(method, path, *arguments, **more)

        connection._call = breaking
        bodies: list[bytes] = []

        def uploaded(sealed: bytes, ticket: str) -> bytes:
            bodies.append(sealed)
            return whole(bodies[0], ticket, 1 << 18)

        connection.upload = uploaded
        words = device._words("result")
        device._words = lambda message: words  # type: ignore[method-assign]
        device.step()
        assert device.standing.state == "reporting"
        device.step()
        assert device.standing.state == "joined"
        assert pieces == ["0", "262144", "524288", "524288", "786432"]
        connection.upload = whole
        with pytest.raises(Refused, match="the ticket is none"):
            connection.upload(b"x", "0" * 80)


def test_a_blob_is_fetched_from_where_it_broke_off(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch = world.branch(shapes={"w": (500, 400)})
    with world.serving(world.gateway(branch)) as (url, _):
        connection = connect(url)
        device = world.device(connection, tmp_path)
        steps(device, "training")
        blob = device.standing.task.model  # type: ignore[union-attr]
        sealed = connection.blob(blob)
        assert len(sealed) == blob.size + 16
        assert connection.blob(blob, sealed[:1000]) == sealed
        device._memory.keep_blob(blob, sealed[:1000])
        steps(device, "reporting")
        device._memory.keep_blob(blob, sealed[:1000] + bytes(len(sealed) - 1000))
        with pytest.raises(Refused, match="not what the gateway named"):
            device._content(blob)
        assert device._content(blob) == model_of(1.0, {"w": (500, 400)}), "what was spoilt is fetched anew"


def test_results_that_are_none(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    """Poisoned, malformed, too heavy, too large: what a device with a good token and a bad mind can send."""
    branch = world.branch(max_norm=1.0, max_weight=5.0)
    with world.serving(world.gateway(branch)) as (url, call):
        device = world.device(connect(url), tmp_path / "good")
        steps(device, "reporting")
        good = device._memory.result()
        assert good is not None
        for bad, said in (
            (model_of(float("nan")), "not finite"),
            (model_of(1.0, {"other": (3,)}), "not those of the model"),
            (good[:-1], "the result is refused"),
            (good + b"\0", "bytes follow"),
        ):
            device._memory.keep_result(bad)
            standing = device.standing
            device.step()
            assert said in world.events[-1][1]["message"]
            device._keep(standing)
        device._memory.keep_result(good)
        device._keep(device.standing.model_copy(update={"weight": 1e9}))
        device.step()
        assert world.events[-1][1]["status"] == "OK"
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        (total,) = call(lambda _: branch.take()).versions.values()
        assert total.weight == 5.0, "no device weighs more than the job's bound"
        norm = sum(float((total.sums[name] ** 2).sum()) for name in SHAPES) ** 0.5
        assert norm == pytest.approx(5.0), "nor moves the model further than the job's norm, at that weight"


def test_a_result_for_a_task_that_was_never_given(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    branch = world.branch()
    branch.advance([version_of(1, world.task), version_of(2, world.task)])
    with world.serving(world.gateway(branch)) as (url, _):
        device = world.device(connect(url), tmp_path / "one")
        steps(device, "reporting")
        task = device.standing.task
        assert task is not None
        for changed in ({"version": 1}, {"cookie": task.cookie[:-1] + ("0" if task.cookie[-1] != "0" else "1")}):
            standing = device.standing
            result = device._memory.result()
            assert result is not None
            device._keep(standing.model_copy(update={"task": task.model_copy(update=changed)}))
            device.step()
            assert "no gateway gave this device this task" in world.events[-1][1]["message"]
            device._memory.keep_result(result)
            device._keep(standing)
        thief = world.device(connect(url), tmp_path / "two")
        steps(thief, "joined")
        result = device._memory.result()
        assert result is not None
        thief._memory.keep_result(result)
        thief._keep(device.standing)
        thief.step()
        assert "no gateway gave this device this task" in world.events[-1][1]["message"], "a cookie is its device's own"


def test_bounds_of_the_service(world: EdgeWorld) -> None:
    with world.serving(world.gateway(world.branch())) as (url, call):
        most = call(lambda service: service._gateway.most())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        address, found = url.removeprefix("https://"), []
        for method, path, body in (
            ("POST", "/edge/v1/result", bytes(most + 1)),
            ("POST", "/edge/v1/job", bytes(100)),
            ("POST", "/edge/v1/job", world.keys().id + bytes(2000)),
            ("POST", "/edge/v1/proof", b'{"nonce":"0"}'),
            ("POST", "/edge/v1/proof", b"[" * 900),
            ("POST", "/edge/v1/job", iter([b"x"])),
            ("GET", f"/edge/v1/blobs/{'0' * 64}", None),
            ("GET", f"/edge/v1/uploads/{'0' * 64}", None),
            ("GET", "/", None),
            ("PUT", "/edge/v1/job", b"x"),
        ):
            client = http.client.HTTPSConnection(address, context=context, timeout=10)
            client.request(method, path, body=body)
            found.append(client.getresponse().status)
            client.close()
    assert found == [413, 410, 400, 400, 400, 400, 404, 404, 404, 404]


# --- the reference page and the OpenAPI document ----------------------------------------------------------------------


def test_the_reference_is_what_the_code_says() -> None:
    folder = Path(__file__).parents[2] / "docs/reference"
    assert (folder / reference.PAGE).read_text() == reference.page(), "python -m fl.edge.reference docs/reference"
    assert json.loads((folder / reference.DOCUMENT).read_text()) == reference.document()


def resolved(schema: Any, schemas: dict[str, Any]) -> Any:
    """A schema with its references in place."""
    if isinstance(schema, dict) and "$ref" in schema:
        return resolved(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if isinstance(schema, dict):
        return {name: resolved(one, schemas) for name, one in schema.items()}
    return [resolved(one, schemas) for one in schema] if isinstance(schema, list) else schema


def test_the_service_answers_as_its_openapi_document_says(world: EdgeWorld, connect: Any, tmp_path: Path) -> None:
    """Each operation is asked well and badly; each status, media type and JSON body is one that the document has."""
    document = reference.document()
    branch = world.branch(shapes={"w": (500, 400)})
    seen: set[tuple[str, str, int]] = set()
    with world.serving(world.gateway(branch)) as (url, _):
        device = world.device(connect(url), tmp_path)
        steps(device, "reporting")
        task, result = device.standing.task, device._memory.result()
        assert task is not None
        assert result is not None
        common = {"token": device._token, "request": "ab" * 16, "answer_key": "cd" * 32, "job": "job-1", "version": 1}
        masks = MaskRequest(**common, task=task.digest, cookie=task.cookie, step="keys", body="{}")
        sealed = {
            message: seal_request(
                message,
                (masks if message == "mask" else device._words(message)).to_bytes(),
                result if message == "result" else b"",
                key=device._key,
                group_key=world.keys().public,
                charter=world.federation.charter().id,
            )
            for message in MESSAGES
        }
        whole = sealed["result"]
        upload = f"/edge/v1/uploads/{sha256(whole).hexdigest()}"
        first = {"Upload-Ticket": task.ticket, "Upload-Offset": "0", "Upload-Length": str(len(whole))}
        rest = {**first, "Upload-Offset": "1000"}
        version = world.federation.charter().version
        asked: list[tuple[str, str, dict[str, str], bytes | None]] = [
            ("GET", "/edge/v1/charter", {}, None),
            ("GET", f"/edge/v1/charter?above={version}", {}, None),
            ("POST", "/edge/v1/proof", {}, b'{"nonce":"' + b"0" * 32 + b'"}'),
            ("POST", "/edge/v1/proof", {}, b"{}"),
            ("GET", f"/edge/v1/blobs/{task.model.id}", {}, None),
            ("GET", f"/edge/v1/blobs/{task.model.id}", {"Range": "bytes=5-10"}, None),
            ("GET", f"/edge/v1/blobs/{task.model.id}", {"Range": "bytes=99999999-"}, None),
            ("GET", f"/edge/v1/blobs/{'0' * 64}", {}, None),
            ("GET", upload, first, None),
            ("GET", upload, {"Upload-Ticket": "0" * 80}, None),
            ("PUT", upload, first, whole[:1000]),
            ("PUT", upload, first, whole[:1000]),
            ("PUT", upload, {**first, "Upload-Offset": "x"}, b"x"),
            ("PUT", upload, {**first, "Upload-Length": "999999999"}, b"x"),
            ("PUT", upload, rest, whole[1000:]),
            *(("POST", f"/edge/v1/{message}", {}, sealed[message]) for message in MESSAGES),
            *(("POST", f"/edge/v1/{message}", {}, bytes(2000)) for message in MESSAGES),
            *(("POST", f"/edge/v1/{message}", {}, bytes(5 << 20)) for message in MESSAGES),
        ]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        for method, path, headers, body in asked:
            client = http.client.HTTPSConnection(url.removeprefix("https://"), context=context, timeout=10)
            client.request(method, path, body=body, headers=headers)
            answer = client.getresponse()
            content = answer.read()
            client.close()
            template = re.sub("[0-9a-f]{64}", "{id}", path.partition("?")[0])
            said = document["paths"][template][method.lower()]["responses"].get(str(answer.status))
            assert said is not None, f"{method} {path}: {answer.status} {content[:100]!r}"
            media = (answer.headers.get_content_type() if content else None,)
            assert media == (tuple(said["content"]) if "content" in said else (None,)), (
                f"{method} {path} {answer.status}"
            )
            if media == ("application/json",):
                schema = resolved(said["content"]["application/json"]["schema"], document["components"]["schemas"])
                jsonschema.validate(json.loads(content), schema)
            seen.add((method, template, answer.status))
    good = {
        (method.upper(), path, int(status))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
        if int(status) not in (400, 404, 413, 503, 410)
    }
    assert good <= seen, good - seen
