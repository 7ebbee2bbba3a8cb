"""In the guest: when its GPUs can be attested, and when they may work, by the driver's own word.

In confidential mode a driver that loads makes an SPDM session with each GPU, and the GPU takes no work until somebody
says that it is ready. So the order is: the driver is up and says that the mode is on; the GPUs' evidence goes to the
brokers with the processor's; keys are released; only then are the GPUs said to be ready. NVIDIA's persistence daemon
keeps the driver from letting go of a session between two programs: another session would have to be attested anew.

What the driver says earns nothing at a broker; it decides only what this guest does next. The boundary is two programs
of the measured root, `nvidia-persistenced` and `nvidia-smi`; neither has been seen to run with a GPU here.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.errors import AttesterUnavailable
from policies.errors import Refused

SMI: Final = "nvidia-smi"
DAEMON: Final = "nvidia-persistenced"
UP_SECONDS: Final = 120.0
"""For the driver to come up with all GPUs."""
ASK_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 1.0
MAX_WORDS: Final = 16 << 10

_GPU_NODE: Final = re.compile(r"nvidia\d{1,2}")
_SHARED_NODES: Final = ("nvidiactl", "nvidia-uvm")
_MODE: Final = re.compile(r"^\s*CC status:\s*(\S+)\s*$", re.MULTILINE)
_READY: Final = re.compile(r"^\s*Confidential Compute GPUs Ready state:\s*(\S+(?: \S+)?)\s*$", re.MULTILINE)


class GpuRefused(Refused):
    """GPUs that are not in the state in which they may be attested, or given work."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="GPU", do="Start the guest anew with the GPU in confidential mode.")


@dataclass(frozen=True, slots=True)
class GpuSession:
    """The GPUs of this guest, through the programs in the folder `programs`."""

    programs: Path
    run: Path
    """Where the daemon keeps its file: it expects the folder."""
    nodes: Path = Path("/dev")
    """Where the driver's device nodes are."""

    def begin(self, *, seconds: float = UP_SECONDS) -> None:
        """Hold the driver's sessions, and wait until it says that confidential mode is on.

        Raises AttesterUnavailable for a driver that does not come up within `seconds`, GpuRefused for GPUs that are not
        in confidential mode, or that take work already.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        self._ask(DAEMON, "--uvm-persistence-mode")
        deadline = time.monotonic() + seconds
        while True:
            try:
                mode = self._said(_MODE, "conf-compute", "-f")
                break
            except AttesterUnavailable:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
        if mode != "ON":
            raise GpuRefused(f"the GPU's confidential mode is {mode}, not ON")
        if self.is_ready():
            raise GpuRefused("the GPUs take work before they were attested")

    def is_ready(self) -> bool:
        """Whether the GPUs take work. Raises AttesterUnavailable if the driver does not say."""
        state = self._said(_READY, "conf-compute", "-grs").lower()
        if state not in {"ready", "not-ready", "not ready"}:
            raise _unclear(f"the GPUs' state is {state[:40]!r}", SMI)
        return state == "ready"

    def allow_work(self) -> None:
        """Say that the GPUs are ready. Raises GpuRefused if they are not, then."""
        self._ask(SMI, "conf-compute", "-srs", "1")
        if not self.is_ready():
            raise GpuRefused("the GPUs did not become ready")

    def work_nodes(self) -> tuple[Path, ...]:
        """The device nodes by which a program computes on the GPUs; those for tracing and partitioning are not of them.

        Raises AttesterUnavailable unless there is at least one GPU's, and the two that all GPUs share.
        """
        gpus = sorted(path for path in self.nodes.glob("nvidia*") if _GPU_NODE.fullmatch(path.name))
        nodes = (*gpus, *(self.nodes / name for name in _SHARED_NODES))
        absent = [path.name for path in nodes if not path.is_char_device()]
        if absent or not gpus:
            raise _unclear(f"it made no device node {absent[0] if gpus else 'of a GPU'}", str(self.nodes))
        return nodes

    def end_work(self) -> None:
        """The GPUs take no more work. Raises GpuRefused if they do."""
        self._ask(SMI, "conf-compute", "-srs", "0")
        if self.is_ready():
            raise GpuRefused("the GPUs stay ready")

    def _said(self, pattern: re.Pattern[str], *words: str) -> str:
        said = pattern.findall(self._ask(SMI, *words))
        if not said or len(set(said)) != 1:
            raise _unclear("the driver does not say it once and clearly", f"{SMI} {' '.join(words)}")
        return str(said[0])

    def _ask(self, program: str, *words: str) -> str:
        line: Sequence[str] = (str(self.programs / program), *words)
        where = " ".join((program, *words))
        try:
            done = subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ASK_SECONDS,
                check=False,
                env={"PATH": "/usr/bin:/usr/sbin", "LC_ALL": "C"},
            )
        except OSError as error:
            raise _unclear(f"it cannot be started: {error.strerror}", where) from error
        except subprocess.TimeoutExpired:
            raise _unclear(f"no answer within {ASK_SECONDS:.0f} s", where) from None
        said = done.stdout[:MAX_WORDS].decode("utf-8", "replace")
        if done.returncode != 0:
            complaint = " ".join((said + " " + done.stderr[:MAX_WORDS].decode("utf-8", "replace")).split())
            raise _unclear(f"status {done.returncode}: {complaint[:200]}", where)
        return said


def _unclear(what: str, where: str) -> AttesterUnavailable:
    return AttesterUnavailable(what, where=where, do="See that the GPU is passed through and its driver fits it.")
