"""The lock of a bundle: made from what is installed, read strictly, and refused where other packages are."""

from __future__ import annotations

import hashlib
import string
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rfc8785
from federation_world import SITES, FederationWorld, found_federation, make_job
from hypothesis import given, settings
from hypothesis import strategies as st

from fl import FedAvgRecipe, SimEnv
from fl.errors import MalformedMessage, RecipeUnusable
from fl.jobs.bundle import Bundle, make_bundle, parse_bundle
from fl.jobs.imports import imports_of
from fl.jobs.lock import LOCK_FILE, Locked, differences, lock_reasons, lock_text, make_lock, own_lock, parse_lock
from fl.jobs.packages import Build, Packages, packages_here
from fl.jobs.review import review
from fl.jobs.settings import Filters, JobSettings, TensorSettings
from policies.errors import Refused

ADA = "acme-pharma/ada"
BUILDS = {"numpy": Build("cp311-linux", "1" * 64)}
HERE = Packages(
    {"numpy": "2.4.6", "torch": "2.13.0+cpu", "sympy": "1.14.0", "mpmath": "1.3.0", "pyyaml": "6.0.3"},
    {"numpy": ["numpy"], "torch": ["torch"], "sympy": ["sympy"], "yaml": ["pyyaml"]},
    BUILDS.get,
    lambda name: {"torch": ["sympy"], "sympy": ["mpmath"]}.get(name, []),
)
JOB = JobSettings(
    name="trial",
    recipe="fedavg",
    num_rounds=1,
    min_clients=1,
    train_script="client.py",
    framework="numpy",
    model={"w": TensorSettings(dtype="F32", shape=(3,))},
)
CODE = {
    "client.py": b"import os, numpy as np\nfrom helper import train\nfrom fl import client\n",
    "helper.py": b"def train():\n    import torch.nn\n    import absent\n",
    "plots.py": b"import matplotlib\n",
}


def test_a_lock_names_what_the_code_imports_and_what_that_needs() -> None:
    assert make_lock(CODE, JOB, HERE).decode().splitlines()[1:] == [
        "mpmath==1.3.0  # needed",
        f"numpy==2.4.6  # imported, cp311-linux sha256:{'1' * 64}",
        "sympy==1.14.0  # needed",
        "torch==2.13.0  # imported",
    ]


def test_only_what_a_script_leads_to_is_read() -> None:
    files = {
        "a/client.py": b"import net\nfrom . import own\ntry:\n    import yaml\nexcept ImportError:\n    pass\n",
        "a/net/__init__.py": b"from .deep import x\n",
        "a/net/deep.py": b"import numpy\n",
        "net.py": b"import torch\n",
        "broken.py": b"import (\n",
    }
    found = {(one.module, one.certain) for one in imports_of(files, ["a/client.py", "broken.py", "graph.pt"])}
    assert found == {("numpy", True), ("yaml", False)}


def test_a_filter_s_module_counts_as_imported() -> None:
    files = {"client.py": b"", "clip.py": b"import yaml\n"}
    assert parse_lock(make_lock(files, JOB, HERE)) == {}
    filtered = JOB.model_copy(update={"filters": Filters(send=("clip:clip",))})
    assert list(parse_lock(make_lock(files, filtered, HERE))) == ["pyyaml"]


def test_an_import_of_nothing_makes_no_bundle_unless_it_is_tried() -> None:
    with pytest.raises(RecipeUnusable, match=r"client.py, line 2, imports absent, which is not in the bundle"):
        make_lock({"client.py": b"\nimport absent\n"}, JOB, HERE)
    tried = b"try:\n    import absent\nexcept ImportError:\n    absent = None\n"
    assert parse_lock(make_lock({"client.py": tried}, JOB, HERE)) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"versions": {**HERE.versions, "numpy": "2.4.7"}}, "the job's code wants numpy==2.4.6; here is 2.4.7"),
        ({"versions": {**HERE.versions, "mpmath": "1.4.0"}}, "the job's code wants mpmath==1.3.0; here is 1.4.0"),
        ({"versions": {"numpy": "2.4.6"}}, "the job's code wants torch==2.13.0, which is not installed here"),
        ({"build": {"numpy": Build("cp311-linux", "2" * 64)}.get}, "numpy 2.4.6 is here with other contents"),
        ({"providers": {**HERE.providers, "torch": ["torch", "evil"]}}, "imports torch of evil, which the lock does"),
    ],
)
def test_what_another_place_has_else_is_told(changes: dict[str, object], reason: str) -> None:
    files = {**CODE, LOCK_FILE: make_lock(CODE, JOB, HERE)}
    assert list(lock_reasons(files, JOB, HERE)) == []
    (told,) = lock_reasons(files, JOB, replace(HERE, **changes))  # type: ignore[arg-type]
    assert reason in told


