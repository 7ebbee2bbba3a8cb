"""The setting of the demonstration: three members with their keys, a virtual vendor's chips, an image, a broker, a
charter that two members sign, and data that lies sealed on disk.

Everything is made anew in one folder; nothing in it outlives the next run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.kits.user_keys import UserKeys, create_user_keys
from attestation.broker.config import create_broker
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip, create_chip
from attestation.virtual.vendor import Vendor, create_vendor
from cvm_image.generate import LaunchGrid, generate_image
from cvm_image.manifest import MANIFEST, ImageManifest
from cvm_image.signing import SigningKeys, create_signing_keys
from cvm_image.verify import load_image
from fl.guard.sealed_data import seal_file
from policies.charter import Changes, Charter, amend, files_of, found, load_charter, write_store
from policies.charter.layout import release_path
from policies.documents import (
    BrokerAddress,
    BrokerEntry,
    BundleApproval,
    Consortium,
    Document,
    Enrolment,
    ImageReference,
    InitData,
    Member,
    ReferenceMeasurement,
    ServerAddress,
    VirtualRoot,
    init_data_digest,
    write_init_data,
)
from policies.errors import Unusable
from policies.keys import generate_ed25519, load_private_key, public_pem
from policies.ready_made import release_policy, shared_policies

OWNER: Final = "acme-pharma"
HOSPITALS: Final = ("borealis-hospital", "cygnus-bio")
MEMBERS: Final = (OWNER, *HOSPITALS)
SCIENTIST: Final = "scientist"
BROKER: Final = "acme-broker"
SERVER: Final = "acme-server"
SITES: Final[Mapping[str, str]] = {"borealis-site": "borealis-hospital", "cygnus-site": "cygnus-bio"}
"""Each site's name and its member."""
PRODUCTS: Final[Mapping[str, Product]] = {
    SERVER: Product.GENOA,
    "borealis-site": Product.MILAN,
    "cygnus-site": Product.TURIN,
}
IMAGE: Final = "fl"
MODEL_KEY: Final = f"{OWNER}/key/model"
APPROVAL_DAYS: Final = 30
BOOTED_BROKER_PORT: Final = 9443
BOOTED_SERVER_PORT: Final = 8443
"""The ports that a booted image's packet filter lets through (`cvm_image/recipes/fl.toml`)."""
HOST_SEEN_BY_GUEST: Final = "10.0.2.2"
"""The host's loopback, as QEMU's user network shows it to a booted guest."""
MARK: Final = "demonstration"
"""A file that says that a folder is a demonstration's."""


def data_key(site: str) -> str:
    """The resource that holds the key of a site's data."""
    return f"{SITES[site]}/key/data"


@dataclass(frozen=True)
class Setting:
    """What was set up, and where it lies. `first_root` is the charter's identity: its SHA-256 names the charter."""

    folder: Path
    members: Mapping[str, Ed25519PrivateKey] = field(repr=False)
    broker: BrokerEntry
    broker_key: Ed25519PrivateKey = field(repr=False)
    vendor: Vendor
    chips: Mapping[str, Chip] = field(repr=False)
    manifest: ImageManifest
    builder: SigningKeys = field(repr=False)
    scientist: UserKeys = field(repr=False)
    data_keys: Mapping[str, bytes] = field(repr=False)
    model_key: bytes = field(repr=False)
    server_address: str
    store: Mapping[str, bytes] = field(repr=False)
    booted: Path | None = None
    """The built image that guests boot as machines; None: guests are processes of a generated image."""

    @property
    def image(self) -> Path:
        """The image's folder."""
        return self.booted or self.folder / "image"

    @property
    def first_root(self) -> bytes:
        """The bytes of the charter's first root."""
        return self.store["metadata/1.root.json"]

    @property
    def kit(self) -> Path:
        """The data scientist's folder."""
        return self.folder / "kit"

    def charter(self, at: datetime | None = None) -> Charter:
        """The charter as members published it last."""
        return load_charter(self.store, self.first_root, at or now())

    def chip_folder(self, guest: str) -> Path:
        """Where the chip of a guest's host lies."""
        return self.folder / "chips" / guest

    def init_data(self, guest: str) -> Path:
        """The file with which a guest is started."""
        return self.folder / "init-data" / f"{guest}.toml"

    def sealed_data(self, site: str) -> Path:
        """The site's data at rest."""
        return self.folder / "data" / f"{site}.sealed"

    def two_keys(self) -> list[Ed25519PrivateKey]:
        """The keys of two members: as many as shared decisions need."""
        return [self.members[name] for name in MEMBERS[:2]]


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


