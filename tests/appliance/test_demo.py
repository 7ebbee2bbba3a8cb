"""The demonstration, told by real processes: story, attacks and audit, and what happens when it is cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attestation.ledger.audit import verify_audit
from attestation.ledger.audits import verify_audits
from policies.charter import current_charter, read_store
from policies.kits import open_signed_kit

SEAL = [sys.executable, "-m", "appliance.cli"]
STORY_SECONDS = 420
END_SECONDS = 15
"""What the demonstration may take to end when one of its processes is killed."""

ATTACKS = {
    "a site's image differs by one byte": "measurement",
    "init-data names another charter": "another charter",
    "a site asks for the server's place": "server/acme-server is enrolled with other init-data",
    "evidence is replayed from an earlier session": "freshness",
    "another key is put beside evidence": "freshness",
    "a charter has one signature where two are needed": "needs 2 signatures, has 1",
    "a guest may be debugged by its host": "policy-debug",
    "a bundle is changed by one bit after its approval": "is not approved",
    "a job is run once more than its budget allows": "is spent",
    "a job goes on after its code was revoked": "is not approved",
}
"""Every attack of the demonstration, and words of the reason for which it must be refused."""


def seal(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEAL, *words], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demonstration that was told to its end: its folder and its report."""
    folder = tmp_path_factory.mktemp("demo") / "told"
    result = seal("demo", "--out", str(folder), "--json", timeout=STORY_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "report.json").read_text())
    return folder, report


def test_the_federated_model_is_as_good_as_pooled_training(told: tuple[Path, dict[str, Any]]) -> None:
    _, report = told
    assert report["accuracy"] >= 0.94
    assert report["pooled_accuracy"] - report["accuracy"] <= 0.02


def test_every_attack_is_refused_for_its_reason(told: tuple[Path, dict[str, Any]]) -> None:
    _, report = told
    reasons = {attack["attack"]: "; ".join(attack["reasons"]) for attack in report["attacks"]}
    assert set(reasons) == set(ATTACKS)
    assert {name: words in reasons[name] for name, words in ATTACKS.items()} == dict.fromkeys(ATTACKS, True)


def test_the_ledger_tells_who_got_what_on_which_evidence(told: tuple[Path, dict[str, Any]]) -> None:
    _, report = told
    released = {(row["who"], row["what"]) for row in report["decisions"] if row["kind"] == "release"}
    assert released == {
        ("server/acme-server", "acme-pharma/key/model"),
        ("site/borealis-site", "borealis-hospital/key/data"),
        ("site/cygnus-site", "cygnus-bio/key/data"),
    }
    attested = [row for row in report["decisions"] if row["kind"] in {"appraisal", "release"}]
    assert all(row["measurement"] and row["tcb"] and row["platform"] == "virtual" for row in attested)
    assert sum(row["kind"] == "denial" for row in report["decisions"]) >= 6
    deposits = {(row["what"], row["broker"]) for row in report["decisions"] if row["kind"] == "deposit"}
    assert deposits == {
        ("borealis-hospital/key/data", "borealis-broker"),
        ("cygnus-bio/key/data", "cygnus-broker"),
        *(("acme-pharma/key/model", broker) for broker in ("acme-broker", "borealis-broker", "cygnus-broker")),
    }


def test_no_broker_holds_the_model_s_key_whole(told: tuple[Path, dict[str, Any]]) -> None:
    folder, report = told
    split = current_charter(read_store(folder / "shared/charter")).split("acme-pharma/key/model")
    assert split is not None
    assert (split.k, len(split.brokers)) == (2, 3)
    gave = {
        row["broker"]
        for row in report["decisions"]
        if (row["kind"], row["what"]) == ("release", "acme-pharma/key/model")
    }
    assert len(gave) >= 2


