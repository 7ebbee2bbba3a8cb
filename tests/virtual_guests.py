"""Small guests for tests: images with a few lines of a test's own as entry, launched by the real platform process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cvm_image.generate import generate_image
from cvm_image.manifest import ImageManifest
from cvm_image.packages import Platform, guest_packages
from cvm_image.signing import SigningKeys

KEYS = SigningKeys(
    builder=Ed25519PrivateKey.from_private_bytes(b"b" * 32),
    id_key=ec.derive_private_key(0x1D, ec.SECP384R1()),
    author_key=ec.derive_private_key(0xA0, ec.SECP384R1()),
)
"""Fixed keys: images of tests are the same in each run."""

ATTEST = """
import sys
from attestation.attester.boot import read_boot

def main(guest):
    evidence = read_boot(guest).attester().evidence(bytes(range(64)))
    sys.stdout.write(evidence.report.hex() + "\\n" + evidence.certificates.hex() + "\\n")
    return 0
"""
"""An entry that prints its report and certificate table in hex."""


@dataclass(frozen=True)
class World:
    """A vendor's and a chip's folder."""

    vendor: Path
    chip: Path


def make_image(folder: Path, code: str = ATTEST, *, platform: Platform = "virtual") -> ImageManifest:
    """Generate an image in `folder` whose guest runs `main(guest)` of `code`, beside our attestation packages."""
    package = folder.parent / f"{folder.name}.source" / "probe"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text(code)
    ours = [tree for tree in guest_packages(platform) if tree.folder.name in {"policies", "attestation"}]
    return generate_image(
        folder, name="probe", keys=KEYS, platform=platform, packages=[*ours, package], entry="probe.entry"
    )


def command(world: World, image: Path, run: Path, *more: str, init_data: Path | None = None) -> list[str]:
    """Return the command line of a platform process for the image, with a run folder of its own."""
    if init_data is None:
        init_data = image.parent / "init-data.toml"
        init_data.write_text('version = 1\nrole = "site"\n')
    return [
        sys.executable,
        "-m",
        "attestation.virtual",
        *("--vendor", str(world.vendor)),
        *("--chip", str(world.chip)),
        *("--image", str(image)),
        *("--init-data", str(init_data)),
        *("--run", str(run)),
        *more,
    ]


def launch(world: World, image: Path, *more: str, run: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a guest to its end (20 seconds at most) and return what the platform process printed and its status."""
    folder = run or image.parent / f"{image.name}.run"
    return subprocess.run(command(world, image, folder, *more), capture_output=True, text=True, timeout=20, check=False)


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
