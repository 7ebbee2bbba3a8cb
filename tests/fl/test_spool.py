"""The encrypted spool: what lies on its disk says nothing, and what was changed there is refused.

Whoever has the disk is played by this process itself: spool files have no name, and are found by their descriptors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, make_job
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobFailed, MalformedMessage, SealedDataRefused, SpoolFailed, UpdateRefused
from fl.guard.gate import admit_update
from fl.model import ParamsType, schema_of, tensors_of
from fl.server.federation import Federation, Task
from fl.server.job_store import JobStore
from fl.tensors import BLOCK, encode
from fl.transport import spool as spools
from fl.transport.chunks import Assembly, assemble, serve_chunks
from fl.transport.drafts import ModelDraft
from fl.transport.frames import CHUNK
from fl.transport.memory import SealedMemory
from fl.transport.spool import PIECE, TAG, Spool, SpoolDraft, Spooled

RANDOM = np.random.default_rng(3)
MODEL = {
    "big": RANDOM.standard_normal(2 * BLOCK + 17).astype(np.float32),
    "double": RANDOM.standard_normal((3, 5)),
    "half": RANDOM.standard_normal(BLOCK + 1).astype(np.float16),
    "none": np.zeros((0, 4), dtype=np.float32),
    "whole": RANDOM.integers(-9, 9, 100),
}
MARK = 0x5EA15EA1
"""A number that nothing else here has in its bytes."""


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, in_memory=0)


def spooled(spool: Spool, data: bytes) -> Spooled:
    draft = SpoolDraft(spool, len(data))
    draft.write(0, data)
    return draft.seal()


def disks(folder: Path) -> list[Path]:
    """This process's spool files in `folder`, as whoever has the disk finds them."""
    found = []
    for link in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            target = str(link.readlink())
            if target.startswith(f"{folder}/") and target.endswith("(deleted)"):
                found.append(link)
    return found


def contents(disk: Path) -> bytes:
    """What is on a disk; nothing if it has gone in the meantime."""
    with suppress(OSError):
        return disk.read_bytes()
    return b""


def overwrite(disk: Path, data: bytes, at: int) -> None:
    with suppress(FileNotFoundError), disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, at)


@mock.patch.object(spools, "PIECE", 64)
@given(st.data())
def test_what_is_written_in_any_pieces_is_read_in_any_ranges(data: st.DataObject) -> None:
    spool = Spool(Path("/tmp"), in_memory=0)  # noqa: S108 - hypothesis and a folder of a test do not go together
    size = data.draw(st.integers(1, 300))
    whole = np.random.default_rng(size).bytes(size)
    draft, at = SpoolDraft(spool, size), 0
    while at < size:
        taken = data.draw(st.integers(1, size - at))
        draft.write(at, whole[at : at + taken])
        at += taken
    with draft.seal() as found:
        assert found.view == whole
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start, size))
        assert found.read(start, stop) == whole[start:stop]
        step = data.draw(st.integers(1, size))
        assert b"".join(found.pieces(start, step)) == whole[start:]


def test_nothing_of_it_is_on_the_disk_in_clear(spool: Spool, tmp_path: Path) -> None:
    mark = b"marked bytes" * 8
    with spooled(spool, mark * 30_000) as found:
        (disk,) = disks(tmp_path)
        assert len(contents(disk)) > found.size
        assert mark not in contents(disk)
        assert not list(tmp_path.iterdir())
    assert not disks(tmp_path)


@pytest.mark.parametrize("attack", ["flip", "cut", "swap", "another file's", "older"])
def test_what_was_changed_on_the_disk_is_refused(spool: Spool, tmp_path: Path, attack: str) -> None:
    data = os.urandom(3 * PIECE)
    with spooled(spool, data) as found, spooled(spool, data) as other:
        disk, second = disks(tmp_path)
        raw = contents(disk)
        room = PIECE + TAG
        if attack == "flip":
            overwrite(disk, bytes([raw[room + 9] ^ 1]), room + 9)
        elif attack == "cut":
            os.truncate(disk, room + 100)
        elif attack == "swap":
            overwrite(disk, raw[2 * room :] + raw[room : 2 * room], room)
        elif attack == "another file's":
            overwrite(disk, contents(second)[room : 2 * room], room)
        else:
            file = spool.file()
            file.write(0, b"older")
            (third,) = set(disks(tmp_path)) - {disk, second}
            older = contents(third)
            file.write(0, b"newer")
            overwrite(third, older, 0)
            with pytest.raises(SpoolFailed, match="changed on its disk"):
                file.read(0)
            file.close()
            return
        with pytest.raises(SpoolFailed, match="changed on its disk"):
            found.view.release()
        assert other.view == data


