"""NVIDIA FLARE's edge stack with its own simulator: a tree of two relays and four leaves, devices in the leaves.

Its simulator is in the leaves' job processes, so that no HTTP is in the way. The job is what its EdgeFedBuffRecipe
makes, made here from its parts, since the recipe demands torchvision. Its nodes talk in the clear, as its tool for
trees provisions them. All of it runs in a network namespace of its own, since its ports are fixed. It ends after
SECONDS, done or not: versions of the model that its server noted until then are what counts.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from benchmarks.peers.environments import Tagged, program

SECONDS = 240.0
"""At most, from the start of its processes on."""
UPDATES_FOR_MODEL = 16
VERSIONS = 9

_DEVICES = """
import numpy
import torch
from nvflare.apis.dxo import DXO, DataKind, from_dict
from nvflare.edge.simulation.device_task_processor import DeviceTaskProcessor


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(96, 250), torch.nn.Linear(250, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


class Processor(DeviceTaskProcessor):
    def setup(self, job):
        pass

    def shutdown(self):
        pass

    def process_task(self, task):
        model = from_dict(task.task_data)
        update = {name: numpy.full(numpy.shape(value), 0.001, numpy.float32) for name, value in model.data.items()}
        return DXO(data_kind=DataKind.WEIGHT_DIFF, data={"dict": update, "count": 1}).to_dict()
"""
_RUN = """
import os, subprocess, sys, time
from pathlib import Path

from nvflare.app_opt.pt.job_config.model import PTModel
from nvflare.edge.aggregators.model_update_dxo_factory import ModelUpdateDXOAggrFactory
from nvflare.edge.assessors.buff_device_manager import BuffDeviceManager
from nvflare.edge.assessors.buff_model_manager import BuffModelManager
from nvflare.edge.assessors.model_update import ModelUpdateAssessor
from nvflare.edge.tools.edge_job import EdgeJob
from nvflare.fuel.flare_api.flare_api import new_secure_session
from devices import Network, Processor

updates, versions, end = int(sys.argv[1]), int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
subprocess.run([sys.executable, "-m", "nvflare.lighter.tree_prov", "-r", "work", "-p", "edge", "-d", "1", "-w", "2",
                "-c", "2"], check=True)
kits = Path("work/edge/prod_00").resolve()
for resources in kits.glob("*/local/resources.json.default"):
    resources.write_text(resources.read_text().replace("/tmp/nvflare", str(kits / "store")))
for name in ("server", "R1", "R2", "C1", "C2", "C11", "C12", "C21", "C22"):
    subprocess.Popen(["bash", str(kits / name / "startup" / "start.sh")])
    time.sleep(3 if name in ("server", "R2") else 0.2)
last = None
while True:
    try:
        session = new_secure_session("admin@nvidia.com", str(kits / "admin@nvidia.com"), timeout=5)
        if len(session.get_system_info().client_info) >= 6:
            break
        session.close()
    except Exception as error:  # its API says by any error that it is not up yet
        last = error
    if time.monotonic() > end:
        raise SystemExit(f"its nodes did not join: {last!r}")
    time.sleep(1)
made = EdgeJob(name="edge", edge_method="edge")
made.configure_simulation(Processor(), 60.0, 100, 8)
made.configure_client(aggregator_factory=ModelUpdateDXOAggrFactory(), max_model_versions=3, update_timeout=60.0)
persistor = made.to_server(PTModel(model=Network()), id="persistor")["persistor_id"]
manager = made.to_server(BuffModelManager(num_updates_for_model=updates, max_model_history=10, global_lr=1.0,
                                          staleness_weight=True), id="model_manager")
devices = made.to_server(BuffDeviceManager(device_selection_size=2 * updates, min_hole_to_fill=1, device_reuse=True),
                         id="device_manager")
made.configure_server(assessor=ModelUpdateAssessor(persistor_id=persistor, model_manager_id=manager,
                                                   device_manager_id=devices, max_model_version=versions))
made.to_server(str(Path("source").resolve()))
made.to_clients(str(Path("source").resolve()))
made.export_job("jobs")
job = session.submit_job(str(Path("jobs/edge").resolve()))
while time.monotonic() < end and not session.get_job_meta(job)["status"].startswith("FINISHED"):
    time.sleep(1)
os._exit(0)  # threads of its session go on
"""
_NOTED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d{3}).*generated new model version (\d+) with (\d+) updates")


def edge(folder: Path) -> dict[str, float]:
    """`updates_a_second` between the first version that was made of updates and the last one that was noted; how many
    updates that were, the `processes` and `pss_megabytes` at the most. Raises RuntimeError if it made none."""
    (folder / "source").mkdir()
    for path, text in {"devices.py": _DEVICES, "source/devices.py": _DEVICES, "run.py": _RUN}.items():
        (folder / path).write_text(text)
    log = folder / "log"
    with Tagged() as processes:
        processes.environment["PATH"] = f"{Path(program('nvflare')).parent}:{processes.environment['PATH']}"
        own = f"ip link set lo up && exec {program('nvflare')} run.py {UPDATES_FOR_MODEL} {VERSIONS} {SECONDS}"
        processes.run(["unshare", "-n", "sh", "-c", own], folder, log, seconds=SECONDS + 90)
    logs = [*folder.glob("work/edge/prod_00/server/**/log*.txt"), log]
    noted = {}
    for path in logs:
        for at, version, updates in _NOTED.findall(path.read_text(errors="replace")):
            noted[int(version)] = (datetime.fromisoformat(at.replace(",", ".")), int(updates))
    made = [noted[version] for version in sorted(noted) if noted[version][1]]
    if len(made) < 2:
        raise RuntimeError(f"it made {len(made)} versions in {SECONDS:g} s: {log.read_text(errors='replace')[-2000:]}")
    counted = sum(updates for _, updates in made[1:])
    return {
        "updates_a_second": round(counted / (made[-1][0] - made[0][0]).total_seconds(), 1),
        "updates": counted,
        "processes": processes.most_processes,
        "pss_megabytes": round(processes.most_pss * 1024 / 1e6),
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        print(edge(Path(name)))
