"""`seal audit`: take a ledger out of a broker, and check one offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from attestation.ledger.audit import AuditReport
    from attestation.ledger.audits import LedgersReport

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check a ledger, its receipts and evidence offline.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="The bundle's folder.")]
ROOT_LIMIT = 1024 * 1024


@app.command(epilog="Example: seal audit export /var/lib/sealwright/broker audit-2026-03/")
def export(
    broker: Annotated[Path, typer.Argument(metavar="BROKER", help="The broker's folder (running or not).")],
    folder: Bundle,
    as_json: AsJson = False,
) -> None:
    """Write a broker's whole ledger, with all that stands behind each entry, into the new folder DIR."""
    from attestation.broker.config import CONFIG_NAME, load_config
    from attestation.broker.storage import read_database
    from attestation.ledger.bundle import export_bundle

    database = broker / load_config(broker / CONFIG_NAME).database
    count = read_database(database, lambda step: export_bundle(step, folder))
    if as_json:
        print_json({"entries": count, "folder": str(folder)})
    else:
        typer.echo(f"{count} entries in {folder}")


@app.command(epilog="Example: seal audit verify audit-2026-03/ --trust root.json")
def verify(
    folder: Bundle,
    trust: Annotated[
        Path, typer.Option("--trust", metavar="ROOT", help="The charter's first root (1.root.json), from elsewhere.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check the bundle in DIR from the charter's first root alone: every file, every signature, every decision.

    DIR may hold the bundles of several brokers, each in a folder with its broker's name: then all are checked.
    """
    from attestation.endorsements.sources import read_bounded
    from attestation.ledger.audit import verify_audit
    from attestation.ledger.audits import holds_several, verify_audits

    root = read_bounded(trust, ROOT_LIMIT, "root")
    if not root.startswith(b"{"):
        raise Unusable("this is no charter's root", where=str(trust), do="Give 1.root.json as handed out.")
    found = verify_audits(folder, root) if holds_several(folder) else verify_audit(folder, root)
    if as_json:
        print_json(found.to_json())
    else:
        _tell(found)
    if not found.ok:
        raise typer.Exit(1)


def _tell(found: AuditReport | LedgersReport) -> None:
    from attestation.ledger.audit import AuditReport

    for problem in found.problems:
        typer.echo(f"{problem.file}: {problem.reason}")
    reports = [found] if isinstance(found, AuditReport) else list(found.ledgers.values())
    for report in reports:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
        typer.echo(f"{report.entries} entries ({kinds or 'none'}) of broker {report.broker or '?'}")
    if any(report.platform == "virtual" for report in reports):
        typer.echo("The platform is virtual: nothing here vouches for hardware.")
    typer.echo("The story holds." if found.ok else f"The story does not hold: {len(found.problems)} problems.")
