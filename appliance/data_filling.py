"""Making and filling a data volume, where its owner has the data in clear. Needs neither root nor kernel modules."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from appliance.data_volume import (
    BLOCK,
    FIRST_BLOCK,
    MAX_LAYERS,
    Header,
    Layer,
    new_header,
    read_header,
    sealed_header,
    tweak,
)
from cvm_image.errors import ToolFailed
from cvm_image.rootfs import EPOCH, FILESYSTEM_UUID
from cvm_image.tools import run_tool
from policies.errors import Unusable

TOOL_SECONDS: Final = 24 * 3600.0
"""For a volume's tools: data may be many."""
MAX_ENTRIES: Final = 10_000_000
_PIECE: Final = 4 << 20


def make_volume(path: Path, mib: int, key: bytes) -> Header:
    """Make an empty volume of `mib` MiB at `path` (a new file, 0600). Raises Unusable if it cannot be."""
    header = new_header()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(mib << 20)
            _write_header(file, header, key)
    except FileExistsError:
        raise Unusable("there is something already", where=str(path), do="Name a new file, or fill that one.") from None
    except OSError as error:
        raise Unusable(
            f"the volume cannot be made: {error.strerror}", where=str(path), do="Name another file."
        ) from None
    return header


def grow_volume(path: Path, mib: int) -> int:
    """Make the volume `mib` MiB large; return how many it was. Raises Unusable if it is larger already."""
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > mib << 20:
            raise Unusable(f"the volume has {size >> 20} MiB already", where=str(path), do="A volume only grows.")
        file.truncate(mib << 20)
        os.fsync(file.fileno())
    return size >> 20


def fill_volume(path: Path, folder: Path, key: bytes) -> Header:
    """Add the files below `folder` to the volume, over those of the same names; return the new header.

    Its file system is made in a temporary folder (TMPDIR), in clear. Raises Unusable for files that no guest could
    read, for a volume without room, DataVolumeRefused for another key.
    """
    _check_folder(folder)
    with _opened(path) as file:
        header = read_header(file, key)
        if len(header.layers) == MAX_LAYERS:
            raise Unusable(
                f"the volume was filled {MAX_LAYERS} times", where=str(path), do="Make a new one of all files."
            )
        room = file.seek(0, os.SEEK_END) // BLOCK - header.end
        with tempfile.TemporaryDirectory(prefix="sealwright-data-") as scratch:
            clear = Path(scratch) / "layer"
            layer = _file_system(folder, clear, header.end)
            wanted = layer.data + layer.tree
            if wanted > room:
                mib = (wanted * BLOCK >> 20) + 1
                raise Unusable(
                    f"the volume has room for {room * BLOCK >> 20} MiB, and these files need {mib}",
                    where=str(path),
                    do="Enlarge it: seal vm data grow.",
                )
            _encrypt(clear, file, layer)
        os.fsync(file.fileno())  # before any header names it
        filled = Header(volume=header.volume, generation=header.generation + 1, layers=[*header.layers, layer])
        _write_header(file, filled, key)
    return filled


def volume_facts(path: Path, key: bytes) -> dict[str, object]:
    """What `seal vm data show` prints: sizes in MiB, rounded up, and the files' generation."""
    with _opened(path) as file:
        header = read_header(file, key)
        size = file.seek(0, os.SEEK_END)
    used = (header.end - FIRST_BLOCK) * BLOCK
    return {
        "volume": header.volume,
        "generation": header.generation,
        "fills": len(header.layers),
        "mib": size >> 20,
        "used_mib": -(-used >> 20),
    }


def _write_header(file: BinaryIO, header: Header, key: bytes) -> None:
    place, sealed = sealed_header(header, key)
    file.seek(place)
    file.write(sealed)
    file.flush()
    os.fsync(file.fileno())


def _opened(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise Unusable(
            f"the volume cannot be opened: {error.strerror}", where=str(path), do="Make one: seal vm data make."
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unusable("this is no file", where=str(path), do="Name a volume that `seal vm data make` made.")
    return os.fdopen(descriptor, "r+b")


def _check_folder(folder: Path) -> None:
    """A guest's scripts run as nobody in particular: they read what others may read. Links and devices stay out."""
    if not folder.is_dir():
        raise Unusable("there is no such folder", where=str(folder), do="Name the folder that holds the data.")
    count = 0
    for path in (folder, *_below(folder)):
        mode = path.lstat().st_mode
        wanted = 0o005 if stat.S_ISDIR(mode) else 0o004
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise Unusable("this is neither a file nor a folder", where=str(path), do="Leave it out of the data.")
        if mode & wanted != wanted:
            raise Unusable(
                "others may not read this, and so no script could", where=str(path), do=f"chmod -R o+rX {folder}"
            )
        count += stat.S_ISREG(mode)
        if count > MAX_ENTRIES:
            raise Unusable(f"there are more than {MAX_ENTRIES} files", where=str(folder), do="Put them into archives.")
    if count == 0:
        raise Unusable("the folder holds no file", where=str(folder), do="Name the folder that holds the data.")


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _file_system(folder: Path, clear: Path, offset: int) -> Layer:
    """Write the file system and its tree to `clear`; return the layer that it will be, its key and salt new."""
    line = ["mkfs.erofs", "--quiet", "-x-1", f"-T{EPOCH}", f"-U{FILESYSTEM_UUID}", "--all-root"]
    run_tool([*line, str(clear), str(folder)], seconds=TOOL_SECONDS, environment={"SOURCE_DATE_EPOCH": str(EPOCH)})
    size = clear.stat().st_size
    data = max(2, -(-size // BLOCK))  # over one block alone there would be no tree
    os.truncate(clear, data * BLOCK)
    salt = os.urandom(32).hex()
    line = ["veritysetup", "format", "--no-superblock", "--hash=sha256", f"--salt={salt}", f"--data-blocks={data}"]
    line += [f"--data-block-size={BLOCK}", f"--hash-block-size={BLOCK}", f"--hash-offset={data * BLOCK}"]
    said = run_tool([*line, str(clear), str(clear)], seconds=TOOL_SECONDS)
    found = re.search(r"^Root hash:\s*([0-9a-f]{64})$", said, re.MULTILINE)
    if found is None:
        raise ToolFailed("veritysetup named no root hash", where=str(folder), do="Check its version (2.4 or later).")
    tree = -(-clear.stat().st_size // BLOCK) - data
    os.truncate(clear, (data + tree) * BLOCK)
    return Layer(offset=offset, data=data, tree=tree, key=os.urandom(64).hex(), salt=salt, root=found[1])


def _encrypt(clear: Path, file: BinaryIO, layer: Layer) -> None:
    cipher = algorithms.AES(bytes.fromhex(layer.key))
    file.seek(layer.offset * BLOCK)
    block = 0
    with clear.open("rb") as source:
        while piece := source.read(_PIECE):
            sealed = bytearray()
            for start in range(0, len(piece), BLOCK):
                encryptor = Cipher(cipher, modes.XTS(tweak(block))).encryptor()
                sealed += encryptor.update(piece[start : start + BLOCK])
                block += 1
            file.write(sealed)
    file.flush()
