"""In a site's guest: its data volume, opened with the key that brokers released, mounted read-only.

Each layer is decrypted and then verified by the kernel, block by block, when it is read: a changed block gives EIO to
whoever reads it, and a line on the console. Nothing is ever written to the volume.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.data_volume import DataVolumeRefused, Header, Mapping, mappings, read_header
from policies.errors import Unusable

DISK: Final = "user-data"
"""The disk's serial."""
PURPOSE: Final = "user_data"
"""The purpose of its key among the resources of the init-data."""
MOUNT_POINT: Final = Path("/run/user_data")
LAYERS: Final = Path("/run/user_data.layers")
SECONDS: Final = 120.0

_DMSETUP: Final = "/usr/sbin/dmsetup"
_FLAGS: Final = 1 | 2 | 4 | 8  # read-only, no set-id, no devices, nothing to be executed


@contextlib.contextmanager
def opened_user_data(disk: Path, key: bytes) -> Iterator[tuple[Path, Header]]:
    """Open the volume on `disk` and yield the folder that shows its files, and its header; close it in the end.

    Raises DataVolumeRefused for a volume that does not open with this key, Unusable for one that holds nothing or a
    guest that cannot open any.
    """
    try:
        with disk.open("rb") as file:
            header = read_header(file, key)
    except OSError as error:
        raise Unusable(
            f"the data volume does not read: {error.strerror}", where=DISK, do="See that whoever has it is up."
        ) from None
    if not header.layers:
        raise Unusable("the data volume is empty", where=DISK, do="Fill it: seal vm data fill.")
    if not Path(_DMSETUP).exists():
        raise Unusable(f"this guest has no {_DMSETUP}", where=DISK, do="Boot an image with data volumes.")
    with contextlib.ExitStack() as opened:
        folders = []
        for number, pair in enumerate(mappings(header, str(disk))):
            for mapping in pair:
                _make(mapping)
                opened.callback(_dmsetup, ["remove", mapping.name])
            folder = LAYERS / str(number)
            _folder(folder)
            opened.enter_context(_mounted(f"/dev/mapper/{pair[1].name}", folder, "erofs", ""))
            folders.append(str(folder))
        _folder(MOUNT_POINT)
        if len(folders) == 1:
            yield Path(folders[0]), header
            return
        options = f"lowerdir={':'.join(reversed(folders))}"
        opened.enter_context(_mounted("user-data", MOUNT_POINT, "overlay", options))
        yield MOUNT_POINT, header


def _folder(folder: Path) -> None:
    """A mount point whose way anyone may walk: scripts run as users of their own."""
    for path in (*reversed(folder.parents), folder):
        if path.is_relative_to("/run") and not path.exists():
            path.mkdir()
            path.chmod(0o755)


def _make(mapping: Mapping) -> None:
    _dmsetup(["create", mapping.name, "--readonly"], mapping.table)


@contextlib.contextmanager
def _mounted(source: str, folder: Path, kind: str, options: str) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_FLAGS)
    if libc.mount(source.encode(), os.fsencode(folder), kind.encode(), flags, options.encode() or None) != 0:
        why = os.strerror(ctypes.get_errno())
        raise DataVolumeRefused(f"the data volume does not mount, a block of it was changed: {why}")
    try:
        yield
    finally:
        if libc.umount2(os.fsencode(folder), 0) != 0:
            raise DataVolumeRefused(f"the data volume cannot be unmounted: {os.strerror(ctypes.get_errno())}")


def _dmsetup(words: list[str], table: str = "") -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C", "DM_DISABLE_UDEV": "1"}
    try:
        done = subprocess.run(
            [_DMSETUP, *words],
            input=table.encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise DataVolumeRefused(f"dmsetup {words[0]} took longer than {SECONDS:.0f} s") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise DataVolumeRefused(f"dmsetup {words[0]} failed with status {done.returncode}: {said[:300]}")
