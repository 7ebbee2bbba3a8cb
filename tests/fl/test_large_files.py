"""Files too large for a bundle: it names their digests, sites pull them as models, scripts find them beside them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, wait_until
from proxies import passing_proxy
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv
from fl.environments.user_client import UserClient
from fl.errors import RecipeUnusable, SealedDataRefused
from fl.guard.sandbox import Sandbox
from fl.jobs.bundle import Bundle, make_bundle, parse_bundle
from fl.jobs.large_files import LARGE, MAX_BYTES, FileOnDisk
from fl.jobs.sealing import open_file_of_job, seal_file_of_job
from fl.recipes.recipe import FILES_FOLDER, Recipe
from fl.server.job import ServerJob
from fl.transport.frames import CHUNK
from fl.transport.memory import SealedMemory
from policies.errors import Refused, SealwrightError

ADA = "acme-pharma/ada"
JOB = "trial-20260101-000000-00000000"
SIZE = LARGE + 12345
SCRIPT = """
import hashlib
from pathlib import Path

import numpy as np
from fl import client as flare

flare.init()
path = Path(__file__).parent / "tables" / "numbers.bin"
raw = path.read_bytes()
if str(path).startswith("/bundle"):  # in a sandbox
    try:
        path.open("r+b")
        raise SystemExit("it can be changed")
    except OSError:
        pass
first = hashlib.sha256(raw).digest()[0]
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(first)}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of SIZE random bytes."""
    folder = tmp_path_factory.mktemp("numbers") / "tables"
    folder.mkdir()
    (folder / "numbers.bin").write_bytes(np.random.default_rng(7).bytes(SIZE))
    (folder / "numbers.bin").chmod(0o400)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, numbers: Path) -> Recipe:
    code = tmp_path_factory.mktemp("code")
    (code / "client.py").write_text(SCRIPT)
    made = FedAvgRecipe(
        name="large",
        min_clients=2,
        num_rounds=1,
        initial_model={"w": np.zeros(3, dtype=np.float32)},
        train_script=str(code / "client.py"),
        round_seconds=60,
    )
    made.add_file(numbers)
    return made


@pytest.fixture(scope="module")
def bundle(recipe: Recipe, world: FederationWorld) -> Bundle:
    made = recipe.bundle()
    world.approve(made)
    return made


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vault")


@pytest.fixture(scope="module")
def server(world: FederationWorld, state: Path) -> Iterator[str]:
    with world.server(state=state) as address:
        yield address


def end_of(client: UserClient, job: str) -> tuple[str, list[str]]:
    """A job's last status, and what was said about its sites."""
    events = list(client.watch(job, timeout=90))
    return events[-1].text, [f"{one.site} {one.text}" for one in events if one.kind in {"lost", "refused"}]


def test_the_bundle_has_the_digest_and_not_the_file(recipe: Recipe, bundle: Bundle, numbers: Path) -> None:
    raw = (numbers / "numbers.bin").read_bytes()
    (file,) = bundle.settings.files
    assert (file.path, file.size) == ("tables/numbers.bin", SIZE)
    assert file.sha256 == hashlib.sha256(raw).hexdigest()
    assert len(bundle.raw) < 1 << 20
    assert parse_bundle(bundle.raw).digest == bundle.digest


def test_a_simulation_shows_it_where_a_site_does(recipe: Recipe, numbers: Path, tmp_path: Path) -> None:
    result = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path)).get_result()
    first = hashlib.sha256((numbers / "numbers.bin").read_bytes()).digest()[0]
    assert load_file(result / "model.safetensors")["w"].tolist() == [first] * 3


