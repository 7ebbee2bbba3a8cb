"""What a reviewer is shown, what members sign, and that nothing but what they signed can be made to run."""

from __future__ import annotations

import ast
import io
import json
import pickle
import struct
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
import torch
from federation_world import SITES, FederationWorld, found_federation, make_job, now, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.cli import main
from fl.errors import MalformedMessage, MalformedTensors, RecipeUnusable
from fl.guard.sandbox import Sandbox
from fl.jobs.bundle import Bundle, make_bundle, parse_bundle
from fl.jobs.outputs import Outputs, capacity
from fl.jobs.review import findings_in, review
from fl.tensors import parse
from fl.transport.frames import FROM_ATTENDING_SITE, TO_ATTENDING_SITE, pack, unpack
from policies.charter import Charter, files_of, load_charter, read_store, write_store
from policies.charter.making import Changes
from policies.documents import BundleApproval
from policies.errors import Refused
from policies.keys import private_pem, write_secret

ROOT = Path(__file__).parents[2]
CLIENT = """
import subprocess, pickle, socket
from fl import client as flare
open("/etc/passwd")
getattr(flare, "in" + "it")()
eval("1 + 1")
subprocess.run(["true"], shell=True)
password = "correct-horse-battery-4711"
"""


def bundle_of(folder: Path, files: dict[str, bytes | str], **changes: Any) -> Bundle:
    folder.mkdir()
    for name, content in {"client.py": "pass\n", **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    from fl import FedAvgRecipe

    recipe = FedAvgRecipe(
        name="trial", initial_model={"w": np.zeros(3, dtype=np.float32)}, min_clients=1, num_rounds=2,
        train_script=str(folder / "client.py"),
    )  # fmt: skip
    recipe.settings = recipe.settings.model_copy(update=changes)
    return make_bundle(folder, recipe.settings)


def test_a_review_shows_what_code_reaches_for(tmp_path: Path) -> None:
    found = review(
        bundle_of(tmp_path / "a", {"client.py": CLIENT, "numpy.py": "", "w.pt": b"\x80\x04x", "x.so": b"\x7fELF"})
    )
    seen = {(one.kind, one.file, one.what) for one in found.findings}
    for expected in (
        ("process", "client.py", "imports subprocess"),
        ("serialised", "client.py", "imports pickle"),
        ("network", "client.py", "imports socket"),
        ("file", "client.py", "calls open"),
        ("reflection", "client.py", "calls getattr"),
        ("reflection", "client.py", "calls eval"),
        ("import", "client.py", "imports fl"),
        ("shadows", "numpy.py", "is imported in place of the module numpy"),
        ("serialised", "w.pt", "a serialised object or archive: loading it may run what is in it"),
        ("native", "x.so", "native code, which no reader of Python sees into"),
    ):
        assert expected in seen
    assert any(kind == "bandit" and what.startswith("B602") for kind, _, what in seen), "bandit has not spoken"
    assert any(kind == "secret" for kind, _, _ in seen), "detect-secrets has not spoken"
    assert review(bundle_of(tmp_path / "b", {})).findings == ()


def test_a_comment_silences_nobody(tmp_path: Path) -> None:
    found = review(bundle_of(tmp_path / "a", {"client.py": "eval('1')  # nosec\n"}))
    assert any(one.kind == "bandit" for one in found.findings)


def test_a_difference_names_files_lines_and_settings(tmp_path: Path) -> None:
    old = bundle_of(tmp_path / "a", {"client.py": "one = 1\n", "gone.py": "x = 1\n"})
    new = bundle_of(tmp_path / "b", {"client.py": "one = 2\n", "new.py": ""}, num_rounds=5)
    found = review(new, old)
    assert (found.added, found.removed, found.changed) == (("new.py",), ("gone.py",), ("client.py",))
    assert "-one = 1\n+one = 2\n" in found.difference
    assert "num_rounds: 2 → 5" in found.settings


def test_capacity_counts_what_is_declared(tmp_path: Path) -> None:
    narrow = Outputs(metrics=(), values=0, bits=4, limit=1.0)
    declared, open_ = (
        capacity(bundle_of(tmp_path / name, {}, outputs=outputs)) for name, outputs in (("a", narrow), ("b", Outputs()))
    )
    assert (declared.tensors, open_.tensors) == (3 * 4, 3 * 32)
    assert declared.metrics == declared.values == 0
    assert open_.metrics > 64 * 128
    assert declared.job == declared.a_round * 2 + declared.ending


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_file_is_looked_at(raw: bytes) -> None:
    assert all(one.file == "x.py" for one in findings_in("x.py", raw))


def command(*words: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == status


def test_members_approve_reject_and_revoke_by_the_charter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "world").mkdir()
    world = found_federation(tmp_path / "world")
    root = tmp_path / "root.json"
    root.write_bytes(world.store["metadata/1.root.json"])
    folder = tmp_path / "charter"
    write_store(folder, world.store)
    bundle = bundle_of(tmp_path / "code", {"client.py": CLIENT})
    (tmp_path / "job.bundle").write_bytes(bundle.raw)
    keys = {name: tmp_path / f"{name}.key" for name in world.member_keys}
    for name, key in world.member_keys.items():
        write_secret(keys[name], private_pem(key))
    write_secret(tmp_path / "broker.key", private_pem(world.broker_key))

    def decide(*words: object) -> Charter:
        proposal = tmp_path / "proposal.json"
        command("charter", *words, "--out", proposal, "--trust", root)
        for name in ("acme-pharma", "cygnus-bio"):
            command("charter", "sign", proposal, "--key", keys[name], "--trust", root, "--yes")
        command(
            "charter", "publish", proposal, "--to", folder, "--broker-key", tmp_path / "broker.key", "--trust", root
        )
        return load_charter(read_store(folder), root.read_bytes(), now())

    charter = decide("approve", folder, tmp_path / "job.bundle", "--jobs", 3, "--days", 30, "--note", "read by two")
    approval = charter.bundle(bundle.digest)
    assert approval is not None
    assert approval.budget is not None
    assert (approval.sites, approval.note, approval.budget.bits) == (SITES, "read by two", 3 * capacity(bundle).job)
    assert "letting out at most" in capsys.readouterr().out
    command("job", "review", tmp_path / "job.bundle", "--charter", folder, "--trust", root)
    told = capsys.readouterr().out
    assert "(approved: read by two)" in told
    assert "process     client.py:2  imports subprocess" in told
    assert "no promise about single records" in told
    command("job", "review", tmp_path / "job.bundle", "--charter", folder, "--trust", root, "--json")
    assert json.loads(capsys.readouterr().out)["capacity"]["job"] == capacity(bundle).job

    assert decide("revoke", folder, bundle.digest).bundle(bundle.digest) is None
    charter = decide("reject", folder, tmp_path / "job.bundle", "--note", "reads /etc/passwd")
    assert charter.bundle(bundle.digest) is None
    verdict = charter.verdict(bundle.digest)
    assert verdict is not None
    assert (verdict.verdict, verdict.note) == ("rejected", "reads /etc/passwd")
    command(
        "job", "review", tmp_path / "job.bundle", "--against", tmp_path / "job.bundle", "--charter", folder, status=1
    )
    command("charter", "revoke", folder, "0" * 64, "--out", tmp_path / "x", "--trust", root, status=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


SLOW = """
import time
from fl import client as flare
flare.init()
flare.receive()
print("training")
time.sleep(120)
"""


def test_revoking_ends_a_job_in_the_middle_of_a_round(world: FederationWorld, tmp_path: Path) -> None:
    """Its scripts are asleep for two minutes: they are ended as soon as the site follows the new charter."""
    bundle, model = make_job(tmp_path, SLOW, name="slow", round_seconds=300)
    world.approve(bundle)
    sites = world.site
    with (
        world.server() as server,
        sites(server, SITES[0]),
        sites(server, SITES[1]),
        model,
        world.client(server) as client,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        assert wait_until(lambda: client.report(job).round == 0, 30)
        time.sleep(0.5)
        begun = time.monotonic()
        world.change(Changes(remove=frozenset({f"code/{bundle.digest}.json"})))
        last = [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]
        assert last == "failed"
        assert time.monotonic() - begun < 60
        told = " | ".join(client.report(job).sites.values())
        assert "is not approved in charter version" in told
        assert "training script" not in told


def test_a_rejected_bundle_does_not_run_and_says_why(world: FederationWorld, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, name="unwanted")
    world.approve(bundle)
    with world.server() as server, world.client(server) as client, model:
        rejection = BundleApproval(
            bundle=bundle.digest, job="unwanted", sites=SITES, note="sends too much", verdict="rejected",
            expires=now().replace(year=now().year + 1),
        )  # fmt: skip
        world.change(Changes(put=files_of([rejection])))
        with pytest.raises(Refused, match="was rejected: sends too much"):
            client.submit(bundle, model, roster=SITES, recipients=["acme-pharma/ada"])


# --- ways of running other code, as security notes and advisories of such systems know them ---------------------------


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def torchscript() -> bytes:
    target = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), target)
    return target.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serialised_objects_are_no_models(tmp_path: Path) -> None:
    """A pickle, torch's own files and TorchScript in a model's place: refused by their bytes, and nothing runs."""
    mark = tmp_path / "mark"
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, saved)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", pickle.dumps(Bomb(mark)))
    for raw in (pickle.dumps(Bomb(mark)), saved.getvalue(), torchscript(), archive.getvalue()):
        with pytest.raises(MalformedTensors):
            parse(raw, max_size=1 << 20)
    header = json.dumps({"w": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 1]}}).encode()
    with pytest.raises(MalformedTensors, match="dtype that may not travel"):
        parse(struct.pack("<Q", len(header)) + header + b"x", max_size=1 << 20)
    assert not mark.exists()