def test_a_file_goes_with_the_last_who_shares_it(spool: Spool, tmp_path: Path) -> None:
    found = spooled(spool, b"shared")
    again = found.share()
    found.close()
    assert again.view == b"shared"
    again.close()
    assert not disks(tmp_path)


def test_a_mean_in_the_spool_is_the_one_in_memory_bit_for_bit(spool: Spool) -> None:
    schema = schema_of(tensors_of(MODEL))
    updates = [
        encode(tensors_of({name: (array * factor).astype(array.dtype) for name, array in MODEL.items()}))
        for factor in (1, -2, 3)
    ]
    for kind in (ParamsType.FULL, ParamsType.DIFF):
        found = []
        for place in (None, spool):
            mean = WeightedMean(schema, kind, place)
            with assemble(serve_chunks(updates[0]), size=len(updates[0]), sha256=None, where="t", spool=place) as model:
                for round_ in range(2):
                    for weight, update in enumerate(updates, 1):
                        with Assembly(len(update), where="t", spool=place) as assembly:
                            assembly.take(serve_chunks(update))
                            with assembly.seal() as whole:
                                mean.fold(admit_update(whole.source, schema, site="t"), weight + round_)
                    with mean.result(model.tensors()) as result:
                        assert isinstance(result, SealedMemory if place is None else Spooled)
                        found.append((result.digest, bytes(result.view)))
            mean.close()
        assert found[:2] == found[2:]


def test_a_transfer_into_the_spool_goes_on_after_a_cut(spool: Spool) -> None:
    data = os.urandom(3 * CHUNK + 5)
    with Assembly(len(data), where="t", spool=spool) as assembly:
        frames = list(serve_chunks(data))
        assembly.take(frames[:2])
        with pytest.raises(MalformedMessage, match="damaged"):
            assembly.take([frames[2][:-1] + b"\0"] if frames[2][-1] else [frames[2][:-1] + b"\1"])
        assembly.take(serve_chunks(data, assembly.at))
        with assembly.seal() as whole:
            assert isinstance(whole, Spooled)
            assert whole.view == data


class Played:
    """A site that is given tasks and does nothing of itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def give(self, task: Task) -> None:
        pass

    def end(self, why: str) -> None:
        pass


def federation(spool: Spool) -> Federation:
    found = Federation(
        "job-1",
        schema_of(tensors_of(MODEL)),
        ParamsType.FULL,
        min_sites=1,
        round_seconds=20,
        observe=lambda _: None,
        spool=spool,
    )
    for name in ("a", "b"):
        found.join(Played(name))  # type: ignore[arg-type]
    return found


def test_a_late_nan_and_a_duplicate_pollute_nothing(spool: Spool, tmp_path: Path) -> None:
    sites = federation(spool)
    good = encode(tensors_of(MODEL))
    bad = {**MODEL, "big": MODEL["big"].copy()}
    bad["big"][-1] = np.nan
    polluted = encode(tensors_of(bad))
    mean = sites.aggregation()
    fields = {"params_type": ParamsType.FULL, "weight": 1.0, "metrics": {}}

    def answer() -> None:
        with pytest.raises(UpdateRefused, match="NaN"):
            sites.submit("b", 0, spooled(spool, polluted), **fields)
        sites.submit("a", 0, spooled(spool, good), **fields)
        with pytest.raises(UpdateRefused, match=r"counts once|round that is on"):
            sites.submit("a", 0, spooled(spool, good), **fields)

    with spooled(spool, good) as model:
        answers: threading.Thread | None = None
        rounds = sites.train(Task(0, 1, model))
        answers = threading.Timer(0.1, answer)
        answers.start()
        for update in rounds:
            mean.fold(update.tensors, update.weight, update.site)
            update.close()
        answers.join()
        with mean.result(model.tensors()) as result:
            assert result.view == good
    mean.close()
    assert not disks(tmp_path)


def test_an_update_that_was_changed_in_the_spool_ends_the_job(spool: Spool, tmp_path: Path) -> None:
    sites = federation(spool)
    update = spooled(spool, encode(tensors_of(MODEL)))
    (disk,) = disks(tmp_path)
    overwrite(disk, b"host", 100)

    def answer() -> None:
        with pytest.raises(SpoolFailed):
            sites.submit("a", 0, update, params_type=ParamsType.FULL, weight=1.0, metrics={})

    answers = threading.Timer(0.1, answer)
    with SealedMemory.of(encode(tensors_of(MODEL))) as model:
        answers.start()
        with pytest.raises(JobFailed, match="changed on its disk"):
            list(sites.train(Task(0, 1, model)))
    answers.join()


def test_a_full_or_missing_disk_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(SpoolFailed, match="cannot be used: No such file"):
        ModelDraft(10, Spool(gone, in_memory=0))
    with pytest.raises(SpoolFailed, match="cannot be used: No such file"):
        assert Spool(gone).free


TRAIN = """
import numpy as np
from fl import client as flare

