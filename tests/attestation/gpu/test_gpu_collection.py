"""Collecting GPU evidence in the guest: one process, bounded and believed in nothing.

NVIDIA's SDK and driver are played by small modules with the SDK's shapes; the SDK itself is asked where `make gpu-sdk`
has made its environment, as far as a machine without a GPU lets it.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import nvidia_world as world
import pytest

from attestation.attester.boot import GPU_PYTHON, Boot
from attestation.attester.gpu import COLLECTOR, collect_gpu_evidence
from attestation.canonical import b64
from attestation.errors import AttesterUnavailable, MalformedEvidence
from attestation.evidence.gpu.document import write_gpu_document
from attestation.verifier.composite import read_additional_evidence
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.verify import verify_devices

SDK = Path(__file__).parents[3] / "build/gpu-sdk/bin/python"
GPU, SWITCH = world.make_device(), world.make_device("LS_10")


def program(folder: Path, text: str) -> Path:
    """An executable that stands where the SDK's Python would."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return path


def answering(folder: Path, raw: bytes) -> Path:
    (folder / "raw").write_bytes(raw)
    return program(folder, f"import sys\nsys.stdout.buffer.write(open({str(folder / 'raw')!r}, 'rb').read())\n")


def test_what_a_collector_answers_is_read_strictly(tmp_path: Path) -> None:
    python = answering(tmp_path, write_gpu_document((world.evidence(GPU),)))
    (device,) = collect_gpu_evidence(world.NONCE, python=python)
    assert device.chain == GPU.pem
    with pytest.raises(MalformedEvidence, match="another nonce"):
        collect_gpu_evidence(bytes(32), python=python)
    with pytest.raises(ValueError, match="32 bytes"):
        collect_gpu_evidence(b"short", python=python)


def test_an_image_with_a_collector_attests_with_its_gpus(tmp_path: Path) -> None:
    boot = Boot(tmp_path, {}, b"", "hardware", None, {})
    assert boot.devices() is None
    python = tmp_path / GPU_PYTHON
    python.parent.mkdir(parents=True)
    answering(python.parent, write_gpu_document((world.evidence(GPU),)))
    devices = boot.devices()
    assert devices is not None
    assert [one.chain for one in read_additional_evidence(devices.evidence(world.NONCE))] == [GPU.pem]
    with pytest.raises(MalformedEvidence, match="another nonce"):
        devices.evidence(bytes(32))


@pytest.mark.parametrize("raw", [b"{}", b"not json", b"x" * (2 << 20), b'{"device_evidence_list": []}'])
def test_other_answers_are_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        collect_gpu_evidence(world.NONCE, python=answering(tmp_path, raw))


def test_silence_failure_and_delay_are_told(tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="no answer"):
        collect_gpu_evidence(world.NONCE, python=answering(tmp_path, b""))
    with pytest.raises(AttesterUnavailable, match="the fan fell off"):
        collect_gpu_evidence(world.NONCE, python=program(tmp_path, "raise SystemExit('the fan fell off')"))
    sleeper = program(tmp_path, "import time\ntime.sleep(60)")
    with pytest.raises(AttesterUnavailable, match=r"within 0\.2 seconds"):
        collect_gpu_evidence(world.NONCE, python=sleeper, seconds=0.2)
    with pytest.raises(AttesterUnavailable, match="no environment"):
        collect_gpu_evidence(world.NONCE, python=tmp_path / "none")
    (tmp_path / "plain").write_text("x")
    with pytest.raises(AttesterUnavailable, match="cannot be started"):
        collect_gpu_evidence(world.NONCE, python=tmp_path / "plain")


NVML = """
class NVMLError(Exception):
    pass

class c_nvmlSystemConfComputeSettings_v1_t(__import__("ctypes").Structure):
    _fields_ = [("multiGpuMode", __import__("ctypes").c_uint)]

class State:
    devToolsMode = {devtools}

def nvmlInit():
    if {absent}:
        raise NVMLError("NVML Shared Library Not Found")

def nvmlSystemGetConfComputeState():
    return State()

def nvmlSystemGetConfComputeSettings(settings):
    settings._obj.multiGpuMode = {mode}
    return 0
"""

