"""The setting of the demonstration: three members, each with a folder that stands for its own host, and who runs what.

`founding` fills it by the commands of `seal`. Everything is made anew in one folder; nothing in it outlives the next
run. What members send each other goes through `shared`: public halves, requests, proposals, images, never a secret.
"""

from __future__ import annotations

import fcntl
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from appliance.demo.verbs import Verbs
from appliance.kits.starting import CHIP, VENDOR
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip, load_chip
from attestation.virtual.vendor import Vendor, load_vendor
from policies.charter import Charter, current_charter, read_store
from policies.documents import BrokerEntry
from policies.errors import Unusable
from policies.kits import LOCAL

OWNER: Final = "acme-pharma"
HOSPITALS: Final = ("borealis-hospital", "cygnus-bio")
MEMBERS: Final = (OWNER, *HOSPITALS)
SCIENTIST: Final = "scientist"
BROKERS: Final[Mapping[str, str]] = {
    "acme-broker": OWNER,
    "borealis-broker": "borealis-hospital",
    "cygnus-broker": "cygnus-bio",
}
"""Each broker's name and the member who runs it; the first is the one that attacks by hand go to."""
BROKER_THRESHOLD: Final = 2
"""How many brokers must vouch for a guest, and put the time on the charter."""
BROKER: Final = next(iter(BROKERS))
SERVER: Final = "acme-server"
SITES: Final[Mapping[str, str]] = {"borealis-site": "borealis-hospital", "cygnus-site": "cygnus-bio"}
"""Each site's name and its member."""
GUESTS: Final = (SERVER, *SITES)
PRODUCTS: Final[Mapping[str, Product]] = {
    SERVER: Product.GENOA,
    "borealis-site": Product.MILAN,
    "cygnus-site": Product.TURIN,
}
"""The processor of each guest's host."""
IMAGE: Final = "fl"
MODEL_KEY: Final = f"{OWNER}/key/model"
MODEL_SHARES: Final = 2
"""How many brokers must release their share of the model's key: it is split over all of them."""
BOOTED_BROKER_PORT: Final = 9443
"""The first broker's port for booted guests; the others' follow."""
BOOTED_SERVER_PORT: Final = 8443
"""Ports that a booted image's packet filter lets through (`cvm_image/recipes/fl.toml`)."""
HOST_SEEN_BY_GUEST: Final = "10.0.2.2"
"""The host's loopback, as QEMU's user network shows it to a booted guest."""
MARK: Final = "demonstration"
"""A file that says that a folder is a demonstration's."""


def data_key(site: str) -> str:
    """The resource that holds the key of a site's data."""
    return f"{SITES[site]}/key/data"


def broker_of(member: str) -> str:
    """A member's own broker, where its own keys are deposited: it alone holds them whole."""
    return next(broker for broker, owner in BROKERS.items() if owner == member)


