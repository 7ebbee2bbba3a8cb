"""`seal vm`: start guests; make the virtual vendor and chips that virtual guests run on."""

from __future__ import annotations

import secrets
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.commands import vm_boot, vm_data, vm_vault
from appliance.output import print_json
from attestation.evidence.report import Product

if TYPE_CHECKING:
    from cvm_image.hardware import HardwarePlan

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Start a measured virtual machine.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(
    epilog="Examples: seal vm launch kits/site-borealis; "
    "seal vm launch build/image --role site --init-data site.toml --vendor vendor/ --chip chips/site"
)
def launch(
    image: Annotated[
        Path, typer.Argument(metavar="DIR", help="The image folder; or a guest's kit, which needs no other option.")
    ],
    init_data: Annotated[
        Path | None, typer.Option("--init-data", metavar="FILE", help="Bound by HOST_DATA (a kit brings its own).")
    ] = None,
    vendor: Annotated[Path | None, typer.Option(metavar="DIR", help="The virtual vendor (`seal vm vendor`).")] = None,
    chip: Annotated[Path | None, typer.Option(metavar="DIR", help="The virtual chip (`seal vm chip`).")] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the guest runs (default: the chip's or image's, `.run`).")
    ] = None,
    role: Annotated[str | None, typer.Option(help="Refuse to start if the init-data name another role.")] = None,
    disk: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A file that the guest is shown as a disk.")
    ] = None,
    policy: Annotated[str, typer.Option(help="The guest policy (virtual platform).")] = "0x30000",
    vcpu_model: Annotated[str, typer.Option("--vcpu-model", help="Measured; as the image was signed for.")] = "EPYC-v4",
    vcpus: Annotated[int, typer.Option(min=1, help="Measured; as the image was signed for.")] = 2,
    memory: Annotated[
        int, typer.Option(min=256, metavar="MIB", help="The memory of a guest that is a machine.")
    ] = 4096,
    forward: Annotated[
        list[str] | None, typer.Option(metavar="HOST:GUEST", help="A port that leads to a machine.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="A GPU of this host, as 0000:41:00.0 (hardware).")
    ] = None,
    id_block: Annotated[
        bool, typer.Option("--id-block/--no-id-block", help="Start with the image's ID block, as signed.")
    ] = True,
    print_qemu: Annotated[
        bool, typer.Option("--print-qemu", help="Print QEMU's command line for SEV-SNP hardware; start nothing.")
    ] = False,
    print_libvirt: Annotated[
        bool, typer.Option("--print-libvirt", help="Print libvirt's domain XML for SEV-SNP hardware; start nothing.")
    ] = False,
) -> None:
    """Start a guest on SEV-SNP hardware or a virtual chip, show what it prints, and end with its exit status."""
    from attestation.virtual.__main__ import parse_disks
    from attestation.virtual.launch import read_init_data
    from cvm_image.verify import read_manifest_file
    from policies.kits import is_kit

    if is_kit(image):
        raise typer.Exit(_launch_kit(image, role, tuple(gpu or ()), print_qemu=print_qemu, print_libvirt=print_libvirt))
    read_manifest_file(image)  # a folder that holds no image is the first thing to say
    if init_data is None:
        raise typer.BadParameter("a guest that is started from an image's folder needs --init-data")
    raw, disks = read_init_data(init_data), parse_disks(disk or [])
    if role is not None:
        _check_role(raw, role, init_data)
    if print_qemu or print_libvirt or (chip is None and _is_for_hardware(image)):
        from cvm_image.hardware import Shape, plan_hardware

        shape = Shape(vcpu_model, vcpus, memory, tuple(_forward(word) for word in forward or ()), tuple(gpu or ()))
        plan = plan_hardware(image, raw, run or image.with_name(f"{image.name}.run"), shape, disks)
        raise typer.Exit(_launch_hardware(plan, print_qemu=print_qemu, print_libvirt=print_libvirt))
    if vendor is None or chip is None:
        raise typer.BadParameter("a guest on the virtual platform needs --vendor and --chip")
    settings = {"vcpu_model": vcpu_model, "vcpus": vcpus, "policy": _number(policy, "--policy"), "id_block": id_block}
    board = (memory, tuple(_forward(word) for word in forward or ()))
    raise typer.Exit(_launch_virtual(image, raw, vendor, chip, run, disks, settings, board))


def _launch_kit(folder: Path, role: str | None, gpus: tuple[str, ...], *, print_qemu: bool, print_libvirt: bool) -> int:
    from appliance.kits.starting import guest_start, hardware_plan, launch_virtual_guest

    start = guest_start(folder)
    if role is not None:
        _check_role(start.init_data, role, folder)
    if start.kit.manifest.platform == "virtual" and not (print_qemu or print_libvirt):
        return launch_virtual_guest(start)
    return _launch_hardware(hardware_plan(start, gpus), print_qemu=print_qemu, print_libvirt=print_libvirt)


def _launch_hardware(plan: HardwarePlan, *, print_qemu: bool, print_libvirt: bool) -> int:
    """Print how the guest is started, or start it."""
    from appliance.hardware_guest import run_hardware_guest

    if not (print_qemu or print_libvirt):
        return run_hardware_guest(plan)
    typer.echo(plan.domain() if print_libvirt else shlex.join(plan.command()), nl=print_qemu)
    return 0


