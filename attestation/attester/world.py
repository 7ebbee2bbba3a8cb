"""Which secure processor a guest asks for its evidence: said by the measured archive, and by nothing else.

A guest that looked around for a processor could be given a virtual one by its host. So the archive holds one word in
`etc/sealwright/attester`, which is in the measurement, and an archive built for hardware lacks the code for the other
world. Hiding the hardware from such a guest gives its host a refusal and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Literal, Protocol, cast

from attestation.errors import AttesterUnavailable
from attestation.evidence.composite import SnpEvidence

World = Literal["hardware", "virtual"]
WORLD_FILE = "etc/sealwright/attester"
WORLDS: dict[bytes, World] = {b"hardware\n": "hardware", b"virtual\n": "virtual"}
"""The two contents that the world file may have."""

REPORT_DATA_SIZE = 64


class Attester(Protocol):
    """A source of evidence about the guest that it runs in."""

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """Return a report over `report_data` (64 bytes) with the host's certificates.

        Raises AttesterUnavailable if the secure processor does not answer, or not in time.
        """
        ...


def read_world(guest: Path) -> World:
    """Return the world that the archive unpacked at `guest` was built for.

    Raises AttesterUnavailable if the archive lacks the file that says so, or says something else.
    """
    path = guest / WORLD_FILE
    try:
        with path.open("rb") as file:
            word = file.read(64)
    except OSError as error:
        raise AttesterUnavailable(
            "the measured archive does not say which attester the guest uses",
            where=WORLD_FILE,
            do="Make the image with `seal image generate`.",
        ) from error
    if word not in WORLDS:
        raise AttesterUnavailable(
            "the measured archive names an unknown attester",
            where=WORLD_FILE,
            do="It is `hardware` or `virtual`, and a line feed.",
        )
    return WORLDS[word]


def open_attester(world: World, port: Path | None = None) -> Attester:
    """Return the attester of `world`; `port` is the UNIX socket of the virtual platform and belongs to it alone.

    Raises AttesterUnavailable if this machine has no such processor, or this image no code for it.
    """
    if world == "hardware":
        from attestation.attester.hardware import open_hardware

        return open_hardware()
    name = "attestation.attester.virtual_port"
    if importlib.util.find_spec(name) is None:
        raise AttesterUnavailable(
            "this image was built for hardware and holds no code for the virtual platform",
            where="attester",
            do="Start a virtual image on the virtual platform, and this one on SEV-SNP hardware.",
        )
    if port is None:
        raise AttesterUnavailable(
            "the virtual platform's port was not handed to the guest",
            where="attester",
            do="Start the guest by `seal vm launch`.",
        )
    module = importlib.import_module(name)
    return cast(Attester, module.VirtualPort(port))


def check_report_data(report_data: bytes) -> bytes:
    """Return `report_data`, or raise ValueError unless it is 64 bytes (a mistake of the caller, not of the world)."""
    if len(report_data) != REPORT_DATA_SIZE:
        raise ValueError(f"REPORT_DATA has {REPORT_DATA_SIZE} bytes, not {len(report_data)}")
    return report_data
