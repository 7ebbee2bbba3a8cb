"""`seal doctor`: what this machine lacks, step by step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, get_args

import typer

from appliance.doctor import Purpose, diagnose
from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    purpose: Annotated[
        str, typer.Option("--for", help="demo (everything virtual, one machine) or guest-host (SEV-SNP).")
    ] = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tell what this machine lacks, step by step; nothing is changed.

    Example: seal doctor --for guest-host
    """
    if purpose not in get_args(Purpose):
        raise Unusable(f"{purpose!r} is no purpose", where="--for", do=f"Name one of {', '.join(get_args(Purpose))}.")
    findings = diagnose("demo" if purpose == "demo" else "guest-host")
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print_json({"for": purpose, "ok": healthy, "findings": [asdict(finding) for finding in findings]})
        return 0 if healthy else 1
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "seen", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]missing[/]"
        table.add_row(mark, finding.check, finding.seen, "" if finding.ok else finding.do)
    Console().print(table)
    return 0 if healthy else 1
