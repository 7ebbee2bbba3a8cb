"""`seal poc`: all services of production on this machine, for the recipes of one author."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

app = typer.Typer(add_completion=False)

WATCH_SECONDS = 0.5


@app.command(epilog="Example: seal poc build/poc --site site-1 --site site-2 --bundle build/bundle/job.bundle")
def poc(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where everything goes; made, or empty.")],
    bundle: Annotated[list[Path], typer.Option("--bundle", metavar="FILE", help="A job.bundle that is approved.")],
    site: Annotated[list[str] | None, typer.Option("--site", help="A site's name; once for each.")] = None,
    gateway: Annotated[
        list[str] | None, typer.Option("--gateway", help="A gateway's name, for jobs of devices; once for each.")
    ] = None,
    inner: Annotated[
        list[str] | None, typer.Option("--inner", help="An inner node's name, above gateways; once for each.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="SITE=DIR", help="A site's folder of data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when everything runs.")] = False,
) -> int:
    """Start a broker, a server and sites, or gateways, on the virtual platform, from a charter that is made anew.

    It tells the kit with which jobs are submitted, and runs until its standard input ends or it is interrupted.
    """
    from appliance.poc import Poc

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: dict[str, Path] = {}
    for word in data or []:
        name, equals, path = word.partition("=")
        if not equals or name not in (site or []) or not Path(path).is_dir():
            raise Unusable(f"{word!r} is not SITE=FOLDER of a site", where="--data", do="Name a site and its folder.")
        found[name] = Path(path).absolute()
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise Unusable(f"{folder} is not empty", where="FOLDER", do="Name a folder that is to be made.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    setup = Poc(folder, site or [], found, [path.absolute() for path in bundle], gateway or [], inner or [])
    with setup.running() as (processes, gateways):
        if as_json:
            print_json(
                {"kit": str(setup.kit), "server": "poc-server", "sites": site or [], **setup.for_devices(gateways)}
            )
        else:
            sys.stdout.write(f"everything runs; submit with --kit {setup.kit}\n")
        sys.stdout.flush()
        while True:
            dead = processes.dead()
            if dead is not None:
                raise dead
            readable, _, _ = select.select([sys.stdin], [], [], WATCH_SECONDS)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                return 0
