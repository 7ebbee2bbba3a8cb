"""`seal secret`: deposit a member's own resources, whole at a broker or split over several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from appliance.splitting import Dealt

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Deposit a member's own resources at brokers.")

Resource = Annotated[str, typer.Argument(metavar="RESOURCE", help="MEMBER/TYPE/TAG.")]
ValueFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file with the value (mode 0600).")]
OwnerKey = Annotated[Path, typer.Option("--key", metavar="FILE", help="The owning member's signing key.")]
Brokers = Annotated[
    list[str], typer.Option("--broker", metavar="NAME=URL", help="A broker that gets a share; several.")
]
Root = Annotated[Path, typer.Option("--root", metavar="ROOT", help="The charter's first root (1.root.json).")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the charter's document is to be written.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def secret() -> None:
    """Deposit a member's own resources, whole at a broker or split over several."""


@app.command(
    epilog="Example: seal secret put borealis-hospital/key/data data.key --key borealis.pem "
    "--broker one=https://broker.example:8443 --root root.json"
)
def put(
    resource: Resource,
    file: ValueFile,
    key: OwnerKey,
    broker: Annotated[str, typer.Option("--broker", metavar="NAME=URL", help="The broker to deposit at.")],
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Deposit FILE's content as RESOURCE: signed by its owner's key, over TLS pinned to the broker of the charter."""
    from attestation.connection import fetch_charter
    from attestation.endorsements.sources import read_bounded
    from attestation.messages import MAX_SECRET
    from policies.keys import load_private_key, read_secret

    _check_name(resource)
    name, url = _address(broker)
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


@app.command(
    epilog="Example: seal secret split acme-pharma/key/model model.key --k 2 --key acme.pem --root root.json "
    "--broker one=https://a.example:8443 --broker two=https://b.example:8443 --broker three=https://c.example:8443"
)
def split(
    resource: Resource,
    file: ValueFile,
    key: OwnerKey,
    broker: Brokers,
    root: Root,
    k: Annotated[int, typer.Option("--k", help="How many shares join: more than half of them, at least 2.")],
    out: Out = Path("split.json"),
    as_json: AsJson = False,
) -> None:
    """Split FILE's content over brokers, so that any k of them can release it and fewer know nothing of it.

    Each broker gets its share; the document that the owner then puts into the charter is written to --out.
    """
    _deal(resource, file, key, broker, root, k, out, as_json=as_json, again=False)


@app.command(
    epilog="Example: seal secret refresh acme-pharma/key/model model.key --key acme.pem --root root.json "
    "--broker one=https://a.example:8443 --broker two=https://b.example:8443 --broker four=https://d.example:8443"
)
def refresh(
    resource: Resource,
    file: ValueFile,
    key: OwnerKey,
    broker: Brokers,
    root: Root,
    k: Annotated[int | None, typer.Option("--k", help="How many shares join; left out, as many as until now.")] = None,
    out: Out = Path("split.json"),
    as_json: AsJson = False,
) -> None:
    """Share a split resource anew, over the same brokers or others: shares of before do not mix with the new ones.

    Until the charter has the document of --out, guests join the shares of before.
    """
    _deal(resource, file, key, broker, root, k, out, as_json=as_json, again=True)


def _deal(
    resource: str,
    file: Path,
    key: Path,
    brokers: list[str],
    root: Path,
    k: int | None,
    out: Path,
    *,
    as_json: bool,
    again: bool,
) -> None:
    from appliance.charter_files import write_file
    from appliance.splitting import deal_out
    from attestation.endorsements.sources import read_bounded
    from attestation.messages import MAX_SECRET
    from policies.charter.layout import split_path
    from policies.keys import load_private_key, read_secret

    _check_name(resource)
    path = split_path(resource)
    if path is None:
        raise Unusable(
            f"{resource} cannot be split: its type has a dot", where="command line", do="Choose another type."
        )
    dealt = deal_out(
        resource,
        read_secret(file, MAX_SECRET),
        load_private_key(key),
        [_address(one) for one in brokers],
        read_bounded(root, 1024 * 1024, "root"),
        k,
        again=again,
    )
    write_file(out, dealt.document.to_bytes())
    if as_json:
        print_json(_told(dealt, path, out))
        return
    for name, receipt in dealt.receipts.items():
        typer.echo(f"share {dealt.document.index(name)} is at {name}: ledger entry {receipt.index}")
    typer.echo(f"Now put it into the charter: seal charter propose CHARTER --put {path}={out}")


def _told(dealt: Dealt, path: str, out: Path) -> dict[str, object]:
    return {
        "resource": dealt.document.resource,
        "k": dealt.document.k,
        "generation": dealt.document.generation,
        "target": path,
        "document": str(out),
        "receipts": {name: receipt.to_json() for name, receipt in dealt.receipts.items()},
    }


def _check_name(resource: str) -> None:
    from policies.documents import RESOURCE_PATTERN

    if not re.fullmatch(RESOURCE_PATTERN, resource):
        raise Unusable(f"{resource[:100]} is no resource", where="command line", do="Name it MEMBER/TYPE/TAG.")


def _address(broker: str) -> tuple[str, str]:
    name, _, url = broker.partition("=")
    if not url:
        raise Unusable("the broker needs its name and URL", where="--broker", do="Write NAME=https://HOST:PORT.")
    return name, url
