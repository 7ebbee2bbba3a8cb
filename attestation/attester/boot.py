"""What a guest finds at its start: the measured command line, and what its host passed in.

The command line and the archive are in the measurement. Init-data are the host's choice, bound by HOST_DATA; disks and
the port are the host's and earn nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.attester.world import Attester, World, open_attester, read_world
from attestation.errors import AttesterUnavailable

if TYPE_CHECKING:
    from attestation.attester.gpu import SdkDevices
    from attestation.attester.gpu_session import GpuSession

BOOT_FILE = "run/boot.json"
GPU_PYTHON = "usr/lib/sealwright/gpu-sdk/bin/python"
"""The Python of NVIDIA's SDK in an image that is made for GPUs: in the measurement, so no host adds or takes it."""
MAX_BOOT = 64 * 1024
MAX_INIT_DATA = 64 * 1024

DiskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class BootDocument(BaseModel):
    """`run/boot.json`, as the virtual platform writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cmdline: Annotated[str, Field(max_length=4096)]
    init_data: Annotated[str, Field(pattern=r"^run/init-data\.toml$")]
    port: str
    disks: Annotated[dict[DiskName, str], Field(max_length=32)]


@dataclass(frozen=True, slots=True)
class Boot:
    """A started guest: its folder, the words of its command line, raw init-data, world, and disks by name."""

    guest: Path
    parameters: Mapping[str, str]
    init_data: bytes
    world: World
    port: Path | None
    disks: Mapping[str, Path]

    def attester(self) -> Attester:
        """Open the attester of the world that this image was built for."""
        return open_attester(self.world, self.port)

    def devices(self) -> SdkDevices | None:
        """The collector of GPU evidence, if this image has one: its guest then attests with its GPUs or not at all."""
        python = self.guest / GPU_PYTHON
        if not python.exists():
            return None
        from attestation.attester.gpu import SdkDevices  # an image without GPUs need not hold what this reads them by

        return SdkDevices(python)

    def gpu_session(self) -> GpuSession | None:
        """What says when GPUs may be attested and may work; None where none can be attested: there none ever works."""
        if self.devices() is None:
            return None
        from attestation.attester.gpu_session import GpuSession

        return GpuSession(self.guest / "usr/bin", self.guest / "var/run")


def read_boot(guest: Path) -> Boot:
    """Read what the guest unpacked at `guest` was started with.

    Raises AttesterUnavailable if the folder is no started guest.
    """
    try:
        document = BootDocument.model_validate_json(_read(guest / BOOT_FILE, MAX_BOOT))
        init_data = _read(guest / document.init_data, MAX_INIT_DATA)
        parameters = parse_cmdline(document.cmdline)
    except (OSError, ValidationError, ValueError) as error:
        raise AttesterUnavailable(
            "the guest's boot parameters cannot be read", where=BOOT_FILE, do="Start the guest by `seal vm launch`."
        ) from error
    world = read_world(guest)
    return Boot(
        guest=guest,
        parameters=parameters,
        init_data=init_data,
        world=world,
        port=Path(document.port) if world == "virtual" else None,
        disks=MappingProxyType({name: Path(path) for name, path in document.disks.items()}),
    )


def parse_cmdline(cmdline: str) -> Mapping[str, str]:
    """Return the `name=value` words of a kernel command line; a word without `=` maps to the empty string.

    Raises ValueError if a name is there twice: which of the two counts would depend on the reader.
    """
    parameters: dict[str, str] = {}
    for word in cmdline.split():
        name, _, value = word.partition("=")
        if name in parameters:
            raise ValueError(f"{name!r} is on the command line twice")
        parameters[name] = value
    return MappingProxyType(parameters)


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    return data