def test_no_message_names_a_type_or_a_function() -> None:
    """FOBS-like envelopes: a field that names a decomposer, a class or a callable is an unknown field."""
    for more in (
        {"__fobs_type__": "os.system"}, {"__type__": "builtins.eval"}, {"py/object": "subprocess.Popen"},
        {"__fobs_dc__": "nvflare.app_common.decomposers"}, {"class_path": "os.system", "args": ["true"]},
    ):  # fmt: skip
        for adapter, plain in (
            (FROM_ATTENDING_SITE, {"kind": "ready", "job": "x"}),
            (TO_ATTENDING_SITE, {"kind": "finish", "job": "x", "why": ""}),
        ):
            text = json.dumps({**plain, **more}).encode()
            with pytest.raises(MalformedMessage, match="malformed"):
                unpack(adapter, struct.pack(">I", len(text)) + text, where="test")
            text = json.dumps(plain).encode()
            assert unpack(adapter, struct.pack(">I", len(text)) + text, where="test")[0].kind == plain["kind"]
    assert pack.__module__ == "fl.transport.frames"


def test_our_own_code_has_no_loader_of_code() -> None:
    """Nothing in the packages that guests run unpickles, evaluates or loads objects: there is nothing to be abused."""
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load",
                 "pickle.loads", "pickle.load", "marshal.loads", "os.system", "os.popen", "np.load"}  # fmt: skip
    for path in sorted(
        [*(ROOT / "fl").rglob("*.py"), *(ROOT / "attestation").rglob("*.py"), ROOT / "appliance/node.py"]
    ):
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(modules), name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                plain = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
                if called == "np.load" and plain:
                    continue
                assert called not in forbidden, f"{name}:{node.lineno} calls {called}"
                assert not any(k.arg == "shell" for k in node.keywords), f"{name}:{node.lineno}"


