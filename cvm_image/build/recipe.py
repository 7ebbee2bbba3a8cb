"""The recipe: what a person writes about an image, as TOML. What it leaves open, its lock file pins.

A recipe is read strictly: an unknown field is refused, so that a setting that was misspelt never goes unnoticed.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cvm_image.build.errors import UnusableRecipe
from cvm_image.generate import FAMILY_ID

MAX_RECIPE = 256 << 10
NFS_MODULES = ("loop", "nfsv4")
"""What a data volume on an NFS export needs of the kernel, beside what one on a disk does."""
HOST = "host"
"""The value of a mirror or the keyring that means: whatever this host's own apt uses for Debian."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]{1,80}$")]
WheelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}(==\d[0-9A-Za-z.+!]{0,30})?$")]
"""A distribution, in the version that the project's constraints give it, or in this one."""
Module = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Argument = Annotated[str, StringConstraints(pattern=r"^[!#-~]{1,200}$")]
"""One word of the kernel's command line: printable ASCII without spaces and quotes."""
RootPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+@/*-]{0,200}$")]
"""A path (or glob) inside the root file system, relative to it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Firmware(_Part):
    """Where the measured firmware comes from: a package of Debian, and the file in it."""

    suite: Name = "forky"
    package: PackageName = "ovmf-amdsev"
    file: RootPath = "usr/share/ovmf/OVMF.amdsev.fd"


class Kernel(_Part):
    """The kernel, its driver allow-list, and the command line that is measured with it.

    `modules` are loaded by the initrd, in this order after what each depends on, and after that no module can be loaded
    for as long as the guest runs. `hardware_modules` and `virtual_modules` join them in that variant alone.
    """

    package: PackageName = "linux-image-cloud-amd64"
    modules: tuple[Module, ...] = ()
    hardware_modules: tuple[Module, ...] = ()
    virtual_modules: tuple[Module, ...] = ()
    arguments: tuple[Argument, ...] = ()


class Base(_Part):
    """The layer that changes seldom: Debian packages.

    After they were configured, `remove` (globs) is taken out, and if `programs` names any, every other program too.
    """

    packages: tuple[PackageName, ...] = ()
    remove: tuple[RootPath, ...] = ()
    programs: tuple[Name, ...] = ()


class Workload(_Part):
    """The layer on top: folders of our own packages, hash-locked wheels, and a folder of files laid over the root.

    `packages` puts our own Python packages in, as a guest of the recipe's variant has them; `files` is a folder beside
    the recipe; `wheels` are distributions for the guest's Python, pinned by the project's constraints or, as
    `name==version`, by the recipe. `container` is a
    `docker save` archive beside the recipe, which `entry = "contained"` runs.
    """

    packages: bool = False
    wheels: tuple[WheelName, ...] = ()
    files: RootPath | None = None
    container: RootPath | None = None


class Network(_Part):
    """The ports that the guest's packet filter opens: everything else is dropped, in and out.

    `nfs` puts the kernel's NFSv4 client in, and lets it speak to the one server that the init-data name, port 2049.
    """

    inbound: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    outbound: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    nfs: bool = False


class Launch(_Part):
    """For which launches the manifest holds a measurement, and what the ID block says.

    Every combination is measured and gets its ID block. `family` is the FAMILY_ID in all of them, as text; the IMAGE_ID
    is the start of the SHA-256 of the recipe's name.
    """

    vcpu_models: tuple[str, ...] = ("EPYC-v4",)
    vcpus: tuple[Annotated[int, Field(ge=1, le=512)], ...] = (1,)
    vmms: tuple[Literal["qemu", "ec2", "gce"], ...] = ("qemu",)
    guest_features: tuple[int, ...] = (0x1,)
    svn: Annotated[int, Field(ge=0, le=0xFFFFFFFF)] = 1
    family: Annotated[str, StringConstraints(pattern=r"^[!-~]{1,16}$")] = FAMILY_ID.decode()


class Recipe(_Part):
    """One image.

    `init` is the first program of the verified root, `entry` the module of ours whose `main(guest)` it runs (None: the
    recipe brings an init of its own), `python` the version of the root's interpreter, if it has one. `gpu` adds the
    drivers of a maker's GPUs, compiled for the image's kernel and signed (`cvm_image.build.gpu`).
    """

    name: Name
    suite: Name = "trixie"
    variant: Literal["hardware", "virtual"] = "hardware"
    mirrors: dict[Name, str] = Field(default_factory=lambda: {"debian": HOST, "debian-security": HOST})
    keyring: str = HOST
    gpu: Literal["nvidia"] | None = None
    init: Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9_./-]{1,120}$")]
    entry: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_.]{0,80}$")] | None = None
    python: Annotated[str, StringConstraints(pattern=r"^3\.1[1-3]$")] | None = None
    firmware: Firmware = Firmware()
    kernel: Kernel = Kernel()
    base: Base = Base()
    workload: Workload = Workload()
    network: Network = Network()
    launch: Launch = Launch()

    def modules(self) -> tuple[str, ...]:
        """The drivers of this variant, in the order in which they are asked for."""
        more = self.kernel.hardware_modules if self.variant == "hardware" else self.kernel.virtual_modules
        return (*self.kernel.modules, *more, *(NFS_MODULES if self.network.nfs else ()))


def load_recipe(path: Path, *, variant: str | None = None) -> Recipe:
    """Read the recipe at `path`; `variant` overrides the one that it names.

    A recipe that says `based_on = "OTHER.toml"` takes from that one, which lies beside it, what it does not say itself
    (settings, and in a table the table's settings). Raises UnusableRecipe, naming each field that is wrong.
    """
    document = _read(path)
    parent = base_of(path, document)
    if parent is not None:
        document = _over(_read(parent), document)
        if base_of(parent, _read(parent)) is not None:
            raise UnusableRecipe("a recipe is based on one that has a base", where=str(path), do="Base it on that one.")
    document.pop("based_on", None)
    if variant is not None:
        document["variant"] = variant
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UnusableRecipe(f"the recipe is refused: {found}", where=str(path), do="Correct these fields.") from None
    for globbed in (*recipe.base.remove, recipe.workload.files or "files", recipe.workload.container or "file"):
        if ".." in globbed.split("/"):
            raise UnusableRecipe(f"{globbed!r} climbs out of its folder", where=str(path), do="Use paths below it.")
    return recipe


def base_of(path: Path, document: dict[str, Any] | None = None) -> Path | None:
    """The recipe that the one at `path` is based on, if any. Raises UnusableRecipe for a name that is none."""
    named = (_read(path) if document is None else document).get("based_on")
    if named is None:
        return None
    if not isinstance(named, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}\.toml", named):
        raise UnusableRecipe("based_on names no recipe", where=str(path), do='Write based_on = "NAME.toml".')
    return path.parent / named


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UnusableRecipe(
            f"the recipe cannot be read: {error.strerror}", where=str(path), do="Name a recipe file."
        ) from None
    if len(raw) > MAX_RECIPE:
        raise UnusableRecipe("the recipe is too large", where=str(path), do=f"At most {MAX_RECIPE} bytes.")
    try:
        return tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UnusableRecipe(f"the recipe is no TOML: {error}", where=str(path), do="Correct it.") from None


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What `own` says, over what `base` says."""
    merged = {**base, **own}
    for name, table in base.items():
        if isinstance(table, dict) and isinstance(own.get(name), dict):
            merged[name] = {**table, **own[name]}
    return merged