ASK = """
print("words on standard output, as the SDK has them")

def get_evidence(nonce, options):
    assert options == {{"ppcie_mode": False}}
    return {devices!r} if nonce == {nonce!r} else []
"""


def sdk(
    folder: Path,
    gpus: list[dict[str, str]],
    switches: list[dict[str, str]],
    *,
    mode: int = 0,
    devtools: int = 0,
    absent: bool = False,
) -> Path:
    """An interpreter in whose environment the SDK's modules give these devices."""
    modules = folder / "modules"
    for package, devices in (("gpu/attest_gpu_remote", gpus), ("nvswitch/attest_nvswitch_remote", switches)):
        path = modules / "nv_attestation_sdk" / f"{package}.py"
        path.parent.mkdir(parents=True)
        path.write_text(ASK.format(devices=devices, nonce=world.NONCE.hex()))
        (path.parent / "__init__.py").touch()
    (modules / "nv_attestation_sdk/__init__.py").touch()
    (modules / "pynvml.py").write_text(NVML.format(mode=mode, devtools=devtools, absent=absent))
    return program(
        folder,
        f"""
        import runpy, sys
        assert sys.argv[1:] == ["-I", {str(COLLECTOR)!r}]
        sys.path.insert(0, {str(modules)!r})
        runpy.run_path(sys.argv[2], run_name="__main__")
        """,
    )


def entry(device: world.Device, report: bytes) -> dict[str, str]:
    found = {"evidence": b64(report), "certificate": b64(device.pem)}
    return found if device.switch else {**found, "arch": "HOPPER"}


def test_the_collector_asks_gpus_and_their_switches(tmp_path: Path) -> None:
    fields = world.gpu_fields(
        FEATURE_FLAG=b"\x02\0", PROTECTED_PCIE_STATUS=b"\xaa", SWITCH_PDI=world.linked_to([SWITCH])
    )
    gpu = entry(GPU, world.sign_report(GPU, fields))
    switch = entry(SWITCH, world.sign_report(SWITCH, world.switch_fields(SWITCH, [GPU])))
    devices = collect_gpu_evidence(world.NONCE, python=sdk(tmp_path, [gpu], [switch], mode=1))
    assert [device.arch for device in devices] == ["HOPPER", "LS10"]
    found = verify_devices(devices, world.profile(), GpuExpected(nonce=world.NONCE), at=world.AT)
    assert found.whole.status == "affirming"


def test_the_collector_says_what_the_driver_says_of_developer_tools(tmp_path: Path) -> None:
    gpu = entry(GPU, world.sign_report(GPU, world.gpu_fields()))
    (device,) = collect_gpu_evidence(world.NONCE, python=sdk(tmp_path, [gpu], [], devtools=1))
    found = verify_devices([device], world.profile(), GpuExpected(nonce=world.NONCE), at=world.AT)
    assert [failure.check for failure in found.whole.failures] == ["gpu-devtools"]


def test_the_collector_without_a_driver_or_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="Shared Library Not Found"):
        collect_gpu_evidence(world.NONCE, python=sdk(tmp_path, [], [], absent=True))
    (tmp_path / "again").mkdir()
    with pytest.raises(AttesterUnavailable, match="no GPU gave evidence"):
        collect_gpu_evidence(world.NONCE, python=sdk(tmp_path / "again", [], []))


def test_the_collector_without_the_sdk() -> None:
    with pytest.raises(AttesterUnavailable, match="no NVIDIA attestation SDK"):
        collect_gpu_evidence(world.NONCE, python=Path(sys.executable))


@pytest.mark.skipif(not SDK.exists(), reason="NVIDIA's SDK has no environment here (make gpu-sdk)")
def test_the_real_sdk_on_a_machine_without_a_gpu() -> None:
    with pytest.raises(AttesterUnavailable, match="the NVIDIA driver does not answer"):
        collect_gpu_evidence(world.NONCE, python=SDK)
