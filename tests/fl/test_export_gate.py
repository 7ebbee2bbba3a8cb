"""What hostile scripts carry out of a site, measured in bits against what their bundles declare.

Each script runs in a real sandbox, under a site's own job; everything that leaves it (frames, updates, ledger entries,
console lines) is caught where it leaves. A closed way is proved closed by two runs with two secrets: what left must be
the same, byte for byte. An open one is measured: so many different things left, and no more than are declared.
"""

from __future__ import annotations

import math
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SERVER, SITES, FederationWorld, found_federation, now

from fl.guard.command_log import CommandLog
from fl.guard.limits import Limits
from fl.jobs.bundle import Bundle, make_bundle
from fl.jobs.outputs import Outputs, capacity, number_bits
from fl.jobs.record import JobRecord, sign_record
from fl.jobs.results import rfc3339
from fl.party import Party
from fl.recipes.fedavg import FedAvgRecipe
from fl.site.job import SiteJob
from fl.tensors import parse
from fl.transport.frames import Left, Prepare, Train, Verdict
from fl.transport.memory import SealedMemory
from policies.budgets import EMPTY as NOTHING_SPENT
from policies.budgets import EXPORT_KIND, Balance, debit, parse_export
from policies.charter import files_of
from policies.charter.making import Changes
from policies.documents import Allowance, BundleApproval, ExportBudget
from policies.errors import Refused

SITE = SITES[0]
FREE = Allowance(bits=1 << 52)
ELEMENTS = 8
PRELUDE = """
import array, ctypes, fcntl, json, os, socket, struct, sys, time
import numpy as np
from fl import client as flare
from fl.client import _joined
from fl.model import tensors_of
from fl.tensors import encode

flare.init()
secret = int(flare.data_path("secret").read_text())
raw = _joined().socket._socket


def say(document, data):
    number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(number, data)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, 15)
    raw.sendmsg([json.dumps(document).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [number]))])
    return number


def answer(**more):
    return {"kind": "update", "round": 0, "params_type": "FULL", "metrics": {}, "weight": 1.0, **more}


def tensors(value=0.0):
    return {"w": np.full(8, value, dtype=np.float32)}


model = flare.receive()
"""


@dataclass
class Tap:
    """The site's link to a server that takes everything: what leaves, as it leaves."""

    bundle: Bundle
    model: bytes
    said: list[tuple[Any, ...]] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def send(self, frame: Any) -> None:
        self.times.append(time.monotonic())
        self.said.append(("frame", frame.model_dump_json()))
        if isinstance(frame, Left):
            self.over.set()

    def fetch(self, what: Any, *, size: int, seconds: float) -> SealedMemory:
        return SealedMemory.of(self.bundle.raw if what.what == "bundle" else self.model)

    def deliver(self, head: Any, memory: SealedMemory, *, seconds: float) -> Verdict:
        self.times.append(time.monotonic())
        # The site draws a name for each transfer, which its script has no part in.
        self.said.append(("update", head.model_dump_json(exclude={"transfer"}), bytes(memory.view)))
        self.updates.append(bytes(memory.view))
        self.over.set()
        return Verdict(accepted=True)


@dataclass(frozen=True)
class Leak:
    """What left one run."""

    said: tuple[tuple[Any, ...], ...]
    updates: tuple[bytes, ...]
    seconds: float
    """From the round's task to the last thing that left."""

    @property
    def metrics(self) -> str:
        return next(said[1] for said in self.said if said[0] == "update")


