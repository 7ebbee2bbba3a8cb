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
    from attestation.broker.storage import read_database
    from attestation.broker.upkeep import open_folder
    from attestation.ledger.bundle import export_bundle

    with open_folder(broker) as (_, database):
        count, beyond = read_database(database, lambda step: export_bundle(step, folder))
    if as_json:
        print_json({"entries": count, "folder": str(folder), "not-cosigned": beyond})
        return
    typer.echo(f"{count} entries in {folder}")
    if beyond:
        typer.echo(f"{beyond} more are not cosigned by the witnesses yet, were answered to nobody, and are not in it.")


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


@app.command(
    "init-witness",
    epilog="Examples: seal audit init-witness witness/ --name w1 --member acme-pharma --url https://w1.example:8444; "
    "seal audit init-witness --broker broker/",
)
def init_witness(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="The new folder of a witness alone.")] = None,
    broker: Annotated[
        Path | None, typer.Option("--broker", metavar="DIR", help="The folder of a broker that is to be a witness too.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The witness's name in the charter.")] = None,
    member: Annotated[str | None, typer.Option(help="The member who runs it.")] = None,
    url: Annotated[str | None, typer.Option(help="Where brokers reach it.")] = None,
    listen: Annotated[str, typer.Option(help="Where it listens: host:port.")] = "0.0.0.0:8444",
    as_json: AsJson = False,
) -> None:
    """Make the key and the empty state of a witness of other members' ledgers, and print its entry for the charter."""
    from datetime import UTC, datetime

    from attestation.witness.config import add_witness, create_witness

    if broker is not None:
        if folder is not None or name or member or url:
            do = "Name the broker's folder alone; the witness has the broker's name and address."
            raise Unusable("a broker's witness has no folder, name or address of its own", where="command line", do=do)
        entry, where, start = add_witness(broker), broker / "witness.json", "(re)start the broker"
    elif folder is None or not name or not member or not url:
        do = "Name a folder, --name, --member and --url; or --broker with a broker's folder."
        raise Unusable("this does not say which witness to make", where="command line", do=do)
    else:
        at = datetime.now(UTC).replace(microsecond=0)
        entry = create_witness(folder, name=name, member=member, url=url, listen=listen, at=at)
        where, start = folder / "entry.json", f"start `seal audit witness {folder}/witness.toml`"
    if as_json:
        print_json({"file": str(where), "entry": entry.model_dump(mode="json")})
        return
    typer.echo(entry.to_bytes().decode())
    typer.echo(f"Next: have this entry ({where}) put into the charter's witnesses, then {start}.", err=True)


@app.command(epilog="Example: seal audit witness witness/witness.toml")
def witness(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The witness's settings (witness.toml).")],
) -> None:
    """Run a witness until it is told to end (SIGTERM): it cosigns other members' ledgers as long as they only grow."""
    from attestation.witness.server import run_witness

    run_witness(config.absolute())


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
