"""An NFS server in a network of its own, which guests are booted in too: NFS-Ganesha, in user space."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = "ganesha.nfsd"
PSEUDO = "/exports"
SETTINGS = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = 2049; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSV4 {{ Graceless = true; RecoveryRoot = "{recovery}"; RecoveryBackend = fs; Minor_Versions = 1, 2; }}
EXPORT {{
  Export_Id = 1; Path = "{folder}"; Pseudo = "{pseudo}"; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
  Protocols = 4; Transports = TCP; Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}
}}
MDCACHE {{ Dir_Chunk = 0; }}
"""
"""It lets everybody write: what keeps a guest from it is the guest. It remembers nothing that a test may change."""


@dataclass(frozen=True)
class NfsServer:
    """A running server: its process, and the folder that it shows as PSEUDO."""

    process: subprocess.Popen[bytes]
    folder: Path

    def inside(self) -> list[str]:
        """The words before a command that is to run in the server's network."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", "--"]


@contextmanager
def running_nfs_server(folder: Path) -> Iterator[NfsServer]:
    """Serve `folder/exports` on port 2049 of a loopback interface of its own; skip the test where that cannot be."""
    if os.geteuid() != 0 or shutil.which(PROGRAM) is None or shutil.which("ip") is None:
        pytest.skip(f"an NFS server needs root and {PROGRAM}: appliance/setup.sh nfs-ganesha nfs-ganesha-vfs iproute2")
    (folder / "exports").mkdir()
    (folder / "recovery").mkdir()
    settings, log = folder / "ganesha.conf", folder / "ganesha.log"
    settings.write_text(SETTINGS.format(recovery=folder / "recovery", folder=folder / "exports", pseudo=PSEUDO))
    serve = f"ip link set lo up && exec {PROGRAM} -F -f {settings} -L {log} -p {folder / 'ganesha.pid'}"
    process = subprocess.Popen(["unshare", "--net", "sh", "-c", serve], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and b"NFS SERVER INITIALIZED" in log.read_bytes()):
            gone = process.poll() is not None or time.monotonic() > deadline
            assert not gone, log.read_text(errors="replace")[-3000:] if log.exists() else "it said nothing"
            time.sleep(0.2)
        yield NfsServer(process, folder / "exports")
    finally:
        process.kill()  # it may be stopped, and then hears nothing else
        process.wait(30)
