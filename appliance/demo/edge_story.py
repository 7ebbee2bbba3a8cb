"""The story of a tree: server, inner node and gateway attest; devices train through them; a bare host gets nothing.

One member founds all of it (`appliance.poc`). With a built image the three guests are machines that boot it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.demo.attacks import AttackSucceeded, Impostor, Repelled
from appliance.demo.display import Display, Step, brief
from appliance.demo.founding import approvable
from appliance.demo.guests import console
from appliance.demo.setting import claim_folder
from appliance.demo.verbs import Verbs
from appliance.poc import BROKER, PRODUCT, SERVER, Poc
from attestation.connection import BrokerClient
from attestation.errors import BrokerRefused
from attestation.virtual.chip import load_chip
from attestation.virtual.launch import read_init_data
from attestation.virtual.vendor import load_vendor
from fl.environments.poc_devices import PocDevices
from fl.environments.prod import ProdEnv
from policies.charter import current_charter, read_store
from policies.errors import Refused, SealwrightError
from policies.kits import INIT_DATA, ROOT

if TYPE_CHECKING:
    from fl.edge.recipes import EdgeFedBuffRecipe
    from fl.jobs.progress import JobEvent

BARE_HOST: Final = "a gateway runs on a bare host"
INNER: Final = "inner"
GATEWAY: Final = "gateway"
DEVICES: Final = 16
VERSIONS: Final = 9
LEAST_ACCURACY: Final = 0.8
"""What devices with 48 digits each have to reach on digits that none of them has; guessing has 0.1."""
HELD_OUT: Final = 400
JOB_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 2.0


@dataclass
class EdgeReport:
    """What happened, as `report.json` has it."""

    booted: bool
    platform: str = "virtual"
    charter: str = ""
    guests: dict[str, str] = field(default_factory=dict)
    """Each guest's attested identity."""
    devices: int = DEVICES
    updates: int = 0
    accuracy: float = 0.0
    attacks: list[Repelled] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def run_edge_demo(folder: Path, display: Display, booted: Path | None = None) -> EdgeReport:
    """Run the story in `folder`, which is made anew. Raises Refused for whatever is not as it should be.

    `booted` names a built image, which the three guests then boot as machines. Raises Unusable if it is none that can.
    """
    if booted is not None:
        approvable(booted)
    report, home = EdgeReport(booted is not None), folder / "poc"
    with claim_folder(folder), display.shown(), ExitStack() as ends:
        with display.step("The recipe exports the graph that devices train") as step:
            recipe = make_recipe()
            step.detail = f"bundle {recipe.export(folder / 'bundle')[:12]}"
        home.mkdir(mode=0o700)
        poc = Poc(home, (), {}, (folder / "bundle/job.bundle",), (GATEWAY,), (INNER,), booted)
        with display.step("A server, an inner node and a gateway attest and get their keys") as step:
            processes, gateways = ends.enter_context(poc.running())
            for name in (SERVER, INNER, GATEWAY):
                said = next(line for line in console(processes.log_of(name)) if line.get("event") == "attested")
                report.guests[name] = str(said["identity"])
            report.charter = sha256((home / ROOT).read_bytes()).hexdigest()
            step.detail = f"{len(report.guests)} guests {'booted' if booted else 'as processes'}"
        try:
            with display.step(f"{DEVICES} devices train through the gateway") as step:
                result = _trained(report, step, recipe, poc, gateways)
            with display.step("The owner opens the sealed result") as step:
                report.accuracy = accuracy_of(result)
                step.detail = f"accuracy {report.accuracy:.3f} on digits that no device has"
                if report.accuracy < LEAST_ACCURACY:
                    raise Refused(f"the model reaches {report.accuracy:.3f}", where="result", do="Read the logs.")
            with display.step(f"Attack: {BARE_HOST}") as step:
                report.attacks.append(bare_host(poc))
                step.detail = f"refused: {brief(report.attacks[0].reasons[0])}"
        except AttackSucceeded as error:
            raise Refused(str(error), where="attacks", do="This is a defect: please report it.") from error
        except SealwrightError as error:
            dead = processes.dead(within=SETTLE_SECONDS)
            if dead is not None:
                raise dead from error
            raise
    report.seconds = display.seconds()
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
    return report


