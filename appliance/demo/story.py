"""The story: found, build, approve, attest, train, open, attack, audit. Each step leaves its facts in a Report."""

from __future__ import annotations

import json
import queue
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.demo import attacks, job
from appliance.demo.attacks import AttackSucceeded, Repelled
from appliance.demo.display import Display, Step, brief
from appliance.demo.founding import (
    THRESHOLD,
    admit,
    deliver,
    deposit_keys,
    found_consortium,
    seal_site_data,
    split_model_key,
)
from appliance.demo.guarded_jobs import endless_job, overspent, revoked
from appliance.demo.guests import BOOT_SECONDS, START_SECONDS, start_broker, start_guest, wait_for_event
from appliance.demo.setting import (
    BROKERS,
    GUESTS,
    MEMBERS,
    MODEL_SHARES,
    OWNER,
    PRODUCTS,
    SERVER,
    SITES,
    Setting,
    claim_folder,
    new_setting,
)
from appliance.processes import Processes
from attestation.ledger.audits import verify_audits
from fl.environments.prod import ProdEnv
from fl.jobs.bundle import make_bundle
from fl.jobs.outputs import capacity
from policies.errors import Refused
from policies.kits import LOCAL, ROOT

if TYPE_CHECKING:
    from fl.jobs.progress import JobEvent

JOB_SECONDS: Final = 120.0
BOOTED_JOB_SECONDS: Final = 600.0
"""The same job in emulated machines."""
LEAST_ACCURACY: Final = 0.94
LARGEST_LOSS: Final = 0.02
"""How much accuracy federated training may cost against training on the pooled data."""
WATCH_SECONDS: Final = 0.2
SETTLE_SECONDS: Final = 2.0
"""A failed step may be the first sign of a process's death: how long to look for one before the step is blamed."""


@dataclass
class Report:
    """What happened: `decisions` as the ledger has them, every attack with its reasons, accuracies, seconds a step."""

    platform: str = "virtual"
    booted: bool = False
    charter: str = ""
    accuracy: float = 0.0
    pooled_accuracy: float = 0.0
    decisions: list[dict[str, Any]] = field(default_factory=list)
    attacks: list[Repelled] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**asdict(self), "attacks": [asdict(one) for one in self.attacks]}


def run_demo(folder: Path, display: Display, booted: Path | None = None) -> Report:
    """Run the whole story in `folder`, which is made anew.

    `booted` names a built image: the three guests are then machines that boot it, and the attacks, which are played
    on guests that are processes, are left out.

    Raises Refused when something that should work is refused, when a process dies in the middle (naming it), or when
    an attack succeeds. No process is left behind in any case.
    """
    processes, setting = Processes(folder / "logs"), new_setting(folder, booted)
    streams = sys.stdout, sys.stderr
    outcome: queue.Queue[Report | BaseException] = queue.Queue()
    told = threading.Event()

    def tell() -> None:
        try:
            outcome.put(_tell(setting, processes, display))
        except BaseException as error:  # handed to the thread that waits below, which raises it
            outcome.put(error)
        told.wait()  # when this thread ends, the kernel ends the processes that it started: not before they are stopped

    narrator = threading.Thread(target=tell, name="story", daemon=True)
    try:
        with claim_folder(folder), display.shown():
            narrator.start()
            while True:
                try:
                    ended = outcome.get(timeout=WATCH_SECONDS)
                    break
                except queue.Empty:
                    dead = processes.dead()
                    if dead is not None:
                        raise dead from None
        if isinstance(ended, BaseException):
            dead = processes.dead(within=SETTLE_SECONDS)
            if dead is not None:
                raise dead from ended
            if isinstance(ended, AttackSucceeded):
                raise Refused(str(ended), where="attacks", do="This is a defect: please report it.") from ended
            raise ended
        return ended
    finally:
        processes.stop_all()
        setting.seal.close()
        sys.stdout, sys.stderr = streams
        told.set()