class Gate:
    """Runs scripts at a site of a consortium."""

    def __init__(self, world: FederationWorld, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.spent: dict[tuple[str, str], Any] = {}
        self.bundles: dict[tuple[str, Outputs], tuple[Bundle, bytes]] = {}

    def bundle(self, script: str, outputs: Outputs, **settings: Any) -> tuple[Bundle, bytes]:
        key = (script, outputs)
        if key not in self.bundles:
            code = self.folder / f"code-{len(self.bundles)}"
            code.mkdir()
            (code / "client.py").write_text(PRELUDE + textwrap.dedent(script))
            recipe = FedAvgRecipe(
                name="leak",
                initial_model={"w": np.zeros(ELEMENTS, dtype=np.float32)},
                min_clients=1,
                num_rounds=1,
                round_seconds=20,
                train_script=str(code / "client.py"),
            )
            recipe.settings = recipe.settings.model_copy(update={"outputs": outputs, **settings})
            with recipe.first_model() as model:
                self.bundles[key] = make_bundle(code, recipe.settings), bytes(model.view)
            self.approve(self.bundles[key][0])
        return self.bundles[key]

    def approve(self, bundle: Bundle, budget: Allowance | None = None) -> None:
        expires = now().replace(year=now().year + 1)
        approval = BundleApproval(bundle=bundle.digest, job="leak", sites=SITES, expires=expires, budget=budget or FREE)
        self.world.change(Changes(put=files_of([approval])))

    def record(self, kind: str, document: Mapping[str, Any]) -> str:
        """What a budget's keeper does (tests/attestation/broker/test_export_budgets.py has real ones)."""
        self.world.record(kind, document)
        if kind == EXPORT_KIND:
            content, charter = parse_export(dict(document)), self.world.charter()
            approval = charter.bundle(content.bundle)
            own = charter.export_budget(SITE)
            spent = Balance(
                self.spent.get((SITE, ""), NOTHING_SPENT.owner),
                self.spent.get((SITE, content.bundle), NOTHING_SPENT.owner),
            )
            after, reasons = debit(content, spent, SITE, own, approval.budget if approval else None)
            if reasons:
                raise Refused(reasons[0], where="ledger", do="", reasons=reasons)
            self.spent[SITE, ""], self.spent[SITE, content.bundle] = after.owner, after.bundle
        return ""

    def run(self, script: str, secret: int, outputs: Outputs | None = None, **settings: Any) -> Leak:
        bundle, model = self.bundle(script, outputs or Outputs(), **settings)
        world, told = self.world, []
        identity = world.identity("site", SITE, seconds=600)
        before = len(world.ledger)
        party = Party(lambda: identity, world.charter, now, self.record, told.append)
        ada = world.users["acme-pharma/ada"]
        from hashlib import sha256

        record = JobRecord(
            charter=world.charter().id,
            job="leak-1",
            name="leak",
            bundle=bundle.digest,
            server=SERVER,
            roster=SITES,
            recipients=("acme-pharma/ada",),
            rounds=1,
            min_sites=1,
            model_sha256=sha256(model).hexdigest(),
            model_size=len(model),
            created=rfc3339(now()),
            submitter="acme-pharma/ada",
        )
        tap = Tap(bundle, model)
        prepare = Prepare(job="leak-1", record=sign_record(record, ada.signing), bundle_size=len(bundle.raw))
        log = CommandLog(self.record, told.append, {"site": SITE})
        data = {"secret": str(secret).encode()}
        job = SiteJob(party, SITE, SERVER, tap, data, Limits(), prepare, log)
        job.thread.start()
        task = Train(job="leak-1", round=0, total_rounds=1, model_sha256=record.model_sha256, model_size=len(model))
        begun = time.monotonic()
        job.train(task)
        assert tap.over.wait(30), told
        job.finish()
        job.thread.join(20)
        assert not job.thread.is_alive()
        left = [
            ("ledger", kind, repr(sorted((k, v) for k, v in document.items() if k not in ("record_sha256",))))
            for kind, document in world.ledger[before:]
        ]
        said = (*tap.said, *left, *(("console", line) for line in told))
        return Leak(said, tuple(tap.updates), max(tap.times) - begun)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    folder = tmp_path_factory.mktemp("gate")
    (folder / "world").mkdir()
    return Gate(found_federation(folder / "world"), folder)


CLOSED = {
    "metadata of the file": """
        data = encode(tensors_of(tensors()))
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = {"stolen": str(secret)}
        text = json.dumps(header).encode()
        say(answer(), struct.pack("<Q", len(text)) + text + data[8 + length :])
    """,
    "padding of the header": """
        data = encode(tensors_of(tensors()))
        length = struct.unpack("<Q", data[:8])[0]
        text = data[8 : 8 + length].rstrip() + b" " * (secret % 1000)
        say(answer(), struct.pack("<Q", len(text)) + text + data[8 + length :])
    """,
    "payloads of NaNs": """
        bits = np.full(8, 0x7FC00000 | (secret & 0x3FFFFF), dtype=np.uint32)
        say(answer(), encode(tensors_of({"w": bits.view(np.float32)})))
    """,
    "names of tensors": """
        say(answer(), encode(tensors_of({"w": np.zeros(8, dtype=np.float32), f"s{secret}": np.zeros(1)})))
    """,
    "shapes of tensors": """
        say(answer(), encode(tensors_of({"w": np.zeros(secret % 4000 + 9, dtype=np.float32)})))
    """,
    "fields of a message": """
        say(answer(**{f"s{secret}": 1}), encode(tensors_of(tensors())))
    """,
    "what is no message": """
        raw.send(str(secret).encode())
        time.sleep(10)
    """,
    "a false round": """
        say(answer(round=secret), encode(tensors_of(tensors())))
    """,
    "a false kind of parameters": """
        say(answer(params_type="DIFF"), encode(tensors_of(tensors(secret % 7))))
    """,
    "names of metrics": """
        say(answer(metrics={f"m{secret}": 1.0}), encode(tensors_of(tensors())))
    """,
    "a metric beyond bounds": """
        say(answer(metrics={"loss": 1e13 + secret * 1e9}), encode(tensors_of(tensors())))
    """,
    "digits of a metric": """
        say(answer(metrics={"loss": 1.0 + (secret % 10**9) * 1e-16}), encode(tensors_of(tensors())))
    """,
    "a weight beyond bounds": """
        say(answer(weight=-float(secret)), encode(tensors_of(tensors())))
    """,
    "more logged numbers than declared": """
        for n in range(secret % 50 + 3):
            flare.log("loss", 1.0)
        time.sleep(10)
    """,
    "standard output": """
        print(secret); sys.stderr.write(f"{secret}\\n")
        say(answer(), encode(tensors_of(tensors())))
    """,
    "what an exception says": """
        raise ValueError(f"record {secret}")
    """,
    "an exception of its own": """
        raise type(f"Stolen{secret % 10}", (Exception,), {})(secret)
    """,
    "a write after the check": """
        number = say(answer(), encode(tensors_of(tensors())))
        for _ in range(2000):
            try:
                os.pwrite(number, struct.pack("<Q", secret), 100)
            except OSError:
                pass
    """,
    "a second answer": """
        say(answer(), encode(tensors_of(tensors())))
        say(answer(), encode(tensors_of(tensors(secret % 100))))
    """,
    "side files": """
        for folder in (".", "/tmp", "/dev/shm"):
            open(f"{folder}/stolen", "w").write(str(secret))
        say(answer(), encode(tensors_of(tensors())))
    """,
    "the size of a message": """
        raw.send(b"x" * (secret % 30000))
        time.sleep(10)
    """,
    "text": """
        flare.log_line(f"record {secret}")
        time.sleep(10)
    """,
    "numbers below a step": """
        say(answer(), encode(tensors_of(tensors((secret % 1000) * 1e-5))))
    """,
}
DECLARED = Outputs(metrics=("loss",), values=2, digits=3, bits=2, limit=1.0)
SECRETS = (1234567890123, 9876543210987)


@pytest.mark.parametrize("way", CLOSED)
def test_a_closed_way_carries_nothing(gate: Gate, way: str) -> None:
    first, second = (gate.run(CLOSED[way], secret, DECLARED) for secret in SECRETS)
    assert first.said == second.said
    text = repr(first.said) + repr(second.said)
    assert not any(str(secret)[:9] in text for secret in SECRETS)


CLOSED_TEXT = {
    "text of no declared form": "flare.log_line(f'epoch 1: loss 0.5 {secret}')",
    "text after the end": "flare.log_line(f'epoch 1: loss 0.5\\n{secret}')",
    "digits in text": "flare.log_line(f'epoch 1: loss {1.0 + (secret % 10**9) * 1e-13:.20f}')",
    "zeros before and after": "flare.log_line('epoch 1: loss 0.5' + '0' * (secret % 9))",
    "another way to write it": "flare.log_line(f'epoch 000001: loss {0.5 if secret % 2 else 5e-1:e}')",
    "more text than declared": "[flare.log_line('epoch 1: loss 0.5') for _ in range(secret % 50 + 5)]; time.sleep(10)",
}
LINES = Outputs(
    metrics=(), values=0, digits=2, bits=2, limit=1.0, lines=("epoch {int}: loss {number}",), line_bytes=40
)  # fmt: skip


@pytest.mark.parametrize("way", CLOSED_TEXT)
def test_text_carries_what_its_forms_say_and_nothing_beside(gate: Gate, way: str) -> None:
    script = f"{CLOSED_TEXT[way]}\nsay(answer(), encode(tensors_of(tensors())))"
    first, second = (gate.run(script, secret, LINES) for secret in SECRETS)
    assert first.said == second.said
    assert not any(str(secret)[:9] in repr(first.said) + repr(second.said) for secret in SECRETS)
    count = sum('"said"' in said[1] for said in first.said if said[0] == "frame")
    assert count == {"text of no declared form": 0, "text after the end": 0, "more text than declared": 2}.get(way, 1)


def test_text_carries_no_more_than_its_declared_bits(gate: Gate) -> None:
    """Two lines of the shortest kind fit the budget, each with a whole number and one of two digits."""
    script = """
        flare.log_line(f"epoch {secret}: loss {secret / 7}")
        say(answer(), encode(tensors_of(tensors())))
    """
    said = measured(gate, textwrap.dedent(script), LINES, [0, 1, 2, 3, 5, 8, 13, 21], lambda leak: leak.said)
    bundle, _ = gate.bundle(textwrap.dedent(script), LINES)
    declared = capacity(bundle).lines
    assert said == 3
    assert said <= declared == math.ceil(2 * math.log2((2 * 10**6 - 1) * (2 * 9 * 10 * 25 + 1)) + math.log2(3))
    assert capacity(bundle).a_round > declared


def measured(gate: Gate, script: str, outputs: Outputs, secrets: list[int], what: Callable[[Leak], Any]) -> float:
    """Bits that got through: the logarithm of how many different things left."""
    seen = {what(gate.run(script, secret, outputs)) for secret in secrets}
    return math.log2(len(seen))


def numbers(leak: Leak) -> tuple[float, ...]:
    (update,) = leak.updates
    return tuple(parse(update, max_size=1 << 20).array("w").tolist())


def test_weights_carry_no_more_than_their_declared_bits(gate: Gate) -> None:
    """One number of the model varies over 60 values; 3 bits let 7 through, and the declaration says at most 8."""
    script = "say(answer(), encode(tensors_of({'w': np.array([secret / 30 - 1] + [0] * 7, dtype=np.float32)})))"
    outputs = Outputs(metrics=(), bits=3, limit=1.0)
    got = measured(gate, script, outputs, [0, 7, 13, 17, 22, 27, 30, 34, 41, 47, 52, 59], numbers)
    bundle, _ = gate.bundle(script, outputs)
    assert capacity(bundle).tensors == 3 * ELEMENTS
    assert math.log2(6) <= got <= 3


def test_clipping_bounds_what_one_site_moves(gate: Gate) -> None:
    script = "say(answer(), encode(tensors_of(tensors(float(secret)))))"
    shown = numbers(gate.run(script, 10**6, Outputs(clip_norm=0.5)))
    assert np.linalg.norm(shown) == pytest.approx(0.5, rel=1e-6)
    assert numbers(gate.run(script, 0, Outputs(clip_norm=0.5))) == (0.0,) * ELEMENTS


def test_noise_is_added_after_clipping_and_differs_each_time(gate: Gate) -> None:
    script = "say(answer(), encode(tensors_of(tensors(float(secret)))))"
    outputs = Outputs(clip_norm=0.5, noise_multiplier=4.0)
    first, second = (numbers(gate.run(script, 10**6, outputs)) for _ in range(2))
    assert first != second
    assert 0.2 < np.std(np.array(first) - np.array(second)) < 8


def test_metrics_and_weights_carry_no_more_than_their_digits(gate: Gate) -> None:
    script = "say(answer(metrics={'loss': secret / 7}, weight=1 + secret / 9), encode(tensors_of(tensors())))"
    outputs = Outputs(metrics=("loss",), digits=1, bits=2, limit=1.0)
    got = measured(gate, script, outputs, [0, 1, 2, 3, 5, 8, 13, 21, 22, 23, 24, 25], lambda leak: leak.metrics)
    bundle, _ = gate.bundle(script, outputs)
    declared = capacity(bundle)
    assert 2 < got <= declared.metrics + declared.weight
    assert declared.metrics == number_bits(1) + 1


def test_how_a_script_ends_carries_no_more_than_is_declared(gate: Gate) -> None:
    script = "os._exit(secret % 256)"
    outputs = Outputs(metrics=())
    got = measured(gate, script, outputs, [1, 2, 3, 77, 78, 255, 257, 513], lambda leak: leak.said)
    bundle, _ = gate.bundle(script, outputs)
    assert got == math.log2(6)
    assert got <= capacity(bundle).ending


def test_timing_carries_no_more_than_its_steps(gate: Gate) -> None:
    """A script that waits for 0 to 1.5 s: with a release each 2 s, all of it leaves in the same step."""
    script = "time.sleep(secret / 10); say(answer(), encode(tensors_of(tensors())))"
    outputs = Outputs(metrics=(), release_seconds=4)
    bundle, _ = gate.bundle(script, outputs)
    assert capacity(bundle).timing == 3  # 20 s a round: five steps, or never
    steps = {round(gate.run(script, secret, outputs).seconds / 4 - 0.15) for secret in (0, 8, 15)}
    assert steps == {1}


def test_logged_numbers_wait_for_the_release_too(gate: Gate) -> None:
    script = "flare.log('loss', secret); time.sleep(0.5); say(answer(), encode(tensors_of(tensors())))"
    leak = gate.run(script, 3, Outputs(metrics=("loss",), release_seconds=3))
    kinds = [said[1].split('"')[3] if said[0] == "frame" else said[0] for said in leak.said]
    assert kinds[:3] == ["ready", "logged", "update"]
    assert leak.seconds > 2


def test_a_spent_budget_stops_the_job_before_anything_leaves(gate: Gate) -> None:
    script = "say(answer(), encode(tensors_of(tensors(float(secret)))))"
    outputs = Outputs(metrics=(), digits=1)
    bundle, _ = gate.bundle(script, outputs)
    needed = capacity(bundle).job
    gate.approve(bundle, Allowance(bits=2 * needed))
    assert len(gate.run(script, 1, outputs).updates) == 1
    assert len(gate.run(script, 2, outputs).updates) == 1
    third = gate.run(script, 3, outputs)
    assert third.updates == ()
    (left,) = [said[1] for said in third.said if said[0] == "frame"]
    assert f"the budget of {SITE} for bundle {bundle.digest[:16]}… is spent" in left
    assert "ready" not in left


def test_an_owner_s_budget_binds_over_bundles(gate: Gate) -> None:
    script = "say(answer(), encode(tensors_of(tensors(float(secret)))))"
    spent = gate.spent[SITE, ""].bits if (SITE, "") in gate.spent else 0
    first, second = Outputs(metrics=(), digits=2), Outputs(metrics=(), digits=4)
    bits = spent + capacity(gate.bundle(script, first)[0]).job
    gate.world.change(Changes(put=files_of([ExportBudget(member=SITE, bits=bits)])))
    try:
        assert len(gate.run(script, 1, first).updates) == 1
        refused = gate.run(script, 1, second)
        assert refused.updates == ()
        assert f"the export budget of {SITE} is spent" in repr(refused.said)
    finally:
        gate.world.change(Changes(remove=frozenset({f"members/{SITE}/budget/exports.json"})))


def test_without_a_ledger_nothing_leaves(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(kind: str, document: Mapping[str, Any]) -> str:
        if kind == EXPORT_KIND:
            raise Refused("no broker can be reached", where="brokers", do="")
        return ""

    monkeypatch.setattr(gate, "record", unreachable)
    leak = gate.run("say(answer(), encode(tensors_of(tensors(float(secret)))))", 1, Outputs(metrics=()))
    assert leak.updates == ()
    assert "no broker can be reached" in repr(leak.said)
