"""GPUs in an image: `gpu = "nvidia"` adds NVIDIA's open kernel modules, firmware, libraries and persistence daemon.

Debian's archive has all of them (components contrib, non-free and non-free-firmware), so that nothing is fetched by a
URL of its own. The modules are compiled from their source for the image's kernel (`cvm_image.build.modules`); the other
packages are unpacked, not configured, and of their files only these are taken. Nothing here has been seen to run: that
needs a GPU with confidential computing, passed through to a guest on SEV-SNP.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cvm_image.build.errors import UnusableRecipe
from cvm_image.build.modules import Edit

LIBRARIES = "usr/lib/x86_64-linux-gnu"
SDK = "usr/lib/sealwright/gpu-sdk"
"""Where the environment of the maker's attestation SDK lies in the guest (`attestation.attester.boot.GPU_PYTHON`)."""
SDK_PINS = Path(__file__).with_name("gpu-sdk.txt")


@dataclass(frozen=True)
class Gpu:
    """How one maker's GPUs come into an image.

    `source` is the package whose `archive` holds the modules' source in `folder`; `packages` are unpacked as they are,
    and of their files those of `files` (globs) go into the root, libraries of `libraries` under their short name too.
    `before` are the kernel's own modules that the maker's guide wants loaded first.
    """

    source: str
    archive: str
    folder: str
    modules: tuple[str, ...]
    edits: tuple[Edit, ...]
    before: tuple[str, ...]
    packages: tuple[str, ...]
    files: tuple[str, ...]
    libraries: tuple[str, ...]
    programs: tuple[str, ...]


NVIDIA = Gpu(
    source="nvidia-open-kernel-source",
    archive="usr/src/nvidia-open-kernel.tar.xz",
    folder="modules/nvidia-open-kernel",
    modules=("nvidia", "nvidia-uvm"),
    # Linux 6.12.118 gave this function a fourth argument: which BARs may not be moved (none).
    edits=(
        Edit(
            "nvidia/nv-pci.c",
            "pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size)",
            "pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size, 0)",
        ),
    ),
    before=("ecdsa_generic", "ecdh_generic"),
    packages=(
        "firmware-nvidia-gsp",
        "libcuda1",
        "libnvidia-cfg1",
        "libnvidia-ml1",
        "libnvidia-ptxjitcompiler1",
        "nvidia-persistenced",
        "nvidia-smi",
    ),
    files=("usr/lib/firmware/nvidia/*/gsp_*.bin", "usr/bin/nvidia-persistenced"),
    libraries=("libcuda.so.1", "libnvidia-cfg.so.1", "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1"),
    programs=("nvidia-smi",),
)
"""NVIDIA's Hopper and later, by the driver of Debian's suite."""

GPUS = {"nvidia": NVIDIA}
COMPONENTS = ("main", "contrib", "non-free", "non-free-firmware")
COMPILER = ("binutils", "bzip2", "gcc", "make", "xz-utils")
"""The compiler's tree, besides essential packages and the kernel's headers."""


def put_into_root(gpu: Gpu, unpacked: Path, root: Path) -> list[str]:
    """Copy what the guest needs of the unpacked packages into the root; return the names of the files.

    Libraries and some programs lie in folders of the maker's own, chosen by links that its packages would make when
    they are configured: here they go where linker and programs look for them. Raises UnusableRecipe without one.
    """
    wanted: dict[str, Path] = {}
    for pattern in gpu.files:
        found = sorted(unpacked.glob(pattern))
        wanted |= {str(path.relative_to(unpacked)): path for path in found}
        _must_be(found, pattern)
    for name in gpu.libraries:
        stem = name.rpartition(".")[0]
        found = [one for one in sorted(unpacked.glob(f"{LIBRARIES}/**/{stem}.[0-9]*")) if not one.is_symlink()]
        _must_be(found, name)
        wanted[f"{LIBRARIES}/{name}"] = found[0]
    for name in gpu.programs:
        found = [one for one in sorted(unpacked.glob(f"usr/lib/nvidia/**/{name}")) if not one.is_symlink()]
        _must_be(found, name)
        wanted[f"usr/bin/{name}"] = found[0]
    for name, path in wanted.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)
        (root / name).chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return sorted(wanted)


def add_environment(root: Path, python: str) -> None:
    """Make the folder `SDK` below `root`, which has packages already, an environment of the guest's own interpreter.

    A file that names the interpreter's home, and a link to it: site.py finds the packages, and no others, by these.
    """
    folder = root / SDK
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(f"/usr/bin/python{python}")
    (folder / "pyvenv.cfg").chmod(0o644)
    (folder / "bin").chmod(0o755)


def sdk_packages(python: str) -> str:
    """Where the environment's packages lie in the guest."""
    return f"{SDK}/lib/python{python}/site-packages"


def _must_be(found: list[Path], what: str) -> None:
    if not found:
        raise UnusableRecipe(f"the GPU's packages hold no {what}", where="gpu", do="Lock with another suite.")
