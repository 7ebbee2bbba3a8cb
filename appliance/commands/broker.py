"""`seal broker`: make a broker's folder, and run it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from appliance.output import print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run a broker: appraisal, key release, ledger.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(
    epilog="Example: seal broker init broker/ --name one --member acme-pharma --url https://broker.example:8443"
)
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The broker's new folder.")],
    name: Annotated[str, typer.Option(help="The broker's name in the charter.")],
    member: Annotated[str, typer.Option(help="The member who runs it.")],
    url: Annotated[str, typer.Option(help="Where guests reach it.")],
    listen: Annotated[str, typer.Option(help="Where it listens: host:port.")] = "0.0.0.0:8443",
    as_json: AsJson = False,
) -> None:
    """Make a broker's keys and settings; the entry for the charter is in DIR/entry.json."""
    from attestation.broker.config import create_broker

    now = datetime.now(UTC).replace(microsecond=0)
    entry = create_broker(folder, name=name, member=member, url=url, listen=listen, at=now)
    if as_json:
        print_json({"folder": str(folder), "entry": entry.model_dump(mode="json")})
        return
    typer.echo(f"Made {folder}/broker.toml and the broker's keys.")
    typer.echo(f"Next: have {folder}/entry.json put into the charter, then place the charter's first root at")
    typer.echo(
        f"{folder}/root.json and its store at {folder}/charter, and start `seal broker run {folder}/broker.toml`."
    )


@app.command(epilog="Examples: seal broker run kits/broker-one; seal broker run broker/broker.toml")
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The broker's settings (broker.toml), or its kit.")],
    as_json: AsJson = False,
) -> None:
    """Run a broker until it is told to end (SIGTERM). Its log is JSON on standard error; one line says `ready`."""
    from appliance.kits.starting import broker_settings
    from attestation.broker.server import run_broker
    from policies.kits import is_kit

    run_broker((broker_settings(config) if is_kit(config) else config).absolute())
    if as_json:
        print_json({"ended": True})