def test_another_build_of_the_same_version_will_do() -> None:
    """A local label is no other version, a wheel for another platform is no other package, and what only the build
    of the author's machine needs may be missing."""
    files = {**CODE, LOCK_FILE: make_lock(CODE, JOB, HERE)}
    versions = {"numpy": "2.4.6", "torch": "2.13.0+cu130"}
    other = replace(HERE, versions=versions, build=lambda name: Build("cp313-linux", "3" * 64))
    assert list(lock_reasons(files, JOB, other)) == []


def test_an_author_s_range_stays_and_what_it_needs_is_not_locked() -> None:
    own = own_lock(b"numpy>=2.2,<3  # imported\ntorch>=2.6,<3  # imported\nunused==1  # imported\n")
    raw = make_lock(CODE, JOB, HERE, own)
    assert raw.decode().splitlines()[1:] == ["numpy>=2.2,<3  # imported", "torch>=2.6,<3  # imported"]
    files = {**CODE, LOCK_FILE: raw}
    for version, holds in {"2.6.0+debian": True, "2.6": True, "2.5.9": False, "3.0": False, "2.7.0rc1": False}.items():
        there = replace(HERE, versions={**HERE.versions, "torch": version})
        assert (list(lock_reasons(files, JOB, there)) == []) is holds, version


