"""`seal vm data`: a site's data volume, which its guest mounts read-only as `/user_data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make, fill and grow a site's data volume (`/user_data`)."
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The volume; in a kit: `local/disks/user-data`.")]
Key = Annotated[Path, typer.Option("--key", metavar="FILE", help="The volume's key (`seal site key`).")]
Size = Annotated[int, typer.Option("--size", min=1, max=1 << 28, metavar="MIB", help="How large the volume is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="Example: seal vm data make kits/site-borealis/local/disks/user-data --size 10240 --key volume.key")
def make(file: File, key: Key, size: Size, as_json: AsJson = False) -> None:
    """Make an empty volume, in a new file."""
    from appliance.data_filling import make_volume

    header = make_volume(file, size, _key(key))
    if as_json:
        print_json({"file": str(file), "volume": header.volume, "mib": size})
    else:
        typer.echo(f"{file}: {size} MiB, empty")


@app.command(epilog="Example: seal vm data fill kits/site-borealis/local/disks/user-data scans/ --key volume.key")
def fill(
    file: File,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder whose files are added.")],
    key: Key,
    as_json: AsJson = False,
) -> None:
    """Add the files of a folder, over those of the same names."""
    from appliance.data_filling import fill_volume, volume_facts

    secret = _key(key)
    fill_volume(file, folder, secret)
    facts = volume_facts(file, secret)
    if as_json:
        print_json(facts)
    else:
        typer.echo(f"{file}: {facts['used_mib']} of {facts['mib']} MiB used, generation {facts['generation']}")


@app.command(epilog="Example: seal vm data grow kits/site-borealis/local/disks/user-data --size 20480")
def grow(file: File, size: Size, as_json: AsJson = False) -> None:
    """Make a volume larger."""
    from appliance.data_filling import grow_volume

    before = grow_volume(file, size)
    if as_json:
        print_json({"file": str(file), "mib": size, "before_mib": before})
    else:
        typer.echo(f"{file}: {size} MiB, {before} before")


@app.command(epilog="Example: seal vm data show kits/site-borealis/local/disks/user-data --key volume.key")
def show(file: File, key: Key, as_json: AsJson = False) -> None:
    """Show a volume's size, how much of it is used, and how often it was filled."""
    from appliance.data_filling import volume_facts

    facts = volume_facts(file, _key(key))
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n".join(f"{name}: {value}" for name, value in facts.items()))


def _key(path: Path) -> bytes:
    from fl.guard.sealed_data import KEY_SIZE
    from policies.keys import read_secret

    secret = read_secret(path)
    if len(secret) != KEY_SIZE:
        raise Unusable(
            f"a volume's key has {KEY_SIZE} bytes, not {len(secret)}", where=str(path), do="Make one: `seal site key`."
        )
    return secret
