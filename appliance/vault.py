"""A guest's vault while it is open: the sealed volume on its disk, and what its brokers remember of it.

The key comes from the brokers, after they have appraised the guest; the volume opens only then, and goes on only if the
store in it is the one that they committed last. A newer boot of the same guest takes the vault over: the older one is
refused at its next renewal, and ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.data_volume import DataVolumeRefused
from appliance.sealed_volume import DISK, SealedVolume, changed_blocks_refused, format_volume, open_volume
from attestation.client import GuestSession
from attestation.guest_vault import GuestVault, open_vault
from policies.documents import Resource
from policies.errors import Refused, Unusable
from policies.init_data import InitData
from policies.vaults import vault_place

STARTS = "starts"
"""In the store: how often the vault was opened. Counting it makes the store of every boot a new one."""

DATA_VOLUME = "data-volume-"
"""In the store, before a data volume's identity: its newest generation."""


@dataclass(frozen=True)
class Vault:
    """An open vault."""

    folder: Path
    """Where the volume is mounted; it is gone when the guest ends."""
    state: GuestVault
    """Values that must never go back, kept by the brokers' word."""

    def never_older(self, volume: str, generation: int) -> None:
        """See that a data volume is not older than this guest has seen it, and remember how new it is.

        Raises DataVolumeRefused for one that is.
        """
        name = f"{DATA_VOLUME}{volume}"
        seen = int.from_bytes(self.state.entries.get(name, b""), "big")
        if generation < seen:
            raise DataVolumeRefused(f"the data volume was rolled back: to generation {generation}, after {seen}")
        if generation > seen:
            self.state.save({**self.state.entries, name: generation.to_bytes(8, "big")})


def vault_of(init: InitData) -> Resource | None:
    """The vault that the init-data ask for among the resources; None if there is none. Raises Unusable for several."""
    named = sorted({resource for resource in init.resources.values() if vault_place(resource) is not None})
    if len(named) > 1:
        raise Unusable(
            f"the init-data ask for several vaults: {', '.join(named)}",
            where="init-data",
            do="Name one, and enrol the guest anew.",
        )
    return named[0] if named else None


@contextmanager
def opened_vault(session: GuestSession, name: Resource, disks: Mapping[str, Path]) -> Iterator[Vault]:
    """Open the vault `name` on the disk that the host attached for it, and close it when the block is left.

    Raises what `open_vault` and `open_volume` raise, and Refused if the host attached no such disk.
    """
    disk = disks.get(DISK)
    if disk is None:
        raise Refused(
            f"the host attached no disk with the serial {DISK}, on which the vault {name} lies",
            where=DISK,
            do="Attach the disk; a new one is made by `seal vm vault`.",
        )
    volumes: list[SealedVolume] = []

    def mount(key: bytes, fresh: bool) -> Path:
        if fresh:
            format_volume(disk, key)
        volumes.append(open_volume(disk, key))
        return volumes[-1].folder

    try:
        with changed_blocks_refused():
            state = open_vault(session, mount, vault=name)
            starts = int.from_bytes(state.entries.get(STARTS, b""), "big") + 1
            state.save({**state.entries, STARTS: starts.to_bytes(8, "big")})
            yield Vault(volumes[-1].folder, state)
    finally:
        for volume in volumes:
            volume.close()