def test_an_author_s_lock_that_does_not_hold_makes_no_bundle_and_no_simulation(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_bytes(b"import numpy\n")
    (tmp_path / LOCK_FILE).write_bytes(b"numpy==1.0.0  # imported\n")
    import numpy as np

    recipe = FedAvgRecipe(
        name="trial", initial_model={"w": np.zeros(1)}, min_clients=1, train_script=str(tmp_path / "client.py")
    )
    wrong = r"does not hold: the job's code wants numpy==1.0.0; here is"
    with pytest.raises(RecipeUnusable, match=wrong):
        recipe.bundle()
    with pytest.raises(RecipeUnusable, match=wrong):
        recipe.execute(SimEnv(num_clients=1, workspace_root=tmp_path / "runs"))
    (tmp_path / LOCK_FILE).write_bytes(b"numpy 1.0.0\n")
    with pytest.raises(RecipeUnusable, match=r"own requirements.lock is malformed: line 1"):
        recipe.bundle()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"numpy==2.4.6", "no end"),
        (b"numpy==2.4.6\n", "line 1 is no"),
        (b"numpy==2.4.6 --index-url=http://x  # imported\n", "line 1 is no"),
        (b"numpy @ file:///tmp/x  # imported\n", "line 1 is no"),
        (b"-r other.txt\n", "line 1 is no"),
        (b"numpy==2.4.6  # imported\nnumpy==2.4.7  # imported\n", "not after the line before"),
        (b"torch==1  # imported\nnumpy==1  # imported\n", "not after the line before"),
        (b"numpy>=2  # imported\n", "line 1 is no"),
        (b"numpy>=2,<3  # imported, cp311 sha256:" + b"0" * 64 + b"\n", "a range names no wheel"),
        ("numpy==2.4.6  # imported\u2028".encode() + b"\n", "not ASCII"),
        (b"#" * (256 << 10) + b"\n", "more than"),
        (b"".join(b"p%d==1  # needed\n" % number for number in range(1000, 2001)), "more than 1000 lines"),
    ],
)
def test_anything_else_is_no_lock(raw: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        parse_lock(raw)


NAMES = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
RELEASES = st.lists(st.integers(0, 99), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
LINES = st.builds(
    lambda name, ends, exact, why: Locked(
        name, ends[0] if exact else None, None if exact else ends[0], None if exact else ends[1], why
    ),
    NAMES,
    st.tuples(RELEASES, RELEASES),
    st.booleans(),
    st.sampled_from(["imported", "needed"]),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, LINES, max_size=6), st.binary(max_size=60))
def test_a_lock_is_read_as_it_was_written(lines: dict[str, Locked], junk: bytes) -> None:
    lock = {one.name: one for one in lines.values()}
    text = lock_text(lock.values())
    assert parse_lock(text) == lock
    assert lock_text(parse_lock(text).values()) == text
    try:
        read = parse_lock(junk)
    except MalformedMessage:
        return
    assert all(line.startswith(b"#") for line in junk.splitlines()) or read


def test_the_lock_of_this_place_is_true_and_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_bytes(b"import numpy\nimport yaml\n")
    bundle, model = make_job(tmp_path, "import numpy\nimport torch\n")
    model.close()
    lock = parse_lock(bundle.files[LOCK_FILE])
    assert {"numpy", "torch", "sympy", "mpmath"} <= set(lock)
    assert lock["numpy"].build is not None
    assert lock["sympy"].why == "needed"
    assert make_bundle(tmp_path / "code", bundle.settings).digest == bundle.digest
    assert list(lock_reasons(bundle.files, bundle.settings, packages_here())) == []


def test_a_review_shows_the_lock_and_what_changed_in_it(tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, "import numpy\n")
    model.close()
    older = replace(packages_here(), versions={**packages_here().versions, "numpy": "2.0.0"}, build=lambda _: None)
    before = make_bundle(tmp_path / "code", bundle.settings, packages=older)
    assert [line.split("==")[0] for line in review(before).lock] == ["numpy"]
    (line,) = review(bundle, before).lock
    assert line.startswith("numpy: ==2.0.0 (imported) → ==")
    assert review(bundle, bundle).lock == ()
    assert list(differences({}, parse_lock(before.files[LOCK_FILE]))) == ["numpy: ==2.0.0 (imported) → none"]
    assert "malformed" in review(relocked(bundle, b"numpy\n")).lock[0]
    assert "no requirements.lock" in review(relocked(bundle, None)).lock[0]


# --- at server and sites ----------------------------------------------------------------------------------------------


def relocked(bundle: Bundle, lock: bytes | None) -> Bundle:
    """The bundle with another lock, or none, and a manifest that fits it: as someone makes it by hand."""
    files = {name: data for name, data in bundle.files.items() if name != LOCK_FILE}
    files |= {} if lock is None else {LOCK_FILE: lock}
    names = sorted(files)
    manifest = {
        "version": 1,
        "files": [
            {"path": name, "sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
            for name in names
        ],
        "job": bundle.settings.model_dump(mode="json"),
    }
    text = rfc8785.dumps(manifest)
    head = struct.pack(">8sII", b"SEALBNDL", 1, len(text))
    return parse_bundle(head + text + b"".join(files[name] for name in names))


ATTACKS = [
    (b"numpy==1.26.0  # imported\n", "the job's code wants numpy==1.26.0; here is"),
    (b"numpy\n", "the bundle's requirements.lock is malformed: line 1"),
    (b"", "imports numpy of numpy, which the lock does not name"),
    (None, "the bundle has no requirements.lock"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize(("lock", "reason"), ATTACKS)
def test_an_approved_bundle_with_a_lock_that_does_not_hold_starts_nowhere(
    world: FederationWorld,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lock: bytes | None,
    reason: str,
    honest: bool,
) -> None:
    """At the server; and at each site, whatever the server lets pass."""
    if not honest:
        monkeypatch.setattr("fl.server.job.check_lock", lambda *_: None)
    monkeypatch.setattr("fl.server.job.JOIN_SECONDS", 1.0)
    made, model = make_job(tmp_path, "import numpy\nfrom fl import client\n", num_rounds=1, min_clients=1)
    bundle = relocked(made, lock)
    world.approve(bundle)
    with model, world.site(server, SITES[0]), world.client(server) as client:
        job = client.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
        assert [event.text for event in client.watch(job, timeout=30)][-1] == "failed"
        report = client.report(job)
        with pytest.raises(Refused):
            client.download(job, tmp_path / "result", ledgers=None)
    assert reason in (" ".join(report.reasons) if honest else report.sites[SITES[0]])
    taken = [entry["job"] for kind, entry in world.ledger if kind == "job" and entry["event"] == "taken"]
    assert job not in taken
    started = [entry["job"] for kind, entry in world.ledger if kind == "job" and entry["event"] == "started"]
    assert (job in started) is not honest
