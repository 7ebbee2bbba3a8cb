"""`seal site list|status|restart|stop`: the server and its sites, by a user's kit. No shell, no path, no pattern."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from fl.environments.prod import ProdEnv
    from fl.transport.frames import Places, SiteReport

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
KitFolder = Annotated[Path, typer.Option("--kit", metavar="DIR", help="Your kit's folder.", envvar="SEAL_KIT")]
PlaceName = Annotated[str, typer.Argument(metavar="NAME", help="A site's name in the charter, or the server's.")]


def _env(kit: Path) -> ProdEnv:
    from fl.environments.prod import ProdEnv

    return ProdEnv(kit)


def _places(kit: Path) -> Places:
    with _env(kit).connected() as (client, _):
        return client.places()


def list_sites(kit: KitFolder, as_json: AsJson = False) -> None:
    """List the sites of the charter: connected since when, with a lease until when, at work in which jobs."""
    places = _places(kit)
    if as_json:
        print_json(places.model_dump(mode="json", exclude={"kind": True, "sites": {"__all__": {"kind"}}}))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("site", overflow="fold"), "member", "connected since", "lease until", "jobs")
    for site in places.sites:
        jobs = "\n".join(f"{job}: {state}" for job, state in site.jobs.items())
        table.add_row(site.name, site.member, site.connected or "not connected", site.lease_until or "-", jobs or "-")
    console = Console(highlight=False, markup=False)
    console.print(table)
    sys.stdout.write(_server_line(places) + "\n")


def status(name: PlaceName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Tell how one site stands, or the server; ends with 1 if the site is not connected."""
    places = _places(kit)
    if name == places.server:
        if as_json:
            print_json(places.model_dump(mode="json", exclude={"kind", "sites"}))
        else:
            sys.stdout.write(_server_line(places) + "\n")
        return
    site = next((one for one in places.sites if one.name == name), None)
    if site is None:
        raise Unusable(f"the charter has no site {name!r:.100}", where="NAME", do="`seal site list` lists them.")
    if as_json:
        print_json(site.model_dump(mode="json", exclude={"kind"}))
    else:
        sys.stdout.write("\n".join(_lines_of(site)) + "\n")
    if site.connected is None:
        raise typer.Exit(1)


def restart(name: PlaceName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Have a site of your member end its jobs and connect anew; or the server, whose jobs go on if it has a vault."""
    with _env(kit).connected() as (client, _):
        client.restart(name)
    _done(name, "restarted", as_json=as_json)


def stop(name: PlaceName, kit: KitFolder, as_json: AsJson = False) -> None:
    """Have a site of your member stop, or the server: its guest ends, and its host starts it again."""
    with _env(kit).connected() as (client, _):
        client.stop(name)
    _done(name, "stopped", as_json=as_json)


def _done(name: str, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, what: True})
    else:
        sys.stderr.write(f"{name} is being {what}\n")


def _server_line(places: Places) -> str:
    jobs = ", ".join(f"{count} {status.value}" for status, count in places.jobs.items()) or "none"
    connected = sum(site.connected is not None for site in places.sites)
    kept = "kept in its vault" if places.keeps_jobs else "kept in its memory"
    return (
        f"server {places.server} of {places.member}: serving since {places.serving}, charter version "
        f"{places.charter_version}, {connected} of {len(places.sites)} sites connected; jobs ({kept}): {jobs}"
    )


def _lines_of(site: SiteReport) -> list[str]:
    standing = "not connected"
    if site.connected is not None:
        standing = f"connected since {site.connected}, lease until {site.lease_until}"
    return [f"{site.name} of {site.member}: {standing}", *(f"  {job}: {state}" for job, state in site.jobs.items())]
