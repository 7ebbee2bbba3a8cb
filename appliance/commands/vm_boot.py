"""`seal vm boot`: start a built image as a machine of the virtual platform."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cvm_image.qemu import Forward
from policies.errors import Unusable


def add_verbs(app: typer.Typer) -> None:
    """Add the verb to `seal vm`."""
    app.command(
        epilog="Example: seal vm boot build/image --init-data site.toml --vendor vendor/ --chip chips/site "
        "--disk data=site.sealed"
    )(boot)


def boot(
    image: Annotated[Path, typer.Argument(metavar="DIR", help="The image folder (`seal image build`).")],
    init_data: Annotated[Path, typer.Option("--init-data", metavar="FILE", help="Bound by HOST_DATA.")],
    vendor: Annotated[Path, typer.Option(metavar="DIR", help="The virtual vendor (`seal vm vendor`).")],
    chip: Annotated[Path, typer.Option(metavar="DIR", help="The virtual chip (`seal vm chip`).")],
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the guest runs (default: beside the chip, `<chip>.run`).")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A file that is a disk of the guest: read-only but for `vault`."),
    ] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:GUEST", help="A port of this host's loopback that leads to one of the guest."),
    ] = None,
    memory: Annotated[int, typer.Option(min=256, max=1 << 20, help="MiB of memory.")] = 3072,
    vcpu_model: Annotated[str, typer.Option("--vcpu-model", help="Measured; as the image was signed for.")] = "EPYC-v4",
    vcpus: Annotated[int, typer.Option(min=1, help="Measured; as the image was signed for.")] = 1,
    policy: Annotated[str, typer.Option(help="The guest policy.")] = "0x30000",
    id_block: Annotated[
        bool, typer.Option("--id-block/--no-id-block", help="Start with the image's ID block, as signed.")
    ] = True,
    kvm: Annotated[bool, typer.Option("--kvm/--no-kvm", help="Use KVM instead of emulation.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where the tools tree with QEMU is.")
    ] = None,
) -> None:
    """Boot a built image on a virtual chip, show its serial console, and end with QEMU's exit status."""
    from appliance.booted_guest import cached_tools, is_bootable, run_booted_guest
    from attestation.virtual.__main__ import parse_disks
    from attestation.virtual.chip import load_chip
    from attestation.virtual.launch import LaunchSettings, read_init_data, read_measured
    from attestation.virtual.platform import Machine
    from attestation.virtual.vendor import load_vendor
    from cvm_image.verify import load_image

    if load_image(image).platform != "virtual":
        raise Unusable(
            "this image was built for hardware",
            where=str(image),
            do="Build it with --variant virtual to start it here.",
        )
    files = read_measured(image)
    if not is_bootable(files.kernel):
        raise Unusable(
            "this image is started as a process, not booted", where=str(image), do="Start it by `seal vm launch`."
        )
    made_by, processor = load_vendor(vendor), load_chip(chip)
    machine = Machine(
        chip=processor,
        certificates=processor.certificate_table(made_by),
        files=files,
        init_data=read_init_data(init_data),
        settings=LaunchSettings(vcpu_model, vcpus, policy=_number(policy), id_block=id_block),
    )
    sys.stderr.write(f"seal: virtual platform, {processor.product.value} chip {processor.chip_id.hex()[:16]}\n")
    status = run_booted_guest(
        machine,
        image,
        run or chip.with_name(f"{chip.name}.run"),
        tools=cached_tools(cache),
        memory_mib=memory,
        forwards=tuple(_forward(word) for word in forward or []),
        disks=parse_disks(disk or []),
        kvm=kvm,
    )
    raise typer.Exit(status)


def _forward(word: str) -> Forward:
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", word)
    ports = [int(port) for port in match.groups()] if match else []
    if not ports or not all(0 < port < 65536 for port in ports):
        raise Unusable(f"{word!r} names no two ports", where="--forward", do="Write HOST:GUEST.")
    return Forward(*ports)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise Unusable(f"{text!r} is no number", where="--policy", do="Write it like 0x30000.") from None