def test_sites_pull_it_through_a_cut_and_a_clone_has_it_again(
    world: FederationWorld, server: str, state: Path, recipe: Recipe, bundle: Bundle, numbers: Path, tmp_path: Path
) -> None:
    """One site's connection is cut in the middle of the file: it goes on there, and less comes than the file twice."""
    first = hashlib.sha256((numbers / "numbers.bin").read_bytes()).digest()[0]
    recipe.export(tmp_path / "exported")
    sources = {digest: tmp_path / "exported" / FILES_FOLDER / digest for digest in recipe.large}
    with (
        passing_proxy(server) as proxy,
        world.site(server, SITES[0], patience=60.0),
        world.site(proxy.address, SITES[1], patience=60.0),
        world.client(server) as client,
        recipe.first_model() as model,
    ):

        def cut() -> None:
            if wait_until(lambda: len(proxy.seen) > SIZE // 2, 60):
                proxy.cut()
                proxy.mend()

        cutter = threading.Thread(target=cut)
        cutter.start()
        job = client.submit(bundle, model, roster=None, recipients=[ADA], files=sources)
        assert end_of(client, job) == ("finished", [])
        cutter.join()
        assert proxy.connections > 3, "it was cut"
        assert len(proxy.seen) < SIZE + (12 << 20) + 2 * CHUNK, "what had come before the cut came again"
        kept = b""
        for path in sorted(state.iterdir()):
            with suppress(FileNotFoundError):  # the job's last state goes as it ends
                kept += path.read_bytes()
        assert (numbers / "numbers.bin").read_bytes()[:64] not in kept, "it lies in clear on the disk"
        clone = client.clone(job)
        assert end_of(client, clone) == ("finished", [])
        result = client.download(clone, tmp_path / "result", ledgers=None)
        assert load_file(result / "model.safetensors")["w"].tolist() == [first] * 3
        for one in (job, clone):
            client.delete(one)
        assert not list(state.iterdir())


def test_a_submitter_with_another_file_is_refused(
    world: FederationWorld, server: str, recipe: Recipe, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digest,) = recipe.large
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    with world.client(server) as client, recipe.first_model() as model:
        for files in ({}, {digest: tmp_path / "none"}, {digest: other}):
            with pytest.raises(RecipeUnusable, match=r"not there|not the file"):
                client.submit(bundle, model, roster=None, recipients=[ADA], files=files)
        monkeypatch.setattr(FileOnDisk, "digest", digest)  # a client that checks nothing
        job = client.submit(bundle, model, roster=None, recipients=[ADA], files={digest: other})
        assert end_of(client, job)[0] == "failed"
        assert "not the file that the bundle names" in client.report(job).reasons[0]
        other.write_bytes(bytes(SIZE + 1))
        monkeypatch.setattr("fl.environments.user_client.found_in", lambda *_: {digest: FileOnDisk(other, SIZE + 1)})
        with pytest.raises(SealwrightError, match="a chunk of"):
            client.submit(bundle, model, roster=None, recipients=[ADA])


def test_a_server_that_shows_another_file_gets_no_script_started(
    world: FederationWorld, server: str, recipe: Recipe, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is bad: it serves as many other bytes under the digest."""
    with SealedMemory.of(bytes(SIZE)) as other:
        monkeypatch.setattr(ServerJob, "file", lambda self, sha256: other)
        with (
            world.site(server, SITES[0]),
            world.site(server, SITES[1]),
            world.client(server) as client,
            recipe.first_model() as model,
        ):
            job = client.submit(bundle, model, roster=None, recipients=[ADA], files=recipe.large)
            assert end_of(client, job)[0] == "failed"
            reasons = " ".join(client.report(job).reasons)
    assert all(site in reasons for site in SITES), reasons
    assert "the transfer's SHA-256 is" in reasons


def test_what_fits_into_nobodys_memory_is_refused_before_it_comes(
    world: FederationWorld, server: str, recipe: Recipe, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.site.files.memory_part", lambda: SIZE - 1)
    with (
        world.site(server, SITES[0]),
        world.site(server, SITES[1]),
        world.client(server) as client,
        recipe.first_model() as model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=[ADA], files=recipe.large)
        assert end_of(client, job)[0] == "failed"
        assert f"its files have {SIZE} bytes" in " ".join(client.report(job).reasons)
    monkeypatch.setattr("fl.server.user_calls.memory_part", lambda: SIZE - 1)
    with (
        world.server() as bare,
        world.client(bare) as client,
        recipe.first_model() as model,
        pytest.raises(Refused, match="this server has no vault"),
    ):
        client.submit(bundle, model, roster=None, recipients=[ADA], files=recipe.large)


def test_sealed_files_open_for_their_job_and_digest_alone() -> None:
    key, digest = bytes(32), hashlib.sha256(b"12").hexdigest()
    with SealedMemory.of(b"12") as data:
        sealed = seal_file_of_job(data, digest, key, JOB, random=bytes)
    for job, sha256, size, other in (
        (f"{JOB}x", digest, 2, key),
        (JOB, "0" * 64, 2, key),
        (JOB, digest, 1, key),
        (JOB, digest, 3, key),
        (JOB, digest, 2, bytes([1] * 32)),
    ):
        with pytest.raises(SealedDataRefused):
            open_file_of_job(sealed, sha256, size, other, job)
    with open_file_of_job(sealed, digest, 2, key, JOB) as opened:
        assert bytes(opened.view) == b"12"


def test_malformed_lists_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(SCRIPT)
    (file,) = recipe.settings.files

    def changed(*files: dict[str, object]) -> Bundle:
        document = recipe.settings.model_dump() | {"files": files}
        return make_bundle(tmp_path, type(recipe.settings).model_validate(document))

    one = file.model_dump()
    for files in (
        [one | {"path": "../x"}],
        [one | {"path": "client.py"}],
        [one | {"path": "client.py/x"}],
        [one, one],
        [one | {"path": "b"}, one | {"path": "a"}],
        [one | {"size": MAX_BYTES + 1}],
        [one | {"path": "a", "size": MAX_BYTES}, one | {"path": "b"}],
        [one | {"sha256": "0" * 63}],
        [one | {"mode": 0o777}],
    ):
        with pytest.raises((RecipeUnusable, ValueError)):
            changed(*files)
    assert changed(one).settings.files == (file,)


def test_a_sandbox_has_it_once_and_as_often_as_it_is_started() -> None:
    script = b"import hashlib; print(hashlib.sha256(open('/bundle/a/large', 'rb').read()).hexdigest())"
    raw = np.random.default_rng(1).bytes(1 << 20)
    with SealedMemory.of(raw) as memory:
        sandbox = Sandbox({"client.py": script}, "client.py", large={"a/large": memory})
        for _ in range(2):
            with sandbox.start() as process:
                outcome = process.wait(60)
            assert outcome is not None
            assert outcome.log.decode().strip() == hashlib.sha256(raw).hexdigest()