def _trained(report: EdgeReport, step: Step, recipe: EdgeFedBuffRecipe, poc: Poc, gateways: Mapping[str, str]) -> Path:
    """Submit the job; devices on this host attest the gateway and train the graph by ExecuTorch; the result."""
    env = ProdEnv(poc.kit, workspace_root=poc.folder.parent / "result", sites=[INNER, GATEWAY])
    devices = PocDevices(recipe, len(gateways))

    def show(event: JobEvent) -> None:
        if event.kind == "aggregated" and event.round is not None:
            report.updates += int(event.values["updates"])
            step.detail = f"version {event.round + 2} of {VERSIONS}, {report.updates} updates"

    try:
        run = env.execute(recipe)
        devices.play(env, run, poc.for_devices(gateways))
        run.watch(show)
        return run.get_result(timeout=JOB_SECONDS)
    finally:
        devices.stop()


def bare_host(poc: Poc) -> Repelled:
    """A program on a host asks for the enrolled gateway's credential, with that gateway's init-data.

    There is no measured guest: what vouches for it is a secure processor of the host's own making, which says what the
    gateway's own would say.
    """
    seal, home = Verbs(poc.folder), poc.folder / "attacks"
    home.mkdir()
    try:
        seal("vm", "vendor", home / "vendor", "--product", PRODUCT)
        seal("vm", "chip", home / "chip", "--vendor", home / "vendor", "--product", PRODUCT)
    finally:
        seal.close()
    charter = current_charter(read_store(poc.folder / "charter"), (poc.folder / ROOT).read_bytes())
    broker = charter.broker(BROKER)
    if broker is None:
        raise AttackSucceeded(f"{BARE_HOST}: the charter has no broker {BROKER} to ask")
    host = Impostor(
        BROKER,
        load_chip(home / "chip"),
        load_vendor(home / "vendor"),
        poc.folder / "image",
        read_init_data(poc.folder / f"gateway-{GATEWAY}" / INIT_DATA),
        f"EPYC-{PRODUCT}",
    )
    client = BrokerClient(broker, charter.consortium.trust_domain)
    try:
        session = host.open(client)
        host.attest(client, session, host.evidence(session, host.keys()), host.keys())
    except BrokerRefused as refusal:
        return Repelled(BARE_HOST, BROKER, refusal.reasons)
    finally:
        client.close()
    raise AttackSucceeded(f"{BARE_HOST}: the broker affirmed it")


# --- the job ----------------------------------------------------------------------------------------------------------


def make_recipe() -> EdgeFedBuffRecipe:
    """A small network that learns scikit-learn's handwritten digits from devices that have 48 each."""
    import torch

    from fl.edge.recipes import EdgeFedBuffRecipe, SimulationConfig
    from fl.edge.settings import DeviceManagerConfig, ModelManagerConfig

    torch.manual_seed(0)
    return EdgeFedBuffRecipe(
        "digits-on-devices",
        model=torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)),
        input_shape=(16, 64),
        output_shape=(16,),
        device_training_params={"epoch": 5, "lr": 0.3},
        model_manager_config=ModelManagerConfig(
            num_updates_for_model=8, max_model_version=VERSIONS, global_lr=1.0, staleness_weight=True
        ),
        device_manager_config=DeviceManagerConfig(device_selection_size=10),
        simulation_config=SimulationConfig(digits_of, num_devices=DEVICES, num_workers=2, job_timeout=JOB_SECONDS),
    )


def digits_of(device: int) -> tuple[Any, Any]:
    """A device's digits."""
    inputs, labels = _digits()
    mine = np.random.default_rng(device).integers(HELD_OUT, len(labels), 48)
    return inputs[mine], labels[mine]


def accuracy_of(result: Path) -> float:
    """Of the model in a result's folder, on the digits that no device has."""
    from safetensors.numpy import load_file

    model, (inputs, labels) = load_file(result / "model.safetensors"), _digits()
    hidden = np.maximum(inputs[:HELD_OUT] @ model["0.weight"].T + model["0.bias"], 0)
    said = (hidden @ model["2.weight"].T + model["2.bias"]).argmax(axis=1)
    return float((said == labels[:HELD_OUT]).mean())


@cache
def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target.astype(np.int64)
