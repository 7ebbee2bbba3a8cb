"""The page that a kit brings to its operator: what this is, where it stands, how to check it, how to start it."""

from __future__ import annotations

from policies.documents import format_time
from policies.kits import KitImage, KitManifest


def write_readme(manifest: KitManifest, name: str) -> bytes:
    """README.md of a kit whose folder is called `name`."""
    parts = [_head(manifest, name), *_keys(manifest, name), _check(name), _start(manifest, name), _network(manifest)]
    return ("\n\n".join(part for part in parts if part) + "\n").encode("utf-8")


def _head(manifest: KitManifest, name: str) -> str:
    world = (
        "This is a **virtual** consortium: it protects nothing and is for trying out."
        if manifest.platform == "virtual"
        else "This consortium runs on SEV-SNP hardware."
    )
    return f"""# Kit of {manifest.place}

For {manifest.member}, made {format_time(manifest.made)} from version {manifest.charter_version} of the charter

    {manifest.charter}

Compare this id with the one that your member's signers have. {world}

Nothing in this folder is secret, and nothing in it may be changed: `kit.dsse.json` lists every file by its SHA-256 and
is signed by a member. What this host makes itself goes into `{name}/local/`, which never leaves it."""


def _keys(manifest: KitManifest, name: str) -> list[str]:
    if manifest.role == "broker":
        return [
            f"""## Keys
The folder that `seal broker init` made here is the kit's `local/`:

    mv BROKER-FOLDER {name}/local"""
        ]
    if manifest.role == "user":
        return [
            f"""## Keys
The folder that `seal charter user` made here is the kit's `local/`:

    mv YOUR-FOLDER {name}/local"""
        ]
    parts = []
    if manifest.image is not None:
        parts.append(_image(manifest, manifest.image, name))
    if manifest.disks:
        listed = "\n".join(f"    {name}/local/disks/{disk}" for disk in manifest.disks)
        how = "`seal site seal`; a vault by `seal vm vault`"
        parts.append(f"## Disks\nThe guest is shown these files, sealed ({how}):\n\n{listed}")
    return parts


def _image(manifest: KitManifest, image: KitImage, name: str) -> str:
    text = f"""## Image
`{image.name}`, whose `manifest.dsse.json` has the SHA-256

    {image.manifest_sha256}

Get it from {image.source} and place it (or a link to it) at `{name}/local/image`."""
    if manifest.platform == "virtual":
        model = image.vcpu_model
        text += f"""

The virtual platform needs a vendor and a chip, made once on this host for {model}; the vendor's root must be the one
that the charter names:

    {name}/local/vendor  (seal vm vendor)    {name}/local/chip  (seal vm chip)"""
    return text


def _check(name: str) -> str:
    return f"""## Check
    seal doctor {name}

tells what is missing on this host, step by step, each with what to do. It changes nothing."""


def _start(manifest: KitManifest, name: str) -> str:
    return f"## Start\n    {start_command(manifest, name)}\n\nIt ends on SIGTERM or Ctrl-C."


def start_command(manifest: KitManifest, name: str) -> str:
    """The one command that starts what a kit is for."""
    if manifest.role == "broker":
        return f"seal broker run {name}"
    if manifest.role == "user":
        return f"seal job list --kit {name}"
    if manifest.platform == "hardware":
        return f"seal vm launch {name} --print-qemu"
    return f"seal vm launch {name}"


def _network(manifest: KitManifest) -> str:
    lines = ["## Network"]
    lines += [f"- listens on {port.listen}: {port.purpose}" for port in manifest.ports]
    lines += [f"- reaches broker {broker.name} at {broker.url}" for broker in manifest.brokers]
    if manifest.server is not None:
        lines.append(f"- reaches server {manifest.server.name} at {manifest.server.address}")
    if manifest.hosts:
        lines += ["", "Names that need a line in /etc/hosts where no DNS knows them:", ""]
        lines += [f"    {entry.address} {' '.join(entry.names)}" for entry in manifest.hosts]
    return "\n".join(lines)
