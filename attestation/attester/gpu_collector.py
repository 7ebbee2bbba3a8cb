"""Asks this machine's GPUs and switches for evidence through NVIDIA's SDK: run by the Python of the SDK's environment.

The SDK pins old libraries, writes to standard output and leaves log files; so this file is a program of its own that
imports nothing of the project's, and never imported by it. Input: the nonce, 64 hex digits, on standard input. Output:
one JSON document (`{"device_evidence_list": [...]}`) on standard output. Exit status 3: no device can be asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import re
import sys
from typing import Any

NO_DEVICE = 3
FAILED = 4


def collect(nonce: str) -> list[dict[str, Any]]:
    """Every device's evidence over `nonce`, switches where the driver names them. Raises LookupError for none."""
    # The SDK waits half a minute for a driver that is not there: look first.
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        devtools = nvml.nvmlSystemGetConfComputeState().devToolsMode != 0
    except nvml.NVMLError as error:
        raise LookupError(f"the NVIDIA driver does not answer: {error}") from error
    gpus = importlib.import_module("nv_attestation_sdk.gpu.attest_gpu_remote")
    devices = [
        {"arch": one["arch"], "evidence": one["evidence"], "certificate": one["certificate"], "devtools_mode": devtools}
        for one in gpus.get_evidence(nonce, {"ppcie_mode": False})
    ]
    if not devices:
        raise LookupError("no GPU gave evidence")
    if _links_in_the_clear(nvml):
        switches = importlib.import_module("nv_attestation_sdk.nvswitch.attest_nvswitch_remote")
        devices += [
            {"arch": "LS10", "evidence": one["evidence"], "certificate": one["certificate"]}
            for one in switches.get_evidence(nonce, {"ppcie_mode": False})
        ]
    return devices


def _links_in_the_clear(nvml: Any) -> bool:
    """Whether the driver says protected PCIe: only then are switches trusted, and asked."""
    settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
    status = nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))
    return bool(status == 0 and settings.multiGpuMode == 1)


def main() -> int:
    """Read the nonce, print the evidence. Whatever the SDK prints goes to standard error."""
    nonce = sys.stdin.readline(128).strip()
    if re.fullmatch(r"[0-9a-f]{64}", nonce) is None:
        sys.stderr.write("a nonce of 64 hex digits is needed on standard input\n")
        return FAILED
    answer = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(answer, "w", encoding="ascii") as output, contextlib.redirect_stdout(sys.stderr):
        try:
            devices = collect(nonce)
        except LookupError as error:
            sys.stderr.write(f"{error}\n")
            return NO_DEVICE
        except ImportError as error:
            sys.stderr.write(f"this Python has no NVIDIA attestation SDK: {error}\n")
            return FAILED
        json.dump({"device_evidence_list": devices}, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
