"""What process 1 asks of the kernel: mounts, settings, the packet filter, fewer rights, the end."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_CLOSED = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_POWER_OFF = 0x4321FEDC
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_LAST_CAPABILITY = 40

KEPT_CAPABILITIES = frozenset(
    {
        1,  # CAP_DAC_OVERRIDE: the guest's own files, whoever's they are
        5,  # CAP_KILL: end what a job left behind
        6,  # CAP_SETGID, CAP_SETUID: the sandbox gives jobs a user of their own
        7,
        8,  # CAP_SETPCAP: and takes rights from it
        18,  # CAP_SYS_CHROOT, CAP_SYS_ADMIN: its namespaces and mounts
        21,
        24,  # CAP_SYS_RESOURCE: its limits
        27,  # CAP_MKNOD: the device of an opened volume; lockdown shuts the memory's
    }
)
"""What the role keeps of root's rights; gone for good are modules, raw I/O, raw sockets, the clock, tracing, reboot."""

VOLATILE: tuple[tuple[str, str, str, int, str], ...] = (
    ("tmpfs", "/run", "tmpfs", _CLOSED, "mode=0755,size=25%"),
    ("tmpfs", "/tmp", "tmpfs", _CLOSED, "mode=1777,size=50%"),  # noqa: S108 - the mount point itself
    ("tmpfs", "/var", "tmpfs", _CLOSED, "mode=0755,size=25%"),
    ("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "mode=0600,ptmxmode=0600"),
    ("tmpfs", "/dev/shm", "tmpfs", _CLOSED, "mode=1777,size=50%"),  # noqa: S108 - the mount point itself
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _CLOSED, ""),
)
"""Everything that can be written to is memory: source, target, kind, flags, options."""

SETTINGS: dict[str, str] = {
    "kernel/modules_disabled": "1",
    "kernel/kexec_load_disabled": "1",
    "kernel/sysrq": "0",
    "kernel/kptr_restrict": "2",
    "kernel/dmesg_restrict": "1",
    "kernel/perf_event_paranoid": "3",
    "kernel/unprivileged_bpf_disabled": "1",
    "kernel/yama/ptrace_scope": "2",
    "kernel/core_pattern": "|/nowhere",
    "fs/suid_dumpable": "0",
    "fs/protected_symlinks": "1",
    "fs/protected_hardlinks": "1",
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/accept_source_route": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
}
"""Kernel settings (below /proc/sys); each must hold, or the guest does not go on."""

_ABSENT_ALLOWED = frozenset(
    {"net/ipv6/conf/all/disable_ipv6", "kernel/perf_event_paranoid", "kernel/yama/ptrace_scope"}
)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    done = _libc().mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode() or None
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{target} cannot be mounted: {os.strerror(number)}")


def mount_volatile() -> None:
    """Mount memory over everything that is written to; the root itself is read-only."""
    for source, target, kind, flags, options in VOLATILE:
        if target.startswith("/dev/"):
            Path(target).mkdir(exist_ok=True)
        mount(source, target, kind, flags, options)
    mount("proc", "/proc", "proc", _CLOSED | _MS_REMOUNT, "hidepid=invisible")
    if Path("/sys/kernel/config").is_dir():
        mount("configfs", "/sys/kernel/config", "configfs", _CLOSED, "")
    os.umask(0o077)


def restrict_kernel() -> None:
    """Write the kernel settings and see that each holds. Raises RuntimeError for one that does not."""
    for name, value in SETTINGS.items():
        path = Path("/proc/sys") / name
        if not path.exists() and name in _ABSENT_ALLOWED:
            continue
        if path.read_text().strip() != value:
            path.write_text(value)
        if path.read_text().strip() != value:
            raise RuntimeError(f"the kernel does not keep the setting {name}")
    lockdown = Path("/sys/kernel/security/lockdown")
    if not lockdown.exists():
        mount("securityfs", "/sys/kernel/security", "securityfs", _CLOSED, "")
    if "[integrity]" not in lockdown.read_text():
        raise RuntimeError("the kernel is not locked down")
    if Path("/proc/swaps").read_text().count("\n") > 1:
        raise RuntimeError("the kernel swaps")


def load_packet_filter(rules: str) -> None:
    """Load the rules before any interface is up. Raises RuntimeError if nft does not take them."""
    _nft(["-f", rules], failed="the packet filter does not load")


def allow_nfs_server(address: IPv4Address) -> None:
    """Let the kernel speak NFS to this server. Raises RuntimeError in an image whose rules have no way to any."""
    words = ["add", "element", "inet", "sealwright", "nfs_server", "{", str(address), "}"]
    _nft(words, failed="the init-data name an NFS server, and this image's packet filter lets nobody speak to one")


def _nft(words: list[str], *, failed: str) -> None:
    done = subprocess.run(
        ["/usr/sbin/nft", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise RuntimeError(f"{failed}: {said[:300]}")


def shed_rights() -> None:
    """Give up, for this process and all it starts, the rights that no role needs, and the way to any new ones."""
    libc = _libc()
    for capability in range(_LAST_CAPABILITY + 1):
        if capability not in KEPT_CAPABILITIES and libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise RuntimeError(f"capability {capability} cannot be given up")
    if libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0:
        raise RuntimeError("the ambient capabilities cannot be cleared")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise RuntimeError("new privileges cannot be ruled out")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def disks_by_serial() -> dict[str, Path]:
    """The virtio disks that have a serial: serial → device. The host names them."""
    found: dict[str, Path] = {}
    for block in sorted(Path("/sys/block").glob("vd*")):
        serial = block / "serial"
        if serial.is_file():
            name = serial.read_text(errors="replace").strip()
            if name and name not in found:
                found[name] = Path("/dev") / block.name
    return found


def power_off() -> None:
    """End the machine. Does not return: if the kernel will not, process 1 sleeps for ever."""
    os.sync()
    _libc().reboot(_POWER_OFF)
    while True:
        time.sleep(60)