def _tell(setting: Setting, processes: Processes, display: Display) -> Report:
    folder, booted = setting.folder, setting.booted
    report = Report(booted=booted is not None)
    with display.step("Three members found a virtual consortium") as step:
        found_consortium(setting)
        report.charter = setting.charter().id
        step.detail = f"charter {report.charter[:12]}, root signed by {len(MEMBERS)}, threshold {THRESHOLD}"
    with display.step("Two members approve image, places and code") as step:
        recipe = job.make_recipe()
        if booted is not None:  # the image holds no TensorBoard
            recipe.settings = recipe.settings.model_copy(update={"tracking": None})
        bundle = make_bundle(recipe.folder, recipe.settings)
        endless, endless_model = endless_job()
        bits = capacity(bundle).job
        endless_bits = capacity(endless).job
        admit(setting, {bundle.digest: (recipe.name, bits), endless.digest: (endless.settings.name, endless_bits)})
        step.detail = f"{len(GUESTS)} guests, bundle {bundle.digest[:12]} with {bits} bits for each member"
    with display.step("Every host gets a signed kit") as step:
        kits = deliver(setting)
        seal_site_data(setting, job.split_patients())
        step.detail = f"{len(kits)} kits, signed by {OWNER}"
    with display.step("Brokers start; members deposit their keys") as step:
        for broker in BROKERS:
            start_broker(processes, setting, broker)
        for broker in BROKERS:
            wait_for_event(processes.log_of(broker), "ready")
        deposit_keys(setting)
        split_model_key(setting)
        shares = f"{MODEL_SHARES} of {len(BROKERS)} shares"
        step.detail = f"{', '.join(BROKERS)}: {len(SITES)} keys whole, the model's in {shares}"
    with display.step("Three guests attest and get their keys") as step:
        for guest in GUESTS:
            start_guest(processes, setting, guest)
        ready = {SERVER: "serving", **dict.fromkeys(SITES, "joined")}
        for guest in GUESTS:
            wait_for_event(processes.log_of(guest), ready[guest], within=BOOT_SECONDS if booted else START_SECONDS)
            step.detail += f"{', ' if step.detail else ''}{guest} on {PRODUCTS[guest].value}"
    with display.step("The approved job trains over two hospitals") as step:
        run = ProdEnv(setting.kit, workspace_root=folder / "result").execute(recipe)
        run.watch(lambda event: show_event(step, event, recipe.settings.num_rounds))
        result = run.get_result(timeout=BOOTED_JOB_SECONDS if booted else JOB_SECONDS)
    with display.step("The owner opens the sealed result") as step:
        measured = job.evaluate(result)
        report.accuracy, report.pooled_accuracy = measured["accuracy"], measured["pooled_accuracy"]
        step.detail = f"accuracy {report.accuracy:.4f}, pooled {report.pooled_accuracy:.4f}"
        check_accuracy(report)
    guarded = (overspent(bundle, recipe.first_model), revoked(endless, endless_model))
    played = () if booted else (*attacks.ATTACKS, attacks.changed_bundle(bundle, recipe.first_model), *guarded)
    for attack in played:
        with display.step(f"Attack: {attack.title}") as step:
            repelled = attack(setting, processes)
            report.attacks.append(repelled)
            step.detail = f"refused: {brief(repelled.reasons[0])}"
    with display.step("An auditor checks the whole story offline") as step:
        audit(setting, report)
        step.detail = f"{report.audit['entries']} ledger entries, {report.audit['files']} files"
    report.seconds = display.seconds()
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
    return report


def show_event(step: Step, event: JobEvent, rounds: int) -> None:
    """Keep a step's detail at what the job does now."""
    if event.kind == "aggregated" and event.round is not None:
        values = ", ".join(f"{name} {value:.3f}" for name, value in sorted(event.values.items()))
        step.detail = f"round {event.round + 1} of {rounds}" + (f": {values}" if values else "")
    elif event.kind == "status":
        step.detail = step.detail or f"job {event.text}"


def check_accuracy(report: Report) -> None:
    """Raises Refused if the federated model is not as good as it has to be."""
    short = report.accuracy < LEAST_ACCURACY or report.pooled_accuracy - report.accuracy > LARGEST_LOSS
    if short:
        raise Refused(
            f"the federated model reaches {report.accuracy:.4f}, pooled training {report.pooled_accuracy:.4f}",
            where="result",
            do=f"At least {LEAST_ACCURACY} is expected, and within {LARGEST_LOSS} of pooled training.",
        )


def audit(setting: Setting, report: Report) -> None:
    """Export each broker's ledger, check all as an auditor does, and take the decisions from what was checked."""
    folder = setting.folder / "audit"
    folder.mkdir()
    for broker in BROKERS:
        setting.seal("audit", "export", setting.broker_kit(broker) / LOCAL, folder / broker)
    found = verify_audits(folder, (setting.folder / ROOT).read_bytes())
    if not found.ok:
        problems = tuple(f"{problem.file}: {problem.reason}" for problem in found.problems)
        raise Refused("the audit found problems", where=str(folder), do="Read them.", reasons=problems)
    told = [
        {"broker": broker, **decision.to_json()}
        for broker, ledger in found.ledgers.items()
        for decision in ledger.decisions
    ]
    report.decisions = sorted(told, key=lambda row: (row["time"], row["broker"], row["entry"]))
    report.audit = {"entries": found.entries, "files": sum(1 for path in folder.rglob("*") if path.is_file())}