@dataclass(frozen=True)
class Setting:
    """Where everything lies, and the ports. `seal` runs a verb and writes it down."""

    folder: Path
    broker_ports: Mapping[str, int]
    server_port: int
    booted: Path | None = None
    """The built image that guests boot as machines; None: guests are processes of a generated image."""
    seal: Verbs = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seal", Verbs(self.folder))

    # --- hosts ------------------------------------------------------------------------------------------------------

    def home(self, member: str) -> Path:
        """A member's own host."""
        return self.folder / member

    @property
    def shared(self) -> Path:
        """What members send each other."""
        return self.folder / "shared"

    @property
    def image(self) -> Path:
        """The image's folder."""
        return self.booted or self.shared / "image"

    def member_key(self, member: str) -> Path:
        """The file of a member's private key, on its own host."""
        return self.home(member) / "member.key"

    def chip(self, guest: str) -> Path:
        """Where the chip of a guest's host lies."""
        return self.home(member_of(guest)) / guest_kit(guest) / LOCAL / CHIP

    def vendor(self, guest: str) -> Path:
        """Where the vendor of that chip lies."""
        return self.chip(guest).with_name(VENDOR)

    def processor(self, guest: str) -> tuple[Chip, Vendor]:
        """The chip of a guest's host, and who made it: what a hostile host owns."""
        return load_chip(self.chip(guest)), load_vendor(self.vendor(guest))

    # --- kits -------------------------------------------------------------------------------------------------------

    def broker_kit(self, broker: str) -> Path:
        """The kit of a broker, at its operator's."""
        return self.home(BROKERS[broker]) / f"broker-{broker}"

    def guest_kit(self, guest: str) -> Path:
        """The kit of a guest, at its host."""
        return self.home(member_of(guest)) / guest_kit(guest)

    @property
    def kit(self) -> Path:
        """The data scientist's kit."""
        return self.home(OWNER) / f"user-{OWNER}-{SCIENTIST}"

    # --- the charter ------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Path:
        """consortium.toml."""
        return self.shared / "consortium.toml"

    @property
    def charter_folder(self) -> Path:
        """The charter as members published it last."""
        return self.shared / "charter"

    @property
    def first_root(self) -> bytes:
        """The bytes of the charter's first root: its SHA-256 names the charter."""
        return (self.charter_folder / "metadata/1.root.json").read_bytes()

    def charter(self) -> Charter:
        """The charter as members published it last, whoever serves it."""
        return current_charter(read_store(self.charter_folder), self.first_root)

    def broker(self, name: str = BROKER) -> BrokerEntry:
        """A broker as the charter has it. Raises Unusable if it has none of this name."""
        entry = self.charter().broker(name)
        if entry is None:
            raise Unusable(f"the charter has no broker {name}", where=str(self.charter_folder), do="Found it anew.")
        return entry


def new_setting(folder: Path, booted: Path | None = None) -> Setting:
    """An empty setting in `folder`, with ports for everything that will listen.

    `booted`: the built image (virtual variant) that guests boot; without it an image of processes is generated.
    """
    if booted is None:
        server, *brokers = free_ports(1 + len(BROKERS))
    else:
        server, brokers = BOOTED_SERVER_PORT, [BOOTED_BROKER_PORT + number for number in range(len(BROKERS))]
    return Setting(folder, dict(zip(BROKERS, brokers, strict=True)), server, booted)


def now() -> datetime:
    """The time in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def claim_folder(folder: Path) -> BinaryIO:
    """Make `folder` new and keep it for whoever holds the returned file open.

    Only what an earlier demonstration left in it is removed. Raises Unusable if the folder is something else's (a
    mistyped path must not cost anybody a home directory), or if another demonstration runs in it.
    """
    mark = folder / MARK
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Unusable("this is no folder", where=str(folder), do="Name a new folder with --out.")
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise Unusable(
            "the folder holds files that are no demonstration's",
            where=str(folder),
            do="Name a new or empty folder with --out.",
        )
    try:
        if mark.exists():
            with mark.open("rb") as earlier:
                fcntl.flock(earlier, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        held = mark.open("xb")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.write(b"Made by `seal demo`, which may remove this folder.\n")
        held.flush()
    except (BlockingIOError, FileExistsError):
        raise Unusable(
            "another demonstration runs in this folder",
            where=str(folder),
            do="Name another with --out, or wait for it.",
        ) from None
    except OSError as error:
        raise Unusable(
            f"the folder cannot be made: {error.strerror}", where=str(folder), do="Name another folder with --out."
        ) from error
    return held


def member_of(guest: str) -> str:
    """Whose guest it is."""
    return SITES.get(guest, OWNER)


def role_of(guest: str) -> str:
    """The role in which it is enrolled."""
    return "site" if guest in SITES else "server"


def guest_kit(guest: str) -> str:
    """The name of a guest's kit."""
    return f"{role_of(guest)}-{guest}"


def vcpu_model(product: Product) -> str:
    """The virtual processor that a host with a chip of this product shows its guests."""
    return f"EPYC-{product.value}"


def free_ports(count: int) -> list[int]:
    """TCP ports on the loopback interface that nobody listens on now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
