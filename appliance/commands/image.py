"""`seal image`: make, measure, verify and compare images."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from appliance.commands.image_build import Cache, PinFile, add_verbs, tools_of
from appliance.output import print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Build, measure, sign and compare CVM images.")

ImageFolder = Annotated[Path, typer.Argument(metavar="DIR", help="An image folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Login = Annotated[
    Path | None,
    typer.Option("--login", metavar="FILE", help="`user:password` for the registry, in a file of mode 0600."),
]
BuilderKey = Annotated[
    Path,
    typer.Option("--builder", metavar="FILE", help="The builder's public key (Ed25519, PEM), from a source you trust."),
]


@app.command(epilog="Example: seal image keys keys/")
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys.")],
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="URI", help="Make them in a PKCS#11 token: pkcs11:token=…?module-path=…"),
    ] = None,
    pin_file: PinFile = None,
    as_json: AsJson = False,
) -> None:
    """Make the keys that sign images: the builder's, the ID key and the author key.

    In a token they are named NAME-builder, NAME-id and NAME-author after the `object` of the URI, and DIR holds where.
    """
    from cvm_image.signing import PUBLIC, create_signing_keys, create_token_keys

    made = create_signing_keys(folder) if token is None else create_token_keys(folder, token, pin_file)
    _tell(_key_facts(made) | {"public": str(folder / PUBLIC)}, as_json)


@app.command(epilog="Example: seal image generate build/image --name site --keys keys/")
def generate(
    folder: ImageFolder,
    name: Annotated[str, typer.Option(help="The image's name, as a charter will name it.")],
    keys: Annotated[Path, typer.Option("--keys", metavar="DIR", help="The signing keys (`seal image keys`).")],
    platform: Annotated[
        Literal["virtual", "hardware"], typer.Option(help="Which attester the guest uses.")
    ] = "virtual",
    package: Annotated[
        list[Path] | None, typer.Option("--package", metavar="DIR", help="A Python package to add to ours.")
    ] = None,
    entry: Annotated[str, typer.Option(help="The module whose main(guest) the guest runs.")] = "appliance.node",
    svn: Annotated[int, typer.Option(min=0, help="The security version, in the ID block.")] = 1,
    vcpu_model: Annotated[
        list[str] | None, typer.Option("--vcpu-model", help="A vCPU model to measure for (default EPYC-v4).")
    ] = None,
    vcpus: Annotated[
        list[int] | None, typer.Option("--vcpus", min=1, help="A number of vCPUs to measure for (default 2).")
    ] = None,
    pin_file: PinFile = None,
    as_json: AsJson = False,
) -> None:
    """Generate an image whose guest runs as a process of the virtual platform: no tools tree, no emulator, a second."""
    from cvm_image.generate import LaunchGrid, generate_image
    from cvm_image.packages import guest_packages
    from cvm_image.signing import load_signing_keys

    manifest = generate_image(
        folder,
        name=name,
        keys=load_signing_keys(keys, pin_file),
        platform=platform,
        packages=[*guest_packages(platform), *(package or [])],
        entry=entry,
        svn=svn,
        grid=LaunchGrid(tuple(vcpu_model or ("EPYC-v4",)), tuple(vcpus or (2,))),
    )
    _tell(_facts(folder, manifest), as_json)


@app.command(epilog="Example: seal image measure build/image --vcpu-model EPYC-v4 --vcpus 2 --json")
def measure(
    folder: ImageFolder,
    vcpu_model: Annotated[str, typer.Option("--vcpu-model", help="QEMU's name of the vCPU model.")] = "EPYC-v4",
    vcpus: Annotated[int, typer.Option(min=1, help="How many vCPUs the guest has.")] = 2,
    vmm: Annotated[str, typer.Option(help="The virtual machine monitor: qemu, ec2 or gce.")] = "qemu",
    guest_features: Annotated[str, typer.Option("--guest-features", help="SEV features of the guest.")] = "0x1",
    as_json: AsJson = False,
) -> None:
    """Print the launch measurement that a guest with these settings reports, from the files as they are."""
    from attestation.evidence.launch import measure_launch
    from cvm_image.files import read_measured

    measurement = measure_launch(
        **read_measured(folder),
        vcpu_model=vcpu_model,
        vcpus=vcpus,
        vmm=vmm,
        guest_features=_number(guest_features, "--guest-features"),
    ).hex()
    if as_json:
        print_json({"measurement": measurement})
    else:
        typer.echo(measurement)


@app.command(epilog="Example: seal image verify build/image --builder builder.pem")
def verify(folder: ImageFolder, builder: BuilderKey, as_json: AsJson = False) -> None:
    """Check the builder's signature, every file, and every measurement, ID block and root hash, derived again."""
    from cvm_image.files import read_public_key
    from cvm_image.verify import verify_image

    manifest = verify_image(folder, read_public_key(builder))
    _tell(_facts(folder, manifest) | {"verified": True}, as_json)


@app.command(epilog="Example: seal image show build/image --json")
def show(folder: ImageFolder, as_json: AsJson = False) -> None:
    """Print what an image's manifest says. Nothing is verified: for that, `seal image verify`."""
    from cvm_image.verify import load_image

    manifest = load_image(folder)
    _tell(_facts(folder, manifest) | {"verified": False}, as_json)