def test_arguments_are_words_and_never_a_shell_s() -> None:
    """Injection into a command: what a recipe gives as arguments reaches the script as those very words."""
    words = ["; touch /scratch/x", "$(touch /scratch/x)", "`id`", "a\nb", "--", "-c", "import os", "|", ">x", "é"]
    script = b"import json, os, sys\nprint(json.dumps([sys.argv[1:], sorted(os.listdir('/scratch'))]))"
    with Sandbox({"s.py": script}, "s.py", words).start() as process:
        outcome = process.wait(20)
    assert outcome is not None
    given_words, files = json.loads(outcome.log.decode())
    assert given_words == words
    assert "x" not in files


@pytest.mark.parametrize(
    "change",
    [
        {"components": [{"id": "x", "path": "os.system"}]},
        {"executors": [{"executor": {"class_path": "subprocess.Popen"}}]},
        {"class_path": "os.system"},
        {"task_result_filters": []},
        {"train_script": "../outside.py"},
        {"train_script": "/etc/passwd"},
        {"train_script": "not-there.py"},
        {"recipe": "os.system"},
        {"options": {"recipe": "fedprox", "mu": 1.0, "class_path": "x"}},
        {"framework": "pickle"},
    ],
)
def test_settings_name_no_component(tmp_path: Path, change: dict[str, Any]) -> None:
    """Custom components in a job's settings: an unknown field, or a script that is not in the bundle."""
    raw = bundle_of(tmp_path / "a", {}).raw
    (length,) = struct.unpack_from(">I", raw, 12)
    manifest = json.loads(raw[16 : 16 + length])
    manifest["job"].update(change)
    text = rfc8785.dumps(manifest)
    with pytest.raises(MalformedMessage):
        parse_bundle(raw[:12] + struct.pack(">I", len(text)) + text + raw[16 + length :])


def test_what_is_not_listed_is_not_there(tmp_path: Path) -> None:
    raw = bundle_of(tmp_path / "a", {}).raw
    with pytest.raises(MalformedMessage, match="follow the last file"):
        parse_bundle(raw + b"import os")
    with pytest.raises(MalformedMessage, match="not what the manifest says"):
        parse_bundle(raw.replace(b"pass\n", b"evil\n"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "client.py").symlink_to("/etc/passwd")
    with pytest.raises(RecipeUnusable, match="link or no regular file"):
        make_bundle(tmp_path / "b", parse_bundle(raw).settings)


def test_threads_of_watchers_end(world: FederationWorld) -> None:
    assert wait_until(lambda: not any(thread.name.startswith("approval of") for thread in threading.enumerate()), 10)
