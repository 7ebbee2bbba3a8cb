"""`seal doctor`: what this machine lacks, step by step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from appliance.doctor import Finding, Purpose, diagnose
from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(add_completion=False)


@app.command(epilog="Examples: seal doctor; seal doctor kits/site-borealis --trust root.json")
def doctor(
    kit: Annotated[
        Path | None, typer.Argument(metavar="[KIT]", help="A kit: tell what its place lacks on this host.")
    ] = None,
    purpose: Annotated[
        str, typer.Option("--for", help="demo (everything virtual, one machine) or guest-host (SEV-SNP).")
    ] = "demo",
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="ROOT", help="The charter's first root that you trust.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tell what this machine lacks, step by step; nothing is changed. With a kit, before anything of it starts."""
    if kit is not None:
        from appliance.charter_files import read_file
        from appliance.kits.diagnosis import diagnose_kit

        found = diagnose_kit(kit, trust=None if trust is None else read_file(trust))
        return _tell({"kit": str(kit)}, found, as_json=as_json)
    if purpose not in get_args(Purpose):
        raise Unusable(f"{purpose!r} is no purpose", where="--for", do=f"Name one of {', '.join(get_args(Purpose))}.")
    return _tell({"for": purpose}, diagnose("demo" if purpose == "demo" else "guest-host"), as_json=as_json)


def _tell(about: dict[str, str], findings: list[Finding], *, as_json: bool) -> int:
    """Print the findings as steps; return the exit status."""
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print_json({**about, "ok": healthy, "findings": [asdict(finding) for finding in findings]})
        return 0 if healthy else 1
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "", "check", "seen", "what to do"):
        table.add_column(column, overflow="fold")
    for step, finding in enumerate(findings, 1):
        mark = "[green]ok[/]" if finding.ok else "[red]missing[/]"
        do = "" if finding.ok else finding.do
        table.add_row(str(step), mark, escape(finding.check), escape(finding.seen), escape(do))
    Console().print(table)
    return 0 if healthy else 1
