"""What a machine lacks for a purpose, each finding with the one thing to do about it.

A check looks at the machine and never changes it. `diagnose` runs those that a purpose needs; the `seal doctor` command
prints them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from policies.errors import SealwrightError

Purpose = Literal["demo", "guest-host"]
"""`demo`: everything on one machine with the virtual platform. `guest-host`: a SEV-SNP host that starts guests."""

PROBE_SECONDS = 10.0
"""The longest that one probe may take."""


@dataclass(frozen=True)
class Finding:
    """One looked-at thing: whether it serves, what was seen, and what to do if it does not."""

    check: str
    ok: bool
    seen: str
    do: str = ""


def diagnose(purpose: Purpose) -> list[Finding]:
    """Look at everything that `purpose` needs, in the order in which one would mend it."""
    return [check() for check in CHECKS[purpose]]


def python_version() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python 3.11 to 3.13", ok, version, "Install Python 3.11, 3.12 or 3.13 and run `make setup` again.")


def hybrid_kem() -> Finding:
    """HPKE with ML-KEM-768 and X25519, which releases and results are sealed with, needs cryptography's own OpenSSL."""
    name = "HPKE with ML-KEM-768 and X25519"
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.backends.openssl.backend import backend

    from attestation.hybrid import HybridPrivateKey

    version = backend.openssl_version_text()
    try:
        HybridPrivateKey.generate()
    except UnsupportedAlgorithm:
        return Finding(
            name,
            False,
            f"not in {version}",
            "Install cryptography's wheel from PyPI (not a build of the distribution).",
        )
    return Finding(name, True, version)


def bubblewrap() -> Finding:
    """The sandbox works, not only exists: user namespaces may be forbidden to it."""
    name = "bubblewrap sandbox"
    path = shutil.which("bwrap")
    if path is None:
        return Finding(name, False, "not installed", "sudo apt-get install -y bubblewrap")
    probe = _run([path, "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "/bin/true"])
    if probe is None or probe.returncode != 0:
        words = "no answer" if probe is None else (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding(
            name,
            False,
            words,
            "Allow user namespaces to bwrap: on Ubuntu 24.04 and later add an AppArmor profile with `userns,` for "
            "/usr/bin/bwrap, elsewhere set kernel.unprivileged_userns_clone=1.",
        )
    return Finding(name, True, path)


def seccomp_library() -> Finding:
    """The sandbox's filters are made by libseccomp, as the sandbox itself loads it."""
    from fl.guard.seccomp import script_filter

    name, do = "libseccomp", "sudo apt-get install -y libseccomp2"
    try:
        size = len(script_filter())
    except SealwrightError as error:
        return Finding(name, False, error.what, do)
    return Finding(name, True, f"makes filters ({size // 8} instructions)")


def erofs_tools() -> Finding:
    path = shutil.which("mkfs.erofs")
    return Finding("mkfs.erofs", path is not None, path or "not installed", "sudo apt-get install -y erofs-utils")


def verity_tools() -> Finding:
    path = shutil.which("veritysetup") or next(
        (p for p in ("/usr/sbin/veritysetup", "/sbin/veritysetup") if Path(p).exists()), None
    )
    return Finding("veritysetup", path is not None, path or "not installed", "sudo apt-get install -y cryptsetup-bin")


def parent_death_signal() -> Finding:
    path = shutil.which("setpriv")
    return Finding("setpriv", path is not None, path or "not installed", "sudo apt-get install -y util-linux")


def memory() -> Finding:
    """Two sites and a server that import torch take about 1.5 GiB together."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    gib = int(lines["MemAvailable"].split()[0]) / 2**20
    return Finding(
        "3 GiB of free memory", gib >= 3, f"{gib:.1f} GiB", "Close other programs, or take a machine with more memory."
    )


def disk() -> Finding:
    gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding(
        "2 GiB of free disk", gib >= 2, f"{gib:.1f} GiB in {Path.cwd()}", "Free some space, or run from another disk."
    )


def clock() -> Finding:
    """A clock before this code was written makes every certificate look not yet valid."""
    now = time.gmtime()
    ok = now.tm_year >= 2026
    return Finding("clock", ok, time.strftime("%Y-%m-%dT%H:%M:%SZ", now), "Set the clock (`timedatectl set-ntp true`).")


def snp_host() -> Finding:
    """The host kernel has SEV-SNP switched on: kvm_amd's parameter says so."""
    parameter = Path("/sys/module/kvm_amd/parameters/sev_snp")
    value = parameter.read_text().strip() if parameter.exists() else "kvm_amd is not loaded"
    do = "Enable SNP in the firmware's setup (SMEE, SEV-SNP), and boot Linux 6.11 or later with kvm_amd.sev_snp=1."
    return Finding("SEV-SNP on the host", value in {"Y", "1"}, value, do)


def sev_device() -> Finding:
    ok = Path("/dev/sev").exists()
    return Finding(
        "/dev/sev", ok, "present" if ok else "absent", "Load the ccp module; the firmware's PSP must be enabled."
    )


def kvm_device() -> Finding:
    ok = Path("/dev/kvm").exists()
    return Finding(
        "/dev/kvm", ok, "present" if ok else "absent", "Enable virtualisation in the firmware's setup and load kvm_amd."
    )


def qemu() -> Finding:
    """`sev-snp-guest` is in QEMU from 9.1 on."""
    name, do = "QEMU 9.1 or later", "sudo apt-get install -y qemu-system-x86 (Debian 13, Ubuntu 25.04 or later)"
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        return Finding(name, False, "not installed", do)
    probe = _run([path, "--version"])
    words = (probe.stdout.split() if probe is not None else []) or ["unknown"]
    version = words[3] if len(words) > 3 else "unknown"
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return Finding(name, numbers >= [9, 1], version, do)


CHECKS: dict[Purpose, list[Callable[[], Finding]]] = {
    "demo": [
        python_version,
        hybrid_kem,
        bubblewrap,
        seccomp_library,
        erofs_tools,
        verity_tools,
        parent_death_signal,
        memory,
        disk,
        clock,
    ],
    "guest-host": [python_version, kvm_device, snp_host, sev_device, qemu, erofs_tools, verity_tools, clock],
}


def _run(argv: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a probe; None if it does not answer within PROBE_SECONDS or cannot be started."""
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
