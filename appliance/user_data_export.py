"""In a site's guest: its data volume on an NFS export, as a block device that nothing is written to.

The server, and whoever is between, sees and may change what a host sees and may change of a disk, so that nothing here
is checked but the form: the volume's own layers are decrypted and verified when they are read (`appliance.user_data`).
The kernel's client speaks NFSv4.1, in which the server opens no connection to the guest. As long as the connection
stands the client would wait for an answer for ever, so somebody here asks the server something again and again: after
SILENT_SECONDS without a word, whoever waits gets EIO.

Sources: Linux, fs/nfs/fs_context.c (options of `nfs4`), include/uapi/linux/loop.h; RFC 8881, section 2.4.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from policies.errors import Unusable
from policies.init_data import DataExport

MOUNT_POINT: Final = Path("/run/user_data.export")
CLIENT: Final = Path("/sys/fs/nfs/net/nfs_client/identifier")
"""What the kernel's client calls itself: guests behind one address have one host name, and must not be one client."""
_OPTIONS: Final = "vers=4.1,proto=tcp,port=2049,sec=sys,soft,timeo=100,retrans=2,addr={server}"
_FLAGS: Final = 1 | 2 | 4 | 8  # read-only, no set-id, no devices, nothing to be executed
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CONFIG: Final = struct.Struct("=II52xI176x64x")
"""`struct loop_config`: fd, block size, `struct loop_info64` with its flags after 52 bytes, and what is reserved."""
_READ_ONLY_AUTOCLEAR: Final = 1 | 4
_SECTOR: Final = 512
_MNT_FORCE: Final = 1
"""Ends all that waits for the server, with EIO; a mount that is in use stays."""
_MNT_DETACH: Final = 2
ASK_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 10.0
"""How long taking leave of the server may take; a guest that closes its volume is about to power off."""


@contextlib.contextmanager
def opened_export(export: DataExport) -> Iterator[Path]:
    """Mount the export and yield the device that shows the volume's bytes, read-only; take both down in the end.

    Raises Unusable if the guest's kernel has no NFS client, if the server does not export the folder to it, or if there
    is no such file.
    """
    if not CLIENT.exists():
        raise _unusable(
            export, "this guest's kernel has no NFS client", "Boot an image whose recipe says `nfs = true`."
        )
    CLIENT.write_text(os.urandom(16).hex())
    path = PurePosixPath(export.path)
    MOUNT_POINT.mkdir(exist_ok=True)
    with contextlib.ExitStack() as opened:
        opened.enter_context(_mounted(export, str(path.parent)))
        file = opened.enter_context(_opened(export, MOUNT_POINT / path.name))
        yield opened.enter_context(_looped(export, file))


@contextlib.contextmanager
def _looped(export: DataExport, file: int) -> Iterator[Path]:
    """A loop device over the open file."""
    with contextlib.ExitStack() as opened:
        try:
            control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, control)
            device = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            held = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, held)  # the last to close it takes it down
            fcntl.ioctl(held, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, _SECTOR, _READ_ONLY_AUTOCLEAR))
        except OSError as error:
            raise _unusable(export, f"the volume becomes no device: {error.strerror}", _LOOK) from None
        yield device


_LOOK: Final = "See that the server is up and exports the volume's folder to this guest, by NFSv4.1."


@contextlib.contextmanager
def _mounted(export: DataExport, folder: str) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    source, options = f"{export.server}:{folder}".encode(), _OPTIONS.format(server=export.server).encode()
    if libc.mount(source, os.fsencode(MOUNT_POINT), b"nfs4", ctypes.c_ulong(_FLAGS), options) != 0:
        raise _unusable(export, f"the export does not mount: {os.strerror(ctypes.get_errno())}", _LOOK)
    over, answered = threading.Event(), threading.Event()

    def ask() -> None:
        while not over.wait(ASK_SECONDS):
            with contextlib.suppress(OSError):
                os.statvfs(MOUNT_POINT)  # the one question that is never answered from memory
                answered.set()

    def watch() -> None:
        patience = SILENT_SECONDS
        while not over.wait(patience):
            silent = not answered.is_set()
            answered.clear()
            if silent:
                _unmount(_MNT_FORCE)
            patience = 2 * ASK_SECONDS if silent else SILENT_SECONDS  # what reads on has waited long enough

    for work in (ask, watch):
        threading.Thread(target=work, name=f"export {work.__name__}", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        leave = threading.Thread(target=_unmount, args=(_MNT_DETACH,), name="export leave", daemon=True)
        leave.start()
        leave.join(CLOSE_SECONDS)


def _unmount(flags: int) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(MOUNT_POINT), flags)


@contextlib.contextmanager
def _opened(export: DataExport, path: Path) -> Iterator[int]:
    """The volume's file. A server that shows a link, a device or a pipe in its place shows no volume."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(export, f"the volume cannot be opened: {error.strerror}", _LOOK) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _unusable(export, "what the server shows is no file", _LOOK)
        yield descriptor
    finally:
        os.close(descriptor)


def _unusable(export: DataExport, what: str, do: str) -> Unusable:
    return Unusable(what, where=f"{export.server}:{export.path}", do=do)