flare.init()
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.int32(1)}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@contextmanager
def two_sites(world: FederationWorld, address: str) -> Iterator[None]:
    with world.site(address, SITES[0]), world.site(address, SITES[1]):
        yield


def test_a_model_that_is_too_large_for_memory_is_trained_and_never_in_clear_on_a_disk(
    world: FederationWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "MEMORY_PART", 1 << 62)
    state = tmp_path / "vault"
    mark = np.full(4, MARK, dtype=np.int32).tobytes()
    bundle, model = make_job(
        tmp_path, TRAIN, initial_model={"w": np.full(600_000, MARK - 2, dtype=np.int32)}, num_rounds=3
    )
    world.approve(bundle)
    spooled_bytes = 0
    with world.server(state=state) as address, model, two_sites(world, address), world.client(address) as client:
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        for _ in client.watch(job, timeout=60):
            for disk in disks(state):
                raw = contents(disk)
                spooled_bytes += len(raw)
                assert mark not in raw
            for path in state.iterdir():
                assert mark not in (path.read_bytes() if path.exists() else b"")
        folder = client.download(job, tmp_path / "result", ledgers=None)
    assert spooled_bytes > model.size
    assert (load_file(folder / "model.safetensors")["w"] == MARK + 1).all()


def test_a_job_whose_model_was_changed_in_the_spool_fails_and_says_so(
    world: FederationWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "MEMORY_PART", 1 << 62)
    state = tmp_path / "vault"
    bundle, model = make_job(tmp_path, TRAIN, initial_model={"w": np.zeros(600_000, dtype=np.int32)}, num_rounds=3)
    world.approve(bundle)
    with world.server(state=state) as address, model, two_sites(world, address), world.client(address) as client:
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        for event in client.watch(job, timeout=60):
            if event.kind == "round":
                for disk in disks(state):
                    overwrite(disk, b"the host was here", 1 << 20)
        report = client.report(job)
    assert report.status.value == "failed"
    assert "changed on its disk" in "".join([*report.reasons, *report.sites.values(), *world.told])


def test_a_kept_round_is_read_back_into_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MEMORY_PART", 1 << 62)
    store = JobStore(tmp_path, bytes(32), lambda _: None)
    model = encode(tensors_of(MODEL))
    with spooled(store.spool, model) as kept:
        store.write_round("job-1", {"index": b"{}", "model": kept, "state": encode({})})
    found = store.read_round("job-1")
    assert found is not None
    assert {name: bytes(entry.view) for name, entry in found.items()} == {
        "index": b"{}",
        "model": model,
        "state": encode({}),
    }
    assert isinstance(found["model"], Spooled)
    (path,) = tmp_path.glob("*.round")
    raw = path.read_bytes()
    for changed in (raw[:-1], raw + b"\0", raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]):
        path.write_bytes(changed)
        with pytest.raises(SealedDataRefused):
            store.read_round("job-1")