@app.command(epilog="Example: seal image diff image-1.0/ image-1.1/")
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="An image folder.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Tell which setting, file, package, measured input and measurement changed. Exit status 1 if anything did.

    Two built images are opened with the tools tree of the cache and compared file by file.
    """
    from cvm_image.build.contents import diff_contents, is_built
    from cvm_image.build.errors import UnusableHost
    from cvm_image.difference import diff_images

    changes = diff_images(one, other)
    if changes and is_built(one) and is_built(other):
        try:
            tools = tools_of(cache, "diff")
        except UnusableHost as reason:
            sys.stderr.write(f"what is inside initrd and root was not compared: {reason.what}\n")
        else:
            changes += diff_contents(one, other, tools)
    if as_json:
        print_json(
            {"changes": [{"kind": it.kind, "name": it.name, "before": it.before, "after": it.after} for it in changes]}
        )
    else:
        for it in changes:
            typer.echo(f"{it.kind}: {it.name}: {it.before or 'absent'} -> {it.after or 'absent'}")
        if not changes:
            typer.echo("The images are the same.")
    raise typer.Exit(1 if changes else 0)


@app.command(
    "export",
    epilog="Examples: seal image export build/image layout/; "
    "seal image export build/image oci://registry.example/sealwright/fl:1 --login login",
)
def export_(
    folder: ImageFolder,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A new folder for an OCI image layout, or oci://HOST/NAME:TAG.")
    ],
    login: Login = None,
    as_json: AsJson = False,
) -> None:
    """Write an image as an OCI artefact: into a layout, for any OCI tool to carry, or into a registry."""
    from cvm_image.oci import export_image
    from cvm_image.registry import is_reference, parse_reference, push_layout

    if not is_reference(target):
        _tell({"layout": target, "digest": export_image(folder, Path(target))}, as_json)
        return
    reference, name = parse_reference(target), _login(login)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.absolute().parent) as scratch:
        export_image(folder, Path(scratch) / "layout")
        _tell({"reference": target, "digest": push_layout(Path(scratch) / "layout", reference, name)}, as_json)


@app.command(
    "import",
    epilog="Examples: seal image import layout/ build/image --builder builder.pem; "
    "seal image import oci://registry.example/sealwright/fl:1 build/image --builder builder.pem",
)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder with an OCI image layout, or a reference.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the image.")],
    builder: BuilderKey,
    login: Login = None,
    as_json: AsJson = False,
) -> None:
    """Take an image out of a layout or registry, if its builder signed it and every byte of it verifies."""
    from cvm_image.files import read_public_key
    from cvm_image.oci import import_image
    from cvm_image.registry import is_reference, parse_reference, pull_layout

    key = read_public_key(builder)
    with contextlib.ExitStack() as ends:
        layout = Path(source)
        if is_reference(source):
            reference, name = parse_reference(source), _login(login)
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".import-", dir=folder.absolute().parent)
            layout = Path(ends.enter_context(scratch)) / "layout"
            pull_layout(reference, layout, name)
        manifest = import_image(layout, folder, key)
    _tell(_facts(folder, manifest) | {"verified": True}, as_json)


def _login(path: Path | None) -> str | None:
    from policies.errors import Unusable
    from policies.keys import read_secret

    if path is None:
        return None
    text = read_secret(path).decode("utf-8", "replace").rstrip("\n")
    if not re.fullmatch(r"[^:\x00-\x1f]+:[^\x00-\x1f]+", text):
        raise Unusable("the login is not one line `user:password`", where=str(path), do="Write it so, mode 0600.")
    return text


def _facts(folder: Path, manifest: Any) -> dict[str, Any]:
    from cvm_image.manifest import MANIFEST
    from cvm_image.verify import file_digest

    return {
        "name": manifest.name,
        "platform": manifest.platform,
        "entry": manifest.entry,
        "svn": manifest.svn,
        "manifest_sha256": file_digest(folder / MANIFEST),
        "root_hash": manifest.root_hash,
        "id_key_digest": manifest.id_key_digest,
        "author_key_digest": manifest.author_key_digest,
        "measurements": [value.model_dump() for value in manifest.measurements],
    }


def _key_facts(made: Any) -> dict[str, Any]:
    from attestation.evidence.id_block import key_digest
    from policies.keys import fingerprint, public_pem

    return {
        "builder": fingerprint(public_pem(made.builder.public_key())),
        "id_key_digest": key_digest(made.id_key.public_key()).hex(),
        "author_key_digest": key_digest(made.author_key.public_key()).hex(),
    }


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        if name == "measurements":
            for it in value:
                settings = f"{it['vcpu_model']}, {it['vcpus']} vCPUs, {it['vmm']}, features {it['guest_features']:#x}"
                typer.echo(f"measurement ({settings}): {it['measurement']}")
        else:
            typer.echo(f"{name.replace('_', ' ')}: {value}")


def _number(text: str, option: str) -> int:
    from policies.errors import Unusable

    try:
        return int(text, 0)
    except ValueError:
        raise Unusable(f"{text!r} is no number", where=option, do="Write it like 0x1.") from None


add_verbs(app)