def test_every_guest_is_vouched_for_by_each_member_s_broker(told: tuple[Path, dict[str, Any]]) -> None:
    folder, report = told
    affirmed = {(row["broker"], row["who"]) for row in report["decisions"] if row["kind"] == "appraisal"}
    brokers = {"acme-broker", "borealis-broker", "cygnus-broker"}
    guests = {"server/acme-server", "site/borealis-site", "site/cygnus-site"}
    assert affirmed == {(broker, guest) for broker in brokers for guest in guests}
    assert {path.name for path in (folder / "audit").iterdir()} == brokers
    assert current_charter(read_store(folder / "shared/charter")).consortium.broker_threshold == 2


def test_an_auditor_checks_the_story_offline(told: tuple[Path, dict[str, Any]]) -> None:
    folder, report = told
    result = seal("audit", "verify", str(folder / "audit"), "--trust", str(folder / "root.json"), "--json")
    assert result.returncode == 0, result.stdout
    assert json.loads(result.stdout)["entries"] == report["audit"]["entries"]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.long)])
def test_one_flipped_byte_in_any_file_of_the_audit_is_noticed_and_named(
    told: tuple[Path, dict[str, Any]], tmp_path: Path, every: int
) -> None:
    folder, _ = told
    copy = tmp_path / "audit"
    shutil.copytree(folder / "audit", copy)
    root = (folder / "root.json").read_bytes()
    assert verify_audits(copy, root).ok
    unnoticed = []
    for path in sorted(one for one in copy.rglob("*") if one.is_file())[::every]:
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 0x01
        path.write_bytes(changed)
        ledger = copy / path.relative_to(copy).parts[0]
        named = {problem.file for problem in verify_audit(ledger, root).problems}
        if str(path.relative_to(ledger)) not in named:
            unnoticed.append(str(path.relative_to(copy)))
        path.write_bytes(whole)
    assert not unnoticed