def _launch_virtual(
    image: Path,
    raw: bytes,
    vendor: Path,
    chip: Path,
    run: Path | None,
    disks: dict[str, Path],
    settings: dict[str, Any],
    board: tuple[int, tuple[Any, ...]],
) -> int:
    """Start the guest as a machine if the image's kernel boots, else as a process; `board` is for machines."""
    from appliance.booted_guest import cached_tools, is_bootable, run_booted_guest
    from attestation.virtual.__main__ import image_disks
    from attestation.virtual.chip import load_chip
    from attestation.virtual.launch import LaunchSettings, read_measured
    from attestation.virtual.platform import Machine, run_guest
    from attestation.virtual.vendor import load_vendor

    made_by, processor = load_vendor(vendor), load_chip(chip)
    _refuse_hardware_image(image)
    files = read_measured(image)
    boots = is_bootable(files.kernel)
    machine = Machine(
        chip=processor,
        certificates=processor.certificate_table(made_by),
        files=files,
        init_data=raw,
        settings=LaunchSettings(**settings),
        disks={} if boots else image_disks(image) | disks,
    )
    sys.stderr.write(f"seal: virtual platform, {processor.product.value} chip {processor.chip_id.hex()[:16]}\n")
    folder = run or chip.with_name(f"{chip.name}.run")
    if not boots:
        return run_guest(machine, folder)
    return run_booted_guest(
        machine, image, folder, tools=cached_tools(), memory_mib=board[0], forwards=board[1], disks=disks
    )


@app.command(epilog="Example: seal vm vendor vendor/ --product Milan")
def vendor(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The vendor's folder; products are added to it.")],
    product: Annotated[list[Product] | None, typer.Option(help="A product line (default: Milan).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a virtual vendor: the root keys that stand in AMD's place for virtual chips, and for nothing else."""
    from attestation.virtual.vendor import create_vendor

    made = create_vendor(folder, product or [Product.MILAN], at=datetime.now(UTC))
    roots = [{"product": it.product.value, "ark_spki_sha256": it.ark_spki_sha256} for it in made.authorities.values()]
    if as_json:
        print_json({"platform": "virtual", "roots": roots})
    else:
        for root in roots:
            typer.echo(f"virtual root for {root['product']}: {root['ark_spki_sha256']}")


@app.command(epilog="Example: seal vm chip chips/site --vendor vendor/ --product Genoa")
def chip(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the chip.")],
    vendor: Annotated[Path, typer.Option(metavar="DIR", help="The virtual vendor (`seal vm vendor`).")],
    product: Annotated[Product, typer.Option(help="The product line.")] = Product.MILAN,
    as_json: AsJson = False,
) -> None:
    """Make a virtual chip: an identity, a TCB, and a key that the virtual vendor certifies."""
    from attestation.errors import PlatformUnusable
    from attestation.virtual.chip import create_chip
    from attestation.virtual.vendor import load_vendor

    if folder.exists():
        raise PlatformUnusable("there is something already", where=str(folder), do="Name a new folder for the chip.")
    made = create_chip(load_vendor(vendor), folder, product, seed=secrets.token_hex(16), at=datetime.now(UTC))
    facts = {"platform": "virtual", "product": product.value, "chip_id": made.chip_id.hex(), "tcb": made.tcb.as_dict()}
    if as_json:
        print_json(facts)
    else:
        typer.echo(f"virtual {product.value} chip {made.chip_id.hex()}: {made.tcb}")


def _check_role(raw: bytes, role: str, path: Path) -> None:
    """Stop a mistake before it costs a refusal by the broker: this is no protection, the enrolment is."""
    from policies.errors import Refused
    from policies.init_data import parse_init_data

    found = parse_init_data(raw).role
    if found != role:
        raise Refused(
            f"the init-data are for the role {found!r}, not {role!r}", where=str(path), do="Give the right file."
        )


def _is_for_hardware(image: Path) -> bool:
    """Whether the image's manifest says so; one without a manifest is no hardware image."""
    from cvm_image.manifest import MANIFEST
    from cvm_image.verify import load_image

    return (image / MANIFEST).is_file() and load_image(image).platform == "hardware"


def _refuse_hardware_image(image: Path) -> None:
    """A hardware image would start here and then find no processor: say so at once, where there is a manifest."""
    from attestation.errors import PlatformUnusable

    if _is_for_hardware(image):
        raise PlatformUnusable(
            "this image was built for hardware and holds no code for the virtual platform",
            where=str(image),
            do="Start it on SEV-SNP hardware, or generate a virtual image.",
        )


def _forward(word: str) -> Any:
    from cvm_image.qemu import Forward
    from policies.errors import Unusable

    host, colon, guest = word.partition(":")
    if not colon or not all(part.isdecimal() and 0 < int(part) < 65536 for part in (host, guest)):
        raise Unusable(f"{word!r} names no two ports", where="--forward", do="Write it like 8443:8443.")
    return Forward(int(host), int(guest))


def _number(text: str, option: str) -> int:
    from policies.errors import Unusable

    try:
        return int(text, 0)
    except ValueError:
        raise Unusable(f"{text!r} is no number", where=option, do="Write it like 0x30000.") from None


vm_boot.add_verbs(app)
vm_vault.add_verbs(app)
app.add_typer(vm_data.app, name="data")
