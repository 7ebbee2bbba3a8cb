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
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, without its versions, as JSON.")] = False,
) -> None:
    """Simulate devices that come and go, train and report through a tree of gateways, in virtual time."""
    from fl.edge.simulation.description import read_description, simulate
    from fl.edge.simulation.report import document, page
    from fl.jobs.results import write_file, write_json

    description = read_description(file)
    if out is not None and out.exists() and not out.is_dir():
        raise Unusable("it is a file", where=str(out), do="Name a folder for the report.")
    said = time.monotonic()

    def made(step: Step, accuracy: float | None) -> None:
        nonlocal said
        if time.monotonic() - said >= 1:
            said = time.monotonic()
            reached = "" if accuracy is None else f", accuracy {accuracy:.3f}"
            sys.stderr.write(f"version {step.version}: {step.updates} updates{reached}\n")

    began = time.perf_counter()
    trace = simulate(description, workers=workers or len(os.sched_getaffinity(0)), made=made)
    seconds = time.perf_counter() - began
    updates = trace.outcomes["counted"]
    real = {"seconds": round(seconds, 2), "updates_a_second": round(updates / seconds, 1)}
    report: dict[str, Any] = document(trace, description.model_dump(mode="json"), {"real": real})
    if out is not None:
        write_json(out / "report.json", report)
        write_file(out / "report.html", page(report).encode())
    if as_json:
        print_json({**{key: value for key, value in report.items() if key != "versions"}, "out": str(out or "")})
        return
    last = report["accuracy"]["last"]
    sys.stdout.write(
        f"{trace.ended}: {len(trace.versions)} versions of {updates} updates by {trace.contributed} of "
        f"{trace.registered} devices in {trace.seconds:.0f} virtual seconds ({seconds:.1f} s)"
        f"{'' if last is None else f'; accuracy {last:.3f}'}\n"
    )
