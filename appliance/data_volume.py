"""A site's data volume: its files, read-only, encrypted and verified, in one file that a host attaches as a disk.

Layout, in blocks of 4,096 bytes:

    block 0 … 15     the header, in two places of 32 KiB: each a sealed file (fl.guard.sealed_data), then zeros
    block 16 …       layers, one after the other: an EROFS image and the dm-verity tree over it, encrypted together

Every fill adds one layer, encrypted by AES-256-XTS under a key of its own (a block's tweak is its first 512-byte
sector in the layer, dm-crypt's `plain64`). The header names each layer's place, key, salt and root hash, and is sealed
under the volume's key: so that key decides over all of them. The header is written where the older of the two stands,
after its layers are on the disk: a fill that is cut off leaves the volume as it was.

A guest takes the newer header that opens. Of the host's changes, a block that was changed does not read; a header that
was changed does not open; an older header or an older volume, brought back whole, opens as what it was then.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, BinaryIO, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fl.errors import SealedDataRefused
from fl.guard.sealed_data import KEY_SIZE, seal, unseal
from policies.errors import Refused, Unusable

BLOCK: Final = 4096
SECTOR: Final = 512
SLOT: Final = 32 << 10
"""Bytes for one copy of the header."""
FIRST_BLOCK: Final = 2 * SLOT // BLOCK
MAX_LAYERS: Final = 32
MAX_BLOCKS: Final = 1 << 36
"""256 TiB."""
_ENTRY: Final = "header"

_Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
_Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
_Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]


class DataVolumeRefused(Refused):
    """A data volume that does not open with its key, or is older than one that was seen."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what, where="user-data", do="Bring back the volume as `seal vm data` left it, or make it anew."
        )


class Layer(BaseModel):
    """One file system: where it lies, how it is encrypted, and the root of its dm-verity tree. Numbers are blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    offset: _Blocks
    data: _Blocks
    tree: _Blocks
    key: _Hex64
    salt: _Hex32
    root: _Hex32

    @property
    def end(self) -> int:
        """The block after it."""
        return self.offset + self.data + self.tree


class Header(BaseModel):
    """What a volume holds. `generation` grows by one with every fill; layers are in the order of their fills."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[int, Field(ge=1, le=1)] = 1
    volume: _Hex16
    generation: Annotated[int, Field(ge=1, lt=1 << 63)]
    layers: Annotated[list[Layer], Field(max_length=MAX_LAYERS)]

    @property
    def end(self) -> int:
        """The first block that no layer takes."""
        return self.layers[-1].end if self.layers else FIRST_BLOCK


def new_header() -> Header:
    """The header of an empty volume."""
    return Header(volume=os.urandom(16).hex(), generation=1, layers=[])


def sealed_header(header: Header, key: bytes) -> tuple[int, bytes]:
    """The header sealed under the volume's key, and where it goes: into the place of the older one."""
    sealed = b"".join(seal({_ENTRY: header.model_dump_json().encode()}, key, salt=os.urandom(32)))
    if len(sealed) > SLOT:
        raise Unusable("the header has no room", where="user-data", do="Make a new volume.")
    return header.generation % 2 * SLOT, sealed.ljust(SLOT, b"\0")


def read_header(file: BinaryIO, key: bytes) -> Header:
    """Return the newer of the headers that open with `key` (32 bytes).

    Raises DataVolumeRefused if none does, or if it places layers where none can lie.
    """
    if len(key) != KEY_SIZE:
        raise Unusable(
            f"a volume's key has {KEY_SIZE} bytes, not {len(key)}", where="user-data", do="See `seal site key`."
        )
    file.seek(0)
    raw = file.read(2 * SLOT)
    found: list[Header] = []
    why = "it is too short"
    for number in range(2):
        slot = raw[number * SLOT :][:SLOT]
        try:
            entries = unseal(io.BytesIO(slot), key, where="user-data", file_size=len(slot), sector=SLOT)
            header = Header.model_validate_json(entries[_ENTRY])
        except SealedDataRefused as error:
            why = error.what if slot.strip(b"\0") else why
        except (KeyError, ValidationError):
            raise DataVolumeRefused("the data volume's header is sealed by its key, and no header of ours") from None
        else:
            found.append(header)
    if not found:
        raise DataVolumeRefused(f"the data volume's header does not open: {why}")
    newest = max(found, key=lambda header: header.generation)
    next_block = FIRST_BLOCK
    for layer in newest.layers:
        if layer.offset != next_block:
            raise DataVolumeRefused(
                f"the data volume's header places a layer at block {layer.offset}, not {next_block}"
            )
        next_block = layer.end
    return newest


@dataclass(frozen=True)
class Mapping:
    """A device-mapper device to be made: its name and table. The table may hold a key: it goes by standard input."""

    name: str
    table: str


def mappings(header: Header, disk: str) -> Iterator[tuple[Mapping, Mapping]]:
    """For each layer, oldest first: the decrypted device, and the verified one on it (kernel: dm-crypt, dm-verity)."""
    for number, layer in enumerate(header.layers):
        clear, name = f"user-data-{number}-clear", f"user-data-{number}"
        sectors = BLOCK // SECTOR
        crypt = (
            f"0 {(layer.data + layer.tree) * sectors} crypt aes-xts-plain64 {layer.key} 0 {disk} "
            f"{layer.offset * sectors} 1 sector_size:{BLOCK}"
        )
        device = f"/dev/mapper/{clear}"
        verity = (
            f"0 {layer.data * sectors} verity 1 {device} {device} {BLOCK} {BLOCK} {layer.data} {layer.data} sha256 "
            f"{layer.root} {layer.salt}"
        )
        yield Mapping(clear, crypt), Mapping(name, verity)


def tweak(block: int) -> bytes:
    """The XTS tweak of a layer's block: dm-crypt's `plain64`, which counts sectors of 512 bytes."""
    return (block * (BLOCK // SECTOR)).to_bytes(16, "little")