def test_another_root_is_refused(told: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = told
    stranger = tmp_path / "root.json"
    text = (folder / "root.json").read_text()
    stranger.write_text(text.replace('"oncology"', '"oncologe"'))
    assert stranger.read_text() != text
    result = seal("audit", "verify", str(folder / "audit"), "--trust", str(stranger), "--json")
    assert result.returncode == 1


def test_patients_and_keys_lie_nowhere_in_clear(told: tuple[Path, dict[str, Any]]) -> None:
    """A stretch of each site's patients, as the training file holds it, is in no file; nor are the deposited keys."""
    from appliance.demo.job import split_patients

    folder, _ = told
    secrets = {site: content[-2000:-1900] for site, content in split_patients().items()}
    (model_key,) = folder.rglob("model.key")
    keys = [model_key, *sorted(folder.rglob("data.key"))]
    assert len(keys) == 3
    secrets |= {str(key.relative_to(folder)): key.read_bytes() for key in keys}  # each at its owner's, mode 0600
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)
    found = [
        (name, str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and path not in keys
        for name, secret in secrets.items()
        if secret in path.read_bytes()
    ]
    assert not found


def test_the_model_lies_nowhere_in_clear_but_at_its_recipient_s(told: tuple[Path, dict[str, Any]]) -> None:
    """The last global model's numbers, as its file holds them, are in no other file of any host."""
    folder, _ = told
    results = sorted((folder / "result").rglob("model.safetensors"))
    assert results
    stretch = results[0].read_bytes()[-400:-300]
    holders = {path for path in folder.rglob("*") if path.is_file() and stretch in path.read_bytes()}
    assert {path.relative_to(folder).parts[0] for path in holders} == {"result"}


def test_the_charter_is_signed_by_two_members(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    store = read_store(folder / "shared/charter")
    shared = ("images.json", "enrolments.json", "code.json", "policies.json", "snapshot.json")
    for name, raw in store.items():
        if name.endswith(shared):
            assert len(json.loads(raw)["signatures"]) >= 2, name


def test_the_charter_and_the_kits_are_made_by_the_commands(told: tuple[Path, dict[str, Any]]) -> None:
    """Every file of every kit is one that a member signed; each verb that made it stands in the transcript."""
    folder, _ = told
    transcript = (folder / "commands.sh").read_text().splitlines()
    verbs = {" ".join(line.split()[1:3]) for line in transcript}
    assert verbs >= {
        *(f"charter {verb}" for verb in ("key", "user", "init", "sign", "publish", "timestamp", "enrol", "kit")),
        *("broker init", "broker run", "image generate", "vm launch", "secret put", "site seal", "audit export"),
    }
    root = (folder / "root.json").read_bytes()
    kits = [path.parent for path in folder.rglob("kit.dsse.json")]
    assert {open_signed_kit(kit, trust=root).manifest.role for kit in kits} == {"broker", "server", "site", "user"}
    served = {path.read_bytes() for path in folder.rglob("metadata/4.snapshot.json")}
    assert served == {(folder / "shared/charter/metadata/4.snapshot.json").read_bytes()}


# --- cut short --------------------------------------------------------------------------------------------------------


@pytest.fixture
def telling(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A demonstration whose sites have joined: its folder and its process."""
    folder = tmp_path / "cut"
    process = subprocess.Popen(
        [*SEAL, "demo", "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        logs = [folder / "logs" / f"{site}.log" for site in ("borealis-site", "cygnus-site")]
        assert wait_until(lambda: all(log.exists() and '"joined"' in log.read_text() for log in logs), 180)
        yield folder, process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def processes_of(folder: Path) -> dict[int, list[str]]:
    """Living processes whose command line names the folder: pid → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            words = command_line(int(entry.name))
            if any(str(folder) in word for word in words):
                found[int(entry.name)] = words
    return found


def command_line(pid: int) -> list[str]:
    """The words of a process's command line; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def kill(folder: Path, *marks: str) -> None:
    """Kill the first process under `folder`, or below one of those, whose command line has all `marks`."""
    named = processes_of(folder)
    below = {child: command_line(child) for parent in named for child in descendants(parent)}
    victims = [pid for pid, words in {**named, **below}.items() if all(mark in " ".join(words) for mark in marks)]
    assert victims
    os.kill(victims[0], signal.SIGKILL)


@pytest.mark.parametrize(
    ("marks", "named"),
    [
        (("broker run", "broker-acme-broker"), "acme-broker was ended by SIGKILL"),
        pytest.param(("rego_worker.py",), "rego_worker, process", marks=pytest.mark.long),
        pytest.param(
            ("site-borealis-site/local/run/guest", "/init"),
            "borealis-site ended with exit status 137",
            marks=pytest.mark.long,
        ),
        pytest.param(("vm launch", "server-acme-server"), "acme-server was ended by SIGKILL", marks=pytest.mark.long),
        pytest.param(
            ("server-acme-server/local/run/guest", "/init"),
            "acme-server ended with exit status 137",
            marks=pytest.mark.long,
        ),
        pytest.param(("vm launch", "site-cygnus-site"), "cygnus-site was ended by SIGKILL", marks=pytest.mark.long),
    ],
)
def test_killing_any_one_process_ends_all_and_names_it(
    telling: tuple[Path, subprocess.Popen[str]], marks: tuple[str, ...], named: str
) -> None:
    folder, process = telling
    kill(folder, *marks)
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 1
    assert named in output
    assert wait_until(lambda: not processes_of(folder), 5)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGTERM, signal.SIGKILL))]
)
def test_interrupted_it_leaves_no_process_behind(
    telling: tuple[Path, subprocess.Popen[str]], number: signal.Signals
) -> None:
    folder, process = telling
    process.send_signal(number)
    process.wait(timeout=END_SECONDS)
    assert process.returncode != 0
    assert wait_until(lambda: not processes_of(folder), 10)


def test_killing_a_training_script_ends_all_and_names_its_site(telling: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = telling
    (guest,) = [
        pid for pid, words in processes_of(folder).items() if "site-cygnus-site/local/run/guest/init" in " ".join(words)
    ]
    assert wait_until(lambda: len(descendants(guest)) >= 3, 60)  # the sandbox, its first process, the script
    os.kill(descendants(guest)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 1
    assert "cygnus-site" in "\n".join(output.splitlines()[-3:])
    assert wait_until(lambda: not processes_of(folder), 5)


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, each after its parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, below = [], list(children.get(pid, []))
    while below:
        found.append(below.pop(0))
        below += children.get(found[-1], [])
    return found
