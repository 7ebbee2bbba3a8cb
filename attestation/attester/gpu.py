"""In the guest: evidence of GPUs and switches, collected by NVIDIA's SDK in an environment of its own.

One small boundary: a process of the SDK's Python (`gpu_collector.py`) gets a nonce and answers with one document, which
is bounded in time and size and read as strictly as if it came from anywhere. What it says is worth nothing until a
verifier has looked at it; so a broken or a lying SDK can deny evidence and cannot forge any.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from attestation.errors import AttesterUnavailable, MalformedEvidence
from attestation.evidence.gpu.document import MAX_DOCUMENT_SIZE, GpuEvidence, read_gpu_document, write_gpu_document
from attestation.evidence.gpu.spdm import NONCE_SIZE, parse_gpu_report

COLLECTOR = Path(__file__).with_name("gpu_collector.py")
SECONDS = 120
"""For all devices: the SDK alone waits up to 30 seconds for a driver."""

_TAIL = 300


def collect_gpu_evidence(nonce: bytes, *, python: Path, seconds: float = SECONDS) -> tuple[GpuEvidence, ...]:
    """Evidence of every GPU (and switch, in mode ppcie) of this machine over a 32-byte nonce.

    `python` is the interpreter of the environment that holds the SDK (`make gpu-sdk`).

    Raises:
        AttesterUnavailable: there is no such environment or no device, or it did not answer within `seconds`.
        MalformedEvidence: it answered with something else than evidence over this nonce.
    """
    if len(nonce) != NONCE_SIZE:
        raise ValueError(f"an SPDM nonce has {NONCE_SIZE} bytes")
    with tempfile.TemporaryDirectory(prefix="seal-gpu-") as name:
        # The SDK writes logs where it stands; what it says goes to files, so that no flood of it fills memory.
        folder = Path(name)
        with (folder / "answer").open("w+b") as answer, (folder / "words").open("w+b") as said:
            words = _run(python, nonce, answer, said, seconds)
            answer.seek(0)
            raw = answer.read(MAX_DOCUMENT_SIZE + 1)
    if not raw:
        raise AttesterUnavailable(
            f"the collector gave no answer ({words})", where=str(python), do="Run it by hand to see what it says."
        )
    devices = read_gpu_document(raw)
    for device in devices:
        if parse_gpu_report(device.report).request_nonce != nonce:
            raise MalformedEvidence(
                "a device answered another nonce", where="GPU evidence", do="Collect again; see the driver's log."
            )
    return devices


@dataclass(frozen=True, slots=True)
class SdkDevices:
    """This machine's GPUs and switches, through the SDK's Python: a guest's further devices (attestation.client)."""

    python: Path
    seconds: float = SECONDS

    def evidence(self, nonce: bytes) -> str:
        """Their evidence over the session's nonce, as it travels. Raises as `collect_gpu_evidence` does."""
        return additional_evidence(collect_gpu_evidence(nonce, python=self.python, seconds=self.seconds))


def additional_evidence(devices: tuple[GpuEvidence, ...]) -> str:
    """The text in which the evidence of further devices travels beside a CPU's report."""
    return f'{{"nvidia":{write_gpu_document(devices).decode("ascii")}}}'


def _run(python: Path, nonce: bytes, answer: IO[bytes], said: IO[bytes], seconds: float) -> str:
    """Run the collector; its last words."""
    folder = Path(answer.name).parent
    argv = [str(python), "-I", str(COLLECTOR)]
    try:
        done = subprocess.run(
            argv,
            input=f"{nonce.hex()}\n".encode("ascii"),
            stdout=answer,
            stderr=said,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8"},
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise AttesterUnavailable(
            "there is no environment with NVIDIA's SDK", where=str(python), do="Make it with `make gpu-sdk`."
        ) from None
    except OSError as error:
        raise AttesterUnavailable(
            f"the collector cannot be started ({error.strerror})", where=str(python), do="Check its permissions."
        ) from error
    except subprocess.TimeoutExpired:
        raise AttesterUnavailable(
            f"the GPUs gave no evidence within {seconds:g} seconds", where=" ".join(argv), do="See the driver's log."
        ) from None
    said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL))
    words = " ".join(said.read(_TAIL).decode("utf-8", "replace").split())
    if done.returncode:
        raise AttesterUnavailable(
            f"no GPU evidence: {words or f'the collector ended with status {done.returncode}'}",
            where=" ".join(argv),
            do="Check that the GPU is in confidential mode and its driver runs.",
        )
    return words
