"""A site's work in a booted guest: a round of private training, and a script that reads the data volume.

The sandbox, the trusted loop, the accountant and the kernel's device mapper are the guest's own.

Made by the tests, and by nobody else. The job lies beside this file, as the test wrote it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import tomllib
from pathlib import Path

from appliance.user_data import opened_user_data
from attestation.attester.boot import Boot, read_boot
from fl.guard.accounting import debited, epsilon
from fl.guard.gate import max_update_size
from fl.guard.sandbox import Limits, Sandbox, SiteData
from fl.jobs.settings import JobSettings
from fl.local.dp_sgd import what_runs
from fl.model import params_of
from fl.site.job import DATA_FOLDER
from fl.site.script import ScriptSession
from fl.tensors import parse
from fl.transport.local import ScriptSocket
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError

JOB = Path(__file__).with_name("site_job")


READING = b"""
import hashlib, json, os, pathlib, socket
folder, said = pathlib.Path("/user_data"), {}
for path in sorted(folder.rglob("*")):
    if path.is_file():
        said[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
try:
    (folder / "new").write_bytes(b"x")
except OSError as error:
    said["write"] = error.errno
channel = socket.socket(fileno=int(os.environ["SEAL_CHANNEL"]))
channel.sendall(json.dumps(said).encode())
"""
"""What a training script does with its site's data volume."""


def main(guest: Path) -> int:
    """Train, read, and tell what came of both."""
    boot = read_boot(guest)
    try:
        told = {"private": train(), "volume": read_volume(boot)}
    except SealwrightError as error:
        told = {"refused": {"what": error.what}}
    sys.stdout.write(json.dumps({"site": told}) + "\n")
    sys.stdout.flush()
    return 0


def train() -> dict[str, object]:
    """One round, as a site's job does it."""
    settings = JobSettings.model_validate_json((JOB / "settings.json").read_bytes())
    assert settings.privacy is not None
    graph, model = (JOB / "graph.json").read_bytes(), (JOB / "model.safetensors").read_bytes()
    files, script = what_runs({settings.train_script: graph}, settings, settings.train_script)
    data = {"train.safetensors": (JOB / "train.safetensors").read_bytes()}
    sandbox = Sandbox(files, script, [], data, limits=Limits(), require_cgroup=True)
    ours, theirs = ScriptSocket.pair()
    with theirs:
        process = sandbox.start(theirs)

    def how_it_ended() -> str:
        outcome = process.wait(5)
        return "still runs" if outcome is None else f"{outcome.sentence}: {outcome.log.decode(errors='replace')[-500:]}"

    with process:
        session = ScriptSession(ours, site="north", how_it_ended=how_it_ended)
        limit = max_update_size(settings.schema_of_model)
        session.greet("private-1", settings, data=DATA_FOLDER, max_update=limit)
        with SealedMemory.of(model) as sent:
            _, memory = session.train(0, settings.num_rounds, sent, seconds=300, value=lambda *_: None)
        with memory:
            raw = bytes(memory.view)
        session.end()
        session.close()
    trained = params_of(parse(bytearray(raw), max_size=len(raw)), "numpy")
    before = params_of(parse(bytearray(model), max_size=len(model)), "numpy")
    return {
        "epsilon": epsilon(settings.privacy, settings.num_rounds),
        "debited": debited(settings.privacy, 0),
        "moved": {name: float(abs(array - before[name]).max()) for name, array in sorted(trained.items())},
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def read_volume(boot: Boot) -> dict[str, object]:
    """A sandboxed script reads the data volume, as one of an approved job would."""
    key = bytes.fromhex(tomllib.loads(boot.init_data.decode())["user_data"]["key"])
    with opened_user_data(boot.disks["user-data"], key) as (folder, header):
        data = SiteData()
        data.folder = folder
        sandbox = Sandbox({"client.py": READING}, "client.py", [], data, limits=Limits(), require_cgroup=True)
        ours, theirs = socket.socketpair()
        with ours, theirs, sandbox.start(theirs) as process:
            theirs.close()
            ours.settimeout(120)
            said = b""
            while piece := ours.recv(65536):
                said += piece
            outcome = process.wait(120)
        ended = "still runs" if outcome is None else f"{outcome.sentence} {outcome.log.decode(errors='replace')[-300:]}"
        return {"ended": ended.strip(), "said": json.loads(said or b"{}"), "generation": header.generation}
