"""A guest started on SEV-SNP hardware: QEMU by its plan, the guest's serial console on standard output.

QEMU is the host's own: it needs the host's KVM and devices, and earns nothing, as every measured byte is in the plan.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cvm_image.build.errors import UnusableHost
from cvm_image.qemu import running
from policies.errors import Refused

if TYPE_CHECKING:
    from cvm_image.hardware import HardwarePlan

SEV: Final = Path("/dev/sev")
"""Where the host's kernel answers for its secure processor (kvm_amd with SEV-SNP)."""
LOOK_SECONDS: Final = 0.2


def run_hardware_guest(plan: HardwarePlan) -> int:
    """Start the guest, show its console until it is off, and return 0.

    Raises UnusableHost on a host without SEV-SNP, Refused with QEMU's own words if it ends with another status.
    """
    if not SEV.exists():
        raise UnusableHost(
            "this host has no secure processor for the guest",
            where=str(SEV),
            do="Start it on SEV-SNP hardware; --print-qemu and --print-libvirt show how.",
        )
    console = plan.machine.serial
    console.unlink(missing_ok=True)
    words = console.with_name("qemu.log")
    sys.stderr.write(f"seal: SEV-SNP, {plan.name}, console in {console}\n")
    shown = 0
    with running(plan.command(), serial=console, words=words) as guest:
        while True:
            ended = guest.process.poll() is not None
            shown += _show(console, shown)
            if ended:
                break
            time.sleep(LOOK_SECONDS)
        status = guest.process.returncode
    if status != 0:
        last = words.read_text(errors="replace").strip().splitlines()[-4:]
        raise Refused(
            f"QEMU ended with status {status}",
            where=str(words),
            do="See the table of docs/how-to/start-on-hardware.md.",
            reasons=tuple(last) or ("it says nothing",),
        )
    return 0


def _show(console: Path, start: int) -> int:
    """Write what the console's file holds from `start` on; return how many bytes that is."""
    if not console.exists():
        return 0
    with console.open("rb") as file:
        file.seek(start)
        raw = file.read()
    sys.stdout.write(raw.decode("utf-8", "replace"))
    sys.stdout.flush()
    return len(raw)