def found_consortium(folder: Path, booted: Path | None = None) -> Setting:
    """Make everything, in a claimed folder, up to a charter that has no guest and no code yet.

    `booted`: the built image (virtual variant) that guests boot; without it an image of processes is generated.
    """
    at = now()
    members = {name: generate_ed25519(_fresh(folder / "members" / name) / "member.pem") for name in MEMBERS}
    broker_port, server_port = (BOOTED_BROKER_PORT, BOOTED_SERVER_PORT) if booted else free_ports(2)
    broker = create_broker(
        folder / "broker",
        name=BROKER,
        member=OWNER,
        url=f"https://127.0.0.1:{broker_port}",
        listen=f"127.0.0.1:{broker_port}",
        at=at,
    )
    vendor = create_vendor(folder / "vendor")
    chips = {guest: create_chip(vendor, folder / "chips" / guest, product) for guest, product in PRODUCTS.items()}
    builder = create_signing_keys(folder / "builder")
    models = tuple(vcpu_model(product) for product in sorted(set(PRODUCTS.values()), key=lambda one: one.value))
    if booted is None:
        manifest = generate_image(folder / "image", name=IMAGE, keys=builder, grid=LaunchGrid(vcpu_models=models))
    else:
        manifest = approvable(booted)
    consortium = Consortium(
        name="oncology",
        platform="virtual",
        trust_domain="virtual.oncology.example",
        members=tuple(Member(name=name, public_key=public_pem(key)) for name, key in members.items()),
        brokers=(broker,),
        threshold=2,
        virtual_roots=tuple(
            VirtualRoot(product=product.value, ark_spki_sha256=authority.ark_spki_sha256)
            for product, authority in vendor.authorities.items()
        ),
    )
    scientist = create_user_keys(consortium.trust_domain, OWNER, SCIENTIST, at)
    scientist_document = scientist.document(rights=("submit", "view", "download"))
    files = {
        **files_of([image_reference(booted or folder / "image", manifest), scientist_document]),
        **shared_policies(),
        policy_path(MODEL_KEY): release_policy(roles={"server"}, members={OWNER}),
        **{
            policy_path(data_key(site)): release_policy(roles={"site"}, names={site}, members={member})
            for site, member in SITES.items()
        },
    }
    broker_key = load_private_key(folder / "broker/keys/signing.pem")
    store = found(consortium, files, members.values(), [broker_key], at)
    return Setting(
        folder=folder,
        members=members,
        broker=broker,
        broker_key=broker_key,
        vendor=vendor,
        chips=chips,
        manifest=manifest,
        builder=builder,
        scientist=scientist,
        data_keys={site: os.urandom(32) for site in SITES},
        model_key=os.urandom(32),
        server_address=f"127.0.0.1:{server_port}",
        store=store,
        booted=booted,
    )


def approvable(image: Path) -> ImageManifest:
    """The manifest of a built image. Raises Unusable unless it is the one that the demonstration can approve."""
    manifest = load_image(image)
    if (manifest.name, manifest.platform) != (IMAGE, "virtual"):
        raise Unusable(
            f"the image is {manifest.name} for the {manifest.platform} platform, not {IMAGE} for the virtual one",
            where=str(image),
            do="Make it: make image",
        )
    return manifest


def admit(setting: Setting, bundle: str, job: str) -> Setting:
    """Two members enrol the three guests and approve the job's bundle: the charter's second version."""
    at = now()
    documents: list[Document] = [enrolment(setting, guest) for guest in PRODUCTS]
    documents.append(
        BundleApproval(
            bundle=bundle,
            job=job,
            sites=tuple(SITES),
            note="reviewed by two members",
            expires=at + timedelta(days=APPROVAL_DAYS),
        )
    )
    return publish(setting, Changes(put=files_of(documents)), at)


def publish(setting: Setting, changes: Changes, at: datetime) -> Setting:
    """Two members sign a change of the charter, and the broker's folder gets it."""
    store = amend(setting.store, changes, setting.two_keys(), [setting.broker_key], at)
    write_store(setting.folder / "broker/charter", store)
    return replace(setting, store=store)


def enrolment(setting: Setting, guest: str) -> Enrolment:
    """The place of a guest, for the init-data that its host was given, on its own chip."""
    path = setting.init_data(guest)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(write_init_data(init_data(setting, guest)))
    return Enrolment(
        role="server" if guest == SERVER else "site",
        name=guest,
        member=member_of(guest),
        image=IMAGE,
        init_data_sha256=init_data_digest(path.read_bytes()),
        chips=(setting.chips[guest].chip_id.hex(),),
    )


def init_data(setting: Setting, guest: str) -> InitData:
    """What the host of a guest is to start it with."""
    server = guest == SERVER
    listen, address, url = setting.server_address, setting.server_address, setting.broker.url
    if setting.booted is not None:
        listen = f"0.0.0.0:{BOOTED_SERVER_PORT}"
        address = f"{HOST_SEEN_BY_GUEST}:{BOOTED_SERVER_PORT}"
        url = f"https://{HOST_SEEN_BY_GUEST}:{BOOTED_BROKER_PORT}"
    return InitData(
        version=1,
        algorithm="sha256",
        charter=setting.charter().id,
        role="server" if server else "site",
        name=guest,
        brokers=(BrokerAddress(name=BROKER, url=url),),
        listen=listen if server else None,
        server=None if server else ServerAddress(name=SERVER, address=address),
        resources={"model": MODEL_KEY} if server else {"data": data_key(guest)},
    )


def seal_site_data(setting: Setting, plain: Mapping[str, bytes]) -> None:
    """Each hospital encrypts its patients' file under a key that only its broker deposit holds. `plain`: by site."""
    for site, content in plain.items():
        path = setting.sealed_data(site)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        seal_file(path, {"train.safetensors": content}, setting.data_keys[site])


def image_reference(folder: Path, manifest: ImageManifest) -> ImageReference:
    """An image as the charter approves it."""
    return ImageReference(
        name=manifest.name,
        platform=manifest.platform,
        manifest_sha256=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        svn=manifest.svn,
        measurements=tuple(ReferenceMeasurement(**value.model_dump()) for value in manifest.measurements),
        roles=("server", "site"),
    )


def policy_path(resource: str) -> str:
    """Where the owner's release policy of a resource stands in the charter."""
    path = release_path(resource)
    if path is None:
        raise ValueError(f"{resource} can have no release policy")
    return path


def member_of(guest: str) -> str:
    """Whose guest it is."""
    return SITES.get(guest, OWNER)


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


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True, mode=0o700)
    return folder
