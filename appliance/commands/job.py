"""`seal job`: bundle a recipe, submit it with a user's kit, watch it, download its result, stop it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.commands.job_review import review
from appliance.commands.job_trace import trace
from appliance.output import print_json
from policies.errors import Refused, Unusable

if TYPE_CHECKING:
    from fl.environments.prod import ProdEnv
    from fl.jobs.bundle import Bundle
    from fl.transport.frames import JobReport

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Bundle, submit, watch and download federated jobs.")

app.command(epilog="Example: seal job review job.bundle --against approved.bundle --charter charter/")(review)
app.command(epilog="Example: seal job trace leaked.safetensors result/ --key model.key")(trace)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
KitFolder = Annotated[Path, typer.Option("--kit", metavar="DIR", help="Your kit's folder.", envvar="SEAL_KIT")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `submit` and `list` tell it.")]
BundleFile = Annotated[Path, typer.Argument(metavar="BUNDLE", help="job.bundle, as `seal job bundle` made it.")]


@app.command(
    epilog="Example: seal job run --compat nvflare job.py --n_clients 2",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    context: typer.Context,
    script: Annotated[
        Path, typer.Argument(metavar="SCRIPT", help="A script that executes a recipe; its words follow.")
    ],
    compat: Annotated[
        str | None,
        typer.Option("--compat", metavar="SYSTEM", help="Run a script that was written for another system: nvflare."),
    ] = None,
) -> int:
    """Run a script that executes a recipe, with all words after its name as its own.

    With --compat, what it and its training scripts import of another system is found here, under that system's names;
    what has no stand-in is told by its name. The status is the script's own.
    """
    from fl.compat import SYSTEMS

    if compat is not None and compat not in SYSTEMS:
        raise Unusable(f"there are no stand-ins for {compat}", where="--compat", do=f"There are: {', '.join(SYSTEMS)}.")
    if not script.is_file():
        raise Unusable(f"there is no file {script}", where="SCRIPT", do="Name the script that executes the recipe.")
    through = [] if compat is None else ["-m", "fl.compat", compat]
    done = subprocess.run([sys.executable, *through, str(script), *context.args], check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


@app.command(epilog="Example: seal job bundle examples/breast_cancer/job.py --out build/bundle")
def bundle(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="The script that makes and executes the recipe.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where job.bundle and model.safetensors go.")],
    as_json: AsJson = False,
) -> None:
    """Make the bundle of a recipe: every file of its folder and its settings, under one digest to be approved.

    The script is run as its author runs it, but the recipe's `execute` writes the bundle and ends it.
    """
    from fl.jobs.bundle import parse_bundle
    from fl.recipes.recipe import EXPORT_VARIABLE

    if not script.is_file():
        raise Unusable(f"there is no file {script}", where="SCRIPT", do="Name the script that executes the recipe.")
    with tempfile.TemporaryDirectory(prefix="sealwright-") as scratch:
        environment = {**os.environ, EXPORT_VARIABLE: scratch, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, str(script)], env=environment, stdout=sys.stderr, check=False)
        made = Path(scratch) / "job.bundle"
        if done.returncode != 0 or not made.is_file():
            raise Unusable(
                f"{script.name} ended with status {done.returncode} without executing a recipe",
                where=str(script),
                do="Run it in SimEnv first; it has to reach recipe.execute(...).",
            )
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(Path(scratch).rglob("*")):
            target = out / path.relative_to(scratch)
            if path.is_dir():
                target.mkdir(mode=0o700, exist_ok=True)
            else:
                shutil.copyfile(path, target)
    _show(parse_bundle((out / "job.bundle").read_bytes()), as_json=as_json)


@app.command(epilog="Example: seal job show build/bundle/job.bundle")
def show(
    file: BundleFile,
    print_file: Annotated[str | None, typer.Option("--file", metavar="PATH", help="Print this file's content.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a bundle: its digest, settings and files; or one file's content."""
    found = _read_bundle(file)
    if print_file is None:
        _show(found, as_json=as_json)
        return
    content = found.files.get(print_file)
    if content is None:
        raise Unusable(f"the bundle has no file {print_file}", where=str(file), do="`seal job show` lists its files.")
    text = content.decode(errors="backslashreplace")
    if as_json:
        print_json({"path": print_file, "content": text})
    else:
        sys.stdout.write("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))


@app.command(
    epilog="Example: seal job submit build/bundle/job.bundle --model build/bundle/model.safetensors --kit kit/"
)
def submit(
    file: BundleFile,
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="The first model (safetensors).")],
    kit: KitFolder,
    files: Annotated[
        Path | None,
        typer.Option("--files", metavar="DIR", help="Large files by digest (default: files/ beside the bundle)."),
    ] = None,
    site: Annotated[list[str] | None, typer.Option("--site", help="A site (default: all that may run it).")] = None,
    recipient: Annotated[
        list[str] | None, typer.Option("--recipient", metavar="MEMBER/USER", help="Who gets the result (default: you).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit an approved bundle with a first model; prints the job's id."""
    from fl.environments.prod import ProdEnv
    from fl.guard.gate import admit_update
    from fl.recipes.recipe import FILES_FOLDER
    from fl.transport.memory import SealedMemory

    found = _read_bundle(file)
    if not model.is_file():
        raise Unusable(f"there is no file {model}", where="--model", do="`seal job bundle` writes it.")
    env = ProdEnv(kit, sites=site, recipients=recipient)
    with SealedMemory.of(model.read_bytes()) as memory:
        admit_update(memory.view, found.settings.schema_of_model, site=str(model))
        folder = file.parent / FILES_FOLDER if files is None else files
        run = env.submit(found, memory, {one.sha256: folder / one.sha256 for one in found.settings.files})
    if as_json:
        print_json({"job": run.get_job_id()})
    else:
        sys.stdout.write(run.get_job_id() + "\n")


@app.command(name="list", epilog="Example: seal job list --kit kit/")
def list_jobs(kit: KitFolder, as_json: AsJson = False) -> None:
    """List the server's jobs, and the sites that are connected."""
    with _env(kit).connected() as (client, _):
        reports = client.reports()
    if as_json:
        print_json(reports.model_dump(mode="json", exclude={"kind"}))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("job", overflow="fold", min_width=44), "status", "round", "submitter", "created")
    for report in reports.jobs:
        table.add_row(report.job, report.status.value, _round_of(report), report.submitter, report.created)
    console = Console()
    console.print(table)
    console.print(f"connected sites: {', '.join(reports.sites) or 'none'}")


@app.command(epilog="Example: seal job status trial-20260131-120000-0a1b2c3d --kit kit/")
def status(job: JobName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Tell a job's state; ends with 1 if it failed or was stopped."""
    with _env(kit).connected() as (client, _):
        report = client.report(job)
    _tell(report, as_json=as_json)


@app.command(epilog="Example: seal job watch trial-20260131-120000-0a1b2c3d --kit kit/")
def watch(job: JobName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Follow a job until it is over: live in a terminal, a line for each event else; ends with 1 if it failed."""
    from fl.environments.display import Display
    from fl.jobs.progress import line_of

    with _env(kit).connected() as (client, _):
        report = client.report(job)
        with Display(report.name, report.num_rounds, sys.stderr) as display:
            for event in client.watch(job):
                display.observe(event)
                if not display.live and not as_json and (line := line_of(event)):
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()
        report = client.report(job)
    _tell(report, as_json=as_json)


@app.command(epilog="Example: seal job logs trial-20260131-120000-0a1b2c3d --kit kit/ --tail 50 --grep refused")
def logs(
    job: JobName,
    kit: KitFolder,
    tail: Annotated[int, typer.Option("--tail", min=0, max=10_000, help="So many lines, the last ones.")] = 100,
    grep: Annotated[str, typer.Option("--grep", metavar="TEXT", help="Lines with this text; it is no pattern.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show what has happened in a job so far; what sites' scripts print never leaves their sites."""
    lines = _env(kit).run(job).logs(tail=tail, grep=grep)
    if as_json:
        print_json({"job": job, "lines": lines})
    else:
        sys.stdout.write("".join(line + "\n" for line in lines))


@app.command(epilog="Example: seal job download trial-20260131-120000-0a1b2c3d --kit kit/ --out result/")
def download(
    job: JobName,
    kit: KitFolder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that is made.")],
    as_json: AsJson = False,
) -> None:
    """Download a job's result, verify its statement and its place in the ledger, and open it."""
    if out.exists() and any(out.iterdir()):
        raise Unusable(f"{out} is not empty", where="--out", do="Name a folder that is to be made.")
    from attestation.client import ledger_keys

    with _env(kit).connected() as (client, current):
        folder = client.download(job, out, ledgers=ledger_keys(current.charter))
    if as_json:
        print_json({"job": job, "folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
    else:
        sys.stdout.write(f"{folder}\n")


@app.command(epilog="Example: seal job abort trial-20260131-120000-0a1b2c3d --kit kit/")
def abort(job: JobName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Stop a job: your own, or any if you have the right to operate."""
    with _env(kit).connected() as (client, _):
        client.abort(job)
    if as_json:
        print_json({"job": job, "aborted": True})
    else:
        sys.stderr.write(f"{job} is being stopped\n")


@app.command(epilog="Example: seal job delete trial-20260131-120000-0a1b2c3d --kit kit/")
def delete(job: JobName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Have the server forget a job that is over, and its result: your own, or any with the right to operate."""
    with _env(kit).connected() as (client, _):
        client.delete(job)
    if as_json:
        print_json({"job": job, "deleted": True})
    else:
        sys.stderr.write(f"{job} is deleted at the server; the ledger has what it was\n")


@app.command(epilog="Example: seal job clone trial-20260131-120000-0a1b2c3d --kit kit/")
def clone(
    job: JobName,
    kit: KitFolder,
    site: Annotated[list[str] | None, typer.Option("--site", help="A site (default: those of the job).")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job of your own once more, with the bundle and first model that the server keeps; prints the new id."""
    with _env(kit).connected() as (client, _):
        made = client.clone(job, roster=site)
    if as_json:
        print_json({"job": made})
    else:
        sys.stdout.write(made + "\n")


Why = Annotated[str, typer.Option("--why", help="One line for those who read the ledger.")]


@app.command(
    epilog="Example: seal job reject trial-20260131-120000-0a1b2c3d --kit kit/ --why 'our data is not for this'"
)
def reject(job: JobName, kit: KitFolder, why: Why = "", as_json: AsJson = False) -> None:
    """Take your member's sites out of a job, before it begins or while it runs; needs the right to approve."""
    with _env(kit).connected() as (client, _):
        client.reject(job, why)
    if as_json:
        print_json({"job": job, "rejected": True})
    else:
        sys.stderr.write(f"your member's sites take no part in {job}\n")


@app.command(epilog="Example: seal job approve trial-20260131-120000-0a1b2c3d --kit kit/")
def approve(job: JobName, kit: KitFolder, why: Why = "", as_json: AsJson = False) -> None:
    """Take back your member's rejection of a job that has not begun; needs the right to approve."""
    with _env(kit).connected() as (client, _):
        client.approve(job, why)
    if as_json:
        print_json({"job": job, "approved": True})
    else:
        sys.stderr.write(f"your member's sites may take part in {job}\n")


def _env(kit: Path) -> ProdEnv:
    from fl.environments.prod import ProdEnv

    return ProdEnv(kit)


def _read_bundle(file: Path) -> Bundle:
    from fl.jobs.bundle import MAX_BUNDLE, parse_bundle

    try:
        with file.open("rb") as stream:
            return parse_bundle(stream.read(MAX_BUNDLE + 1))
    except OSError as error:
        raise Unusable(f"{file} cannot be read: {error.strerror}", where="BUNDLE", do="Name a job.bundle.") from error


def _show(found: Bundle, *, as_json: bool) -> None:
    settings = found.settings
    if as_json:
        print_json({"digest": found.digest, **found.manifest.model_dump(mode="json")})
        return
    parameters = sum(spec.elements for spec in settings.schema_of_model.values())
    lines = [
        f"digest   {found.digest}",
        f"job      {settings.name}: {settings.recipe}, {settings.num_rounds} rounds, {settings.min_clients}+ sites",
        *([] if settings.options is None else [f"options  {settings.options.model_dump_json(exclude={'recipe'})}"]),
        f"script   {settings.train_script} {' '.join(settings.train_args)}".rstrip(),
        f"model    {parameters} numbers in {len(settings.model)} tensors, {settings.framework}, {settings.params_type}",
        *(f"file     {file.sha256[:16]}  {file.size:>8}  {file.path}" for file in found.manifest.files),
        *(f"large    {file.sha256[:16]}  {file.size:>8}  {file.path}" for file in settings.files),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _round_of(report: JobReport) -> str:
    return "-" if report.round is None else f"{report.round + 1} of {report.num_rounds}"


def _tell(report: JobReport, *, as_json: bool) -> None:
    body: dict[str, Any] = report.model_dump(mode="json", exclude={"kind"})
    if as_json:
        print_json(body)
    else:
        sys.stdout.write(f"{report.job}: {report.status.value}, round {_round_of(report)}\n")
        for name, state in report.sites.items():
            sys.stdout.write(f"  {name}: {state}\n")
    if report.status.value in {"failed", "aborted"}:
        if as_json:
            raise typer.Exit(1)
        raise Refused(
            f"job {report.job} {report.status.value}",
            where="job",
            do="See the reasons; `seal job watch` has every event.",
            reasons=report.reasons or ("no reason was given",),
        )
