"""`seal broker`: make a broker's folder, and run it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.commands import broker_cold_start
from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from attestation.broker.upkeep import Copied

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run a broker: appraisal, key release, ledger.")
app.add_typer(broker_cold_start.app, name="cold-start")


class Rotated(StrEnum):
    """What is replaced."""

    KEYS = "keys"
    KEK = "kek"


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


@app.command(epilog="Example: seal broker check one=https://broker.example:8443 --root root.json --wait 30")
def check(
    broker: Annotated[
        str, typer.Argument(metavar="NAME=URL", help="The broker's name in the charter, and where it is.")
    ],
    root: Annotated[Path, typer.Option("--root", metavar="ROOT", help="The charter's first root (1.root.json).")],
    wait: Annotated[float, typer.Option(min=0, max=600, help="Seconds to wait until it can be reached.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask a broker who it is: its key, its time, its charter and its ledger's head, all checked from the root."""
    from attestation.canonical import format_time
    from attestation.connection import fetch_charter
    from attestation.endorsements.sources import read_bounded
    from attestation.errors import BrokerUnavailable
    from attestation.ledger.checkpoint import parse_checkpoint

    name, _, url = broker.partition("=")
    if not url:
        raise Unusable("the broker needs its name and URL", where="command line", do="Write NAME=https://HOST:PORT.")
    trusted, end = read_bounded(root, 1024 * 1024, "root"), time.monotonic() + wait
    while True:
        try:
            fetched = fetch_charter([(name, url)], root=trusted)
            break
        except BrokerUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    try:
        head = parse_checkpoint(fetched.client.checkpoint())
    finally:
        fetched.client.close()
    charter = fetched.charter
    found = {
        "broker": name,
        "time": format_time(fetched.at),
        "charter": {"id": charter.id, "version": charter.version, "expires": format_time(charter.expires)},
        "platform": charter.consortium.platform,
        "ledger": {"origin": head.origin, "entries": head.size},
    }
    if as_json:
        print_json(found)
        return
    typer.echo(f"{name} is the charter's broker; it says it is {format_time(fetched.at)}.")
    typer.echo(
        f"Charter {charter.id[:16]}… version {charter.version} ({charter.consortium.platform}), {head.size} entries."
    )


BrokerFolder = Annotated[Path, typer.Argument(metavar="BROKER", help="The broker's folder.")]


@app.command(epilog="Example: seal broker backup /var/lib/seal-broker broker-2026-03-01.sqlite")
def backup(
    folder: BrokerFolder,
    copy: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
    as_json: AsJson = False,
) -> None:
    """Copy a broker's database (running or not) to FILE. Its keys are not in it: keep them elsewhere."""
    from attestation.broker.upkeep import back_up

    _said(back_up(folder, copy), copy, as_json=as_json)


@app.command(epilog="Example: seal broker restore /var/lib/seal-broker broker-2026-03-01.sqlite")
def restore(
    folder: BrokerFolder,
    copy: Annotated[Path, typer.Argument(metavar="FILE", help="What `seal broker backup` made.")],
    as_json: AsJson = False,
) -> None:
    """Put a backup in place of the database of a broker that does not run. A shorter ledger is refused."""
    from attestation.broker import upkeep

    found = upkeep.restore(folder, copy)
    _said(found, folder, as_json=as_json)
    if not as_json:
        typer.echo("What was decided since is not in it, and limits of use do not count it. If another database was")
        typer.echo(
            "there, tell the other members: their witnesses, and who holds a later receipt, know what is missing."
        )
        typer.echo("All sessions have ended; guests attest again.")


@app.command(epilog="Example: seal broker migrate /var/lib/seal-broker")
def migrate(folder: BrokerFolder, as_json: AsJson = False) -> None:
    """Bring the database of a broker that does not run to this version's schema, at once. Back it up first."""
    from attestation.broker import upkeep

    old, new = upkeep.migrate(folder)
    if as_json:
        print_json({"from": old, "to": new})
    else:
        typer.echo(f"It has schema {new} already." if old == new else f"The database went from schema {old} to {new}.")


@app.command(
    epilog="Examples: seal broker rotate keys /var/lib/seal-broker; seal broker rotate kek /var/lib/seal-broker"
)
def rotate(
    what: Annotated[Rotated, typer.Argument(metavar="keys|kek", help="Signing and issuer keys, or the KEK file.")],
    folder: BrokerFolder,
    as_json: AsJson = False,
) -> None:
    """Replace a broker's keys while it serves: make the next ones for the charter, or a new key-encryption key."""
    from attestation.broker.rotation import rotate_kek, rotate_keys

    if what == Rotated.KEK:
        old, new = rotate_kek(folder)
        if as_json:
            print_json({"from": old, "to": new})
            return
        typer.echo(f"The key-encryption key is {new} now; {old} is kept in {folder} until no resource is under it.")
        typer.echo("Have the broker reload (SIGHUP). `seal broker keys` says how many resources are under which.")
        return
    entry = rotate_keys(folder, datetime.now(UTC).replace(microsecond=0))
    if as_json:
        print_json({"entry": entry.model_dump(mode="json")})
        return
    typer.echo(f"Made the next keys of {entry.name}; {folder}/next-entry.json has their public halves.")
    typer.echo("Next: have them put into the charter (`seal charter rotate --broker`) and publish it to the broker,")
    typer.echo("which uses them from then on. Until then it uses those that it has.")


@app.command(epilog="Example: seal broker keys /var/lib/seal-broker")
def keys(folder: BrokerFolder, as_json: AsJson = False) -> None:
    """Say which keys a broker has, and how many resources are under which key-encryption key."""
    from attestation.broker.rotation import key_state

    state = key_state(folder)
    if as_json:
        print_json(state.to_json())
        return
    typer.echo(f"Signing key {state.signing[:16]}…" + (" (the next is made)" if state.next_signing else ""))
    typer.echo(f"Key-encryption key in use: {state.kek}")
    for key_id, count in state.resources.items():
        typer.echo(f"  {count} resources under {key_id}")
    for key_id in state.unused:
        typer.echo(f"  nothing is under {key_id} any more: once no backup needs it, remove it")


def _said(copied: Copied, where: Path, *, as_json: bool) -> None:
    from attestation.canonical import format_time

    last = None if copied.last is None else format_time(copied.last)
    if as_json:
        print_json({"entries": copied.entries, "last": last, "where": str(where)})
    else:
        typer.echo(f"{copied.entries} ledger entries are in {where}" + (f", the last of {last}." if last else "."))
