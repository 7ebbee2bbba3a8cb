"""`seal vm vault`: the file that becomes a guest's sealed volume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable


def add_verbs(app: typer.Typer) -> None:
    """Add the verb to `seal vm`."""
    app.command(epilog="Example: seal vm vault kits/server-acme-server/local/disks/vault --size 1024")(vault)


def vault(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; in a kit: `local/disks/vault`.")],
    size: Annotated[int, typer.Option(min=32, max=1 << 24, metavar="MIB", help="How large the volume is.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the empty disk on which a guest will keep its vault. The guest itself formats and seals it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as made:
            os.fchmod(made.fileno(), 0o600)
            made.truncate(size << 20)
    except FileExistsError:
        raise Unusable(
            "there is something already", where=str(file), do="Name a new file: a vault's disk is never made anew."
        ) from None
    except OSError as error:
        raise Unusable(f"the disk cannot be made: {error.strerror}", where=str(file), do="Name another file.") from None
    if as_json:
        print_json({"file": str(file), "mib": size})
    else:
        typer.echo(f"{file}: {size} MiB")
