"""`seal secret`: deposit a member's own resources at a broker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Deposit a member's own resources at a broker.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def secret() -> None:
    """Deposit a member's own resources at a broker."""


@app.command(
    epilog="Example: seal secret put borealis-hospital/key/data data.key --key borealis.pem "
    "--broker one=https://broker.example:8443 --root root.json"
)
def put(
    resource: Annotated[str, typer.Argument(metavar="RESOURCE", help="MEMBER/TYPE/TAG.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file with the value (mode 0600).")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The owning member's signing key.")],
    broker: Annotated[str, typer.Option("--broker", metavar="NAME=URL", help="The broker to deposit at.")],
    root: Annotated[Path, typer.Option("--root", metavar="ROOT", help="The charter's first root (1.root.json).")],
    as_json: AsJson = False,
) -> None:
    """Deposit FILE's content as RESOURCE: signed by its owner's key, over TLS pinned to the broker of the charter."""
    from attestation.connection import fetch_charter
    from attestation.endorsements.sources import read_bounded
    from attestation.messages import MAX_SECRET
    from policies.documents import RESOURCE_PATTERN
    from policies.keys import load_private_key, read_secret

    if not re.fullmatch(RESOURCE_PATTERN, resource):
        raise Unusable(f"{resource[:100]} is no resource", where="command line", do="Name it MEMBER/TYPE/TAG.")
    name, _, url = broker.partition("=")
    if not url:
        raise Unusable("the broker needs its name and URL", where="--broker", do="Write NAME=https://HOST:PORT.")
    value, owner_key = read_secret(file, MAX_SECRET), load_private_key(key)
    fetched = fetch_charter([(name, url)], root=read_bounded(root, 1024 * 1024, "root"))
    try:
        receipt = fetched.client.deposit(resource, value, owner_key, charter_id=fetched.charter.id)
    finally:
        fetched.client.close()
    if as_json:
        print_json({"resource": resource, "broker": name, "receipt": receipt.to_json()})
    else:
        typer.echo(f"{resource} is at {name}: ledger entry {receipt.index}")
