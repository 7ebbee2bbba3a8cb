"""Good evidence of each kind, from which a fuzzer starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvidia_world as world

from attestation.evidence.gpu.document import write_gpu_document
from attestation.verifier.gpu.profile import BROKER_GPU
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml

_GPU = world.make_device()
_SWITCH = world.make_device("LS_10")


def _reports() -> Sequence[bytes]:
    return (
        world.sign_report(_GPU, world.gpu_fields()),
        world.sign_report(_GPU, world.gpu_fields(SWITCH_PDI=world.linked_to([_SWITCH])), blocks=world.measurements(3)),
        world.sign_report(_SWITCH, world.switch_fields(_SWITCH, [_GPU]), blocks=world.measurements(1)),
    )


SEEDS: dict[str, Callable[[], Sequence[bytes]]] = {
    "spdm-report": _reports,
    "rim-xml": lambda: (world.driver_rim(), world.make_rim("1.2", {0: [bytes(48)]})),
    "device-chain": lambda: (_GPU.pem, _SWITCH.pem),
    "gpu-document": lambda: (write_gpu_document((world.evidence(_GPU),)), b'{"evidences": []}'),
    "nras-bundle": lambda: (world.nras_bundle(), world.jwks()),
    "revocation-data": lambda: (*world.device_ocsp(_GPU), world.revocation_list(_GPU.chain[2], "ica", [_GPU.chain[1]])),
    "gpu-profile": lambda: (gpu_profile_to_toml(BROKER_GPU).encode(), b'[devices]\nboards = ["G520/0200/885"]\n'),
}
"""Seeds by target."""
