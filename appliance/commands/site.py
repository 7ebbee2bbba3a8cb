"""`seal site`: what a site prepares on its own host (the key of its data, and the data sealed under it); and how
sites stand at the server (`appliance.commands.site_administration`)."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from appliance.commands.site_administration import list_sites, restart, status, stop
from appliance.commands.site_devices import device_certificate, device_token, group_key
from appliance.commands.site_simulate import simulate_devices
from appliance.commands.site_tree import tree
from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prepare a site's data; look after sites.")

app.command(name="list", epilog="Example: seal site list --kit kit/")(list_sites)
app.command(epilog="Example: seal site status borealis-site --kit kit/")(status)
app.command(epilog="Example: seal site restart borealis-site --kit kit/")(restart)
app.command(epilog="Example: seal site stop borealis-site --kit kit/")(stop)
app.command(epilog="Example: seal site simulate-devices devices.toml --out report/")(simulate_devices)
app.command(epilog="Example: seal site group-key new.key --after group.key")(group_key)
app.command(epilog="Example: seal site device-token charter/ device.pub --issuer phones --key phones.pem")(device_token)
app.command(epilog="Example: seal site device-certificate charter/ device.pub --issuer phones --key phones.pem")(
    device_certificate
)
app.command(
    epilog="Example: seal site tree --depth 2 --width 3 --server hub --member acme-pharma --image edge"
    " --domain edge.example --group-key acme-pharma/edge/group"
)(tree)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="Example: seal site key data.key")
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file (0600) for the key.")],
    as_json: AsJson = False,
) -> None:
    """Make a data key, 32 random bytes: deposit it with `seal secret put`, and seal the data under it."""
    from policies.keys import write_secret

    if file.exists():
        raise Unusable("there is a file already", where=str(file), do="Name a new file; data are sealed under the old.")
    write_secret(file, os.urandom(32))
    if as_json:
        print_json({"key": str(file)})


@app.command(epilog="Example: seal site seal train.safetensors=patients.safetensors --key data.key --out data.sealed")
def seal(
    entry: Annotated[
        list[str], typer.Argument(metavar="NAME=FILE...", help="Files, under the names that jobs know them by.")
    ],
    key_file: Annotated[Path, typer.Option("--key", metavar="FILE", help="The data key (`seal site key`).")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The sealed file: the guest's disk `data`.")],
    as_json: AsJson = False,
) -> None:
    """Encrypt a site's data into one file that its guest alone can open, in memory."""
    from fl.guard.sealed_data import KEY_SIZE, NAME, seal_file
    from policies.keys import read_secret

    secret = read_secret(key_file)
    if len(secret) != KEY_SIZE:
        raise Unusable(
            f"a data key has {KEY_SIZE} bytes, not {len(secret)}", where=str(key_file), do="Make one: `seal site key`."
        )
    entries: dict[str, bytes] = {}
    for word in entry:
        name, equals, path = word.partition("=")
        if not equals or not re.fullmatch(NAME, name) or name in entries:
            raise Unusable(f"{word!r} is no NAME=FILE", where="command line", do="As train.safetensors=patients.bin.")
        try:
            entries[name] = Path(path).read_bytes()
        except OSError as error:
            raise Unusable(
                f"cannot be read: {error.strerror}", where=path, do="Name a file that can be read."
            ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    seal_file(out, entries, secret)
    if as_json:
        print_json({"file": str(out), "bytes": out.stat().st_size, "entries": sorted(entries)})
    else:
        sys.stderr.write(f"Sealed {', '.join(sorted(entries))} into {out}.\n")


@app.command(epilog="Example: seal site exports audit/ --trust root.json --site borealis-site")
def exports(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An audit bundle (`seal audit export`), or several.")],
    trust: Annotated[Path, typer.Option("--trust", metavar="ROOT", help="The charter's first root, 1.root.json.")],
    site: Annotated[str | None, typer.Option("--site", help="This site's alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what left sites, when, to whom, and what of their owners' budgets it took; the audit is verified first."""
    from appliance.exports_shown import exports_of
    from policies.budgets import described

    try:
        root = trust.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}", where=str(trust), do="Name the charter's root.") from error
    if not folder.is_dir():
        raise Unusable("there is no such folder", where=str(folder), do="Make one: seal audit export BROKER DIR.")
    shown = exports_of(folder, root, site)
    if as_json:
        print_json({"exports": [one.to_json() for one in shown]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("time", "site", "job", "round", "to", "amount", "spent so far", box=None, pad_edge=False)
    for one in shown:
        spent = f"refused: {'; '.join(one.reasons)}" if one.spent is None else described(one.spent)
        export, amount = one.export, described(one.export.amount)
        when = one.time.strftime("%Y-%m-%dT%H:%M:%SZ")
        table.add_row(when, one.site, export.job, str(export.round + 1), export.recipient, amount, spent)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
