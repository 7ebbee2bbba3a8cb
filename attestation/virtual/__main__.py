"""`python -m attestation.virtual`: launch one guest on a virtual chip. `seal vm launch` is its usual caller."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from attestation.errors import PlatformUnusable
from attestation.virtual.chip import load_chip
from attestation.virtual.launch import LaunchSettings, read_init_data, read_measured
from attestation.virtual.platform import Machine, run_guest
from attestation.virtual.processor import POLICY
from attestation.virtual.vendor import load_vendor
from policies.errors import Refused, SealwrightError

_DISK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def main(arguments: list[str] | None = None) -> int:
    """Launch the guest and return its exit status; unusable input is 2, with one sentence on standard error."""
    options = _parser().parse_args(arguments)
    try:
        vendor = load_vendor(options.vendor)
        chip = load_chip(options.chip)
        machine = Machine(
            chip=chip,
            certificates=chip.certificate_table(vendor),
            files=read_measured(options.image),
            init_data=read_init_data(options.init_data),
            settings=LaunchSettings(
                vcpu_model=options.vcpu_model,
                vcpus=options.vcpus,
                vmm=options.vmm,
                guest_features=options.guest_features,
                policy=options.policy,
                id_block=options.id_block,
            ),
            disks=image_disks(options.image) | parse_disks(options.disk),
        )
        return run_guest(machine, options.run, keep=options.keep)
    except SealwrightError as error:
        sys.stderr.write(f"virtual: {error}\n")
        return 1 if isinstance(error, Refused) else 2


def image_disks(image: Path) -> dict[str, Path]:
    """Return the disks that every guest of an image is shown: its root file system and the verity tree over it."""
    return {"rootfs": image / "rootfs.erofs", "verity": image / "rootfs.verity"}


def parse_disks(words: list[str]) -> dict[str, Path]:
    """Read `NAME=PATH` words. Raises PlatformUnusable for another form, a name twice, or a path that is no file."""
    disks: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not _DISK_NAME.fullmatch(name) or name in disks or name in {"rootfs", "verity"}:
            raise PlatformUnusable(f"{word!r} names no disk", where="--disk", do="Write NAME=PATH, each name once.")
        if not Path(path).is_file():
            raise PlatformUnusable(f"the disk {name!r} is no file", where=path, do="Check the path.")
        disks[name] = Path(path)
    return disks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attestation.virtual",
        description="Launch one guest on a virtual SEV-SNP chip.",
        allow_abbrev=False,
    )
    parser.add_argument("--vendor", type=Path, required=True, metavar="DIR", help="folder of the virtual vendor")
    parser.add_argument("--chip", type=Path, required=True, metavar="DIR", help="folder of the virtual chip")
    parser.add_argument("--image", type=Path, required=True, metavar="DIR", help="image folder")
    parser.add_argument("--init-data", type=Path, required=True, metavar="FILE", help="bound by HOST_DATA")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where the guest is unpacked and runs")
    parser.add_argument(
        "--disk", action="append", default=[], metavar="NAME=PATH", help="a file that the guest is shown"
    )
    parser.add_argument(
        "--policy", type=_number, default=POLICY, metavar="N", help=f"guest policy (default {POLICY:#x})"
    )
    parser.add_argument("--vcpu-model", default="EPYC-v4", metavar="MODEL", help="measured (default EPYC-v4)")
    parser.add_argument("--vcpus", type=int, default=2, metavar="N", help="measured (default 2)")
    parser.add_argument("--vmm", default="qemu", metavar="VMM", help="measured (default qemu)")
    parser.add_argument("--guest-features", type=_number, default=1, metavar="N", help="measured (default 0x1)")
    parser.add_argument(
        "--no-id-block",
        dest="id_block",
        action="store_false",
        help="start without the image's ID block, as any host may",
    )
    parser.add_argument("--keep", action="store_true", help="leave the unpacked guest behind")
    return parser


def _number(word: str) -> int:
    return int(word, 0)


if __name__ == "__main__":
    sys.exit(main())
