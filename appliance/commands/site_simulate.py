"""`seal site simulate-devices`: a million virtual devices, a tree of gateways, and what came of it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from fl.edge.fedbuff import Step
    from fl.edge.simulation.description import Description
    from fl.edge.simulation.engine import Trace


def simulate_devices(
    file: Annotated[
        Path, typer.Argument(metavar="DESCRIPTION", help="The description (TOML, docs/reference/edge.md).")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write report.json and report.html there.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=256, help="Processes that train (default: one for each core).")
    ] = None,
    gateway: Annotated[
        str | None, typer.Option("--gateway", metavar="URL", help="Play against this gateway, in real time.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="ROOT", help="The charter's first root, which devices pin.")
    ] = None,
    issuer: Annotated[str | None, typer.Option("--issuer", help="The issuer of the devices' tokens.")] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The issuer's private key (PEM).")] = None,
    job: Annotated[str, typer.Option("--job", help="With --gateway: the job's name, or its beginning and *.")] = "*",
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=86400, help="With --gateway: for so long.")] = 60.0,
    virtual: Annotated[
        bool,
        typer.Option("--virtual", help="With --gateway: devices for development, which a virtual charter may have."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, without its versions, as JSON.")] = False,
) -> None:
    """Simulate devices that come and go, train and report through a tree of gateways, in virtual time; or, with
    --gateway, real messages of virtual devices to a real gateway."""
    from fl.edge.simulation.description import read_description, simulate
    from fl.edge.simulation.report import document, page
    from fl.jobs.results import write_file, write_json

    description = read_description(file)
    if out is not None and out.exists() and not out.is_dir():
        raise Unusable("it is a file", where=str(out), do="Name a folder for the report.")
    workers = workers or len(os.sched_getaffinity(0))
    said = time.monotonic()

    def made(step: Step, accuracy: float | None) -> None:
        nonlocal said
        if time.monotonic() - said >= 1:
            said = time.monotonic()
            reached = "" if accuracy is None else f", accuracy {accuracy:.3f}"
            sys.stderr.write(f"version {step.version}: {step.updates} updates{reached}\n")

    began = time.perf_counter()
    if gateway is None:
        trace = simulate(description, workers=workers, made=made)
    elif trust is None or issuer is None or key is None:
        raise Unusable("--gateway needs --trust, --issuer and --key", where="command line", do="Give all of them.")
    else:
        trace = _over_http(
            description, gateway, trust, (issuer, key), job, seconds=seconds, workers=workers, production=not virtual
        )
    took = time.perf_counter() - began
    updates = trace.outcomes["counted"]
    real = {"seconds": round(took, 2), "updates_a_second": round(updates / took, 1)}
    report: dict[str, Any] = document(trace, description.model_dump(mode="json"), {"real": real})
    if out is not None:
        write_json(out / "report.json", report)
        write_file(out / "report.html", page(report).encode())
    if as_json:
        print_json({**{key: value for key, value in report.items() if key != "versions"}, "out": str(out or "")})
        return
    last, virtual_time = report["accuracy"]["last"], "virtual " if gateway is None else ""
    sys.stdout.write(
        f"{trace.ended}: {len(trace.versions)} versions of {updates} updates by {trace.contributed} of "
        f"{trace.registered} devices in {trace.seconds:.0f} {virtual_time}seconds ({took:.1f} s)"
        f"{'' if last is None else f'; accuracy {last:.3f}'}\n"
    )


def _over_http(
    description: Description,
    url: str,
    trust: Path,
    issuer: tuple[str, Path],
    job: str,
    *,
    seconds: float,
    workers: int,
    production: bool,
) -> Trace:
    import tempfile

    import numpy as np

    from appliance.charter_files import read_file
    from fl.edge.kits.python.trainer import ExecuTorchTrainer
    from fl.edge.simulation.over_http import Issuer, simulate_over_http
    from fl.edge.simulation.population import Population
    from fl.edge.simulation.processors import SoftmaxRegression, digits
    from policies.keys import load_private_key

    pool, _ = digits()
    data = SoftmaxRegression(pool, description.data, description.training, description.population.seed)

    def data_of(number: int) -> tuple[Any, Any]:
        inputs, labels = data.data_of(np.array([number]))
        return inputs[0], labels[0]

    with tempfile.TemporaryDirectory(prefix="sealwright-devices-") as folder:
        return simulate_over_http(
            [url],
            read_file(trust),
            Issuer(issuer[0], load_private_key(issuer[1])),
            job,
            Population(description.population),
            data_of,
            ExecuTorchTrainer,
            Path(folder),
            seconds=seconds,
            workers=workers,
            production=production,
        )
