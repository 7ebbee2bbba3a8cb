"""What a simulation is kept away from: released keys, a site's data, and whatever is on another machine.

A simulation is not attested, so nothing that was given to attested guests, or to a member's users, belongs into it.
None of this stops an author who means to copy such data into the simulation's folder: it keeps a mistake from working.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fl.errors import SimulationRefused

GUEST_FOLDERS: Final = (Path("/run/vault"), Path("/run/user_data"))
"""Where a guest opens its vault and its data volume with released keys."""
KIT_FILE: Final = "kit.dsse.json"
SEALED: Final = b"SEAL1"
"""With these bytes a sealed file begins (`fl.guard.sealed_data`)."""
LOOKED_AT: Final = 1000
"""Of so many files in a folder of data the beginnings are looked at."""
_ELSEWHERE: Final = re.compile(r"[^/\\]+:[/\\]|//[^/]|\\\\")
_HOST: Final = re.compile(r"(?:(?P<scheme>[a-z]+)://)?(?P<host>\[[0-9A-Fa-f:]+\]|[^:/\[\]]+)(?::\d{1,5})?/?")


def refuse_in_guest(folders: Iterable[Path] = GUEST_FOLDERS) -> None:
    """Raises SimulationRefused in a guest of a consortium, and in a job's training script, wherever that runs."""
    from fl import client

    if client.is_part_of_a_job():
        raise SimulationRefused(
            "a job's training script starts no simulation: a site's data may be here", where="SimEnv"
        )
    for folder in folders:
        if folder.exists():
            what = f"a guest starts no simulation: {folder} is opened with a key that was released to it"
            raise SimulationRefused(what, where="SimEnv")


def on_this_machine(path: str | Path, *, where: str) -> Path:
    """The path, if it is one of this machine's. Raises SimulationRefused for a URL, or a host with a path on it."""
    if _ELSEWHERE.match(str(path)):
        raise SimulationRefused(
            f"{str(path)[:200]} is an address, and a simulation reaches no other machine", where=where
        )
    return Path(path)


def refuse_kit(folder: Path, *, where: str) -> None:
    """Raises SimulationRefused for a folder that is a kit, lies in one, or has one among its own."""
    folder = folder.resolve()
    for one in (folder, *folder.parents):
        if (one / KIT_FILE).exists():
            raise SimulationRefused(f"{one} is a kit: its keys belong to attested jobs", where=where)


def refuse_site_data(folder: Path, *, where: str) -> None:
    """Raises SimulationRefused for data that were sealed for an attested site, or that lie in a kit."""
    refuse_kit(folder, where=where)
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    for file in itertools.islice(files, LOOKED_AT):
        if file.name == KIT_FILE:
            raise SimulationRefused(f"{file.parent} is a kit: its keys belong to attested jobs", where=where)
        if _begins_sealed(file):
            what = f"{file} is a site's sealed data: its key is released to the attested site alone"
            raise SimulationRefused(what, where=where)


def refuse_remote_cluster(address: str | None) -> None:
    """Raises SimulationRefused unless `address` (Ray's RAY_ADDRESS) is of this machine.

    A cluster may have many machines: the one on which the simulation is started has to be one of them, and Ray is then
    asked for the cluster that runs here.
    """
    if address in (None, "", "auto", "local"):
        return
    found = _HOST.fullmatch(address or "")
    if found is None or not _is_own(found["host"].strip("[]")):
        what = f"RAY_ADDRESS is {address!r}, another machine, and a simulation is told of none"
        do = 'Start it on a machine of the cluster, with RAY_ADDRESS="auto".'
        raise SimulationRefused(what, where="RAY_ADDRESS", do=do)


def _begins_sealed(file: Path) -> bool:
    if not file.is_file():  # a pipe would keep its opener waiting
        return False
    try:
        with file.open("rb") as opened:
            return opened.read(len(SEALED)) == SEALED
    except OSError:
        return False  # what cannot be read here cannot be read by a client of this user either


def _is_own(host: str) -> bool:
    """Whether a name or an address is of this machine: an address is, if something can listen at it."""
    if host in {"localhost", socket.gethostname()}:
        return True
    try:
        ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (OSError, ValueError):
        return False
    return True
