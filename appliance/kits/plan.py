"""The plan of a consortium's hosts: the table `[deployment]` of consortium.toml, which `seal charter enrol` and
`seal charter kit` read.

The rest of that file is what members sign when they found the charter. The plan binds nobody: it enters the charter
as enrolments and images, which members sign, and the kits are checked against those.
"""

from __future__ import annotations

import tomllib
from typing import Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from policies.charter import Charter
from policies.charter.written import PLAN
from policies.documents import (
    RIGHTS_SETS,
    Address,
    ChipId,
    Document,
    Enrolment,
    Jurisdiction,
    Name,
    Resource,
    Right,
    Role,
    Text,
    from_table,
)
from policies.errors import MalformedDocument, Unusable
from policies.forms import must_be_unique
from policies.init_data import BrokerAddress, DataExport, InitData, ServerAddress, init_data_digest, write_init_data
from policies.kits import HostEntry

ANYWHERE: Final = "0.0.0.0"  # noqa: S104 - where a broker listens unless the plan says otherwise
GuestRole = Literal["server", "site", "inner", "gateway"]
RightsSet = Literal["project-admin", "org-admin", "lead", "member"]


class PlannedImage(Document):
    """An image: `folder` is where the plan's author has it (beside the file), `source` tells hosts where to get it."""

    name: Name
    folder: str = Field(min_length=1, max_length=512)
    source: Text
    roles: tuple[Role, ...] = ("server", "site")


class PlannedBroker(Document):
    """Where a broker listens, if that is not every address at its URL's port."""

    name: Name
    listen: Address


class PlannedGuest(Document):
    """A guest and its host. `listen` is where it listens there, `address` where others reach it (servers, inner nodes).

    `server` is the server that a site joins, and the parent of an inner node or a gateway: a server or an inner node.

    `vcpu_model` and `vcpus` are measured: the image must have been signed for them. `disks` are files that the host
    shows to the guest; `resources` are the keys that it asks for, by purpose; `user_data` is where a site's data volume
    is, if on no disk. Where the guest itself sees other addresses than everybody else (behind its host's address
    translation), `reaches` and `server_at` give them.
    """

    role: GuestRole
    name: Name
    member: Name
    image: Name
    vcpu_model: str = Field(default="EPYC-v4", pattern=r"^EPYC[A-Za-z0-9-]{0,32}$")
    vcpus: int = Field(default=2, ge=1, le=512)
    memory_mib: int = Field(default=4096, ge=256, le=1 << 24)
    gpus: int = Field(default=0, ge=0, le=16)
    listen: Address | None = None
    address: Address | None = None
    server: Name | None = None
    server_at: Address | None = None
    reaches: tuple[BrokerAddress, ...] = Field(default=(), max_length=16)
    disks: tuple[Name, ...] = Field(default=(), max_length=16)
    resources: dict[Name, Resource] = Field(default_factory=dict, max_length=64)
    user_data: DataExport | None = None
    chips: tuple[ChipId, ...] | None = Field(default=None, min_length=1, max_length=64)
    jurisdiction: Jurisdiction | None = None

    @model_validator(mode="after")
    def _complete(self) -> PlannedGuest:
        if self.role in {"server", "inner"} and (self.listen is None or self.address is None):
            raise ValueError(f"{self.name}: a {self.role} needs `listen` and `address`")
        if self.role == "gateway" and self.listen is None:
            raise ValueError(f"{self.name}: a gateway needs `listen`")
        if self.role != "server" and self.server is None:
            raise ValueError(f"{self.name}: a {self.role} needs the name of its `server`")
        if self.server_at is not None and self.server is None:
            raise ValueError(f"{self.name}: `server_at` says where a `server` is, which is missing")
        must_be_unique(tuple(broker.name for broker in self.reaches), "broker")
        return self


class PlannedUser(Document):
    """A person: the request that `seal charter user` made on the person's machine, the rights, and the server used."""

    name: Name
    member: Name
    server: Name
    request: str = Field(min_length=1, max_length=512)
    rights: RightsSet | tuple[Right, ...] = "member"

    def granted(self) -> tuple[Right, ...]:
        """The rights, one by one."""
        return RIGHTS_SETS[self.rights] if isinstance(self.rights, str) else self.rights


class Plan(Document):
    """The whole table. `hosts` are the lines of /etc/hosts for names that no DNS knows."""

    images: tuple[PlannedImage, ...] = Field(default=(), max_length=64)
    brokers: tuple[PlannedBroker, ...] = Field(default=(), max_length=16)
    guests: tuple[PlannedGuest, ...] = Field(default=(), max_length=4096)
    users: tuple[PlannedUser, ...] = Field(default=(), max_length=4096)
    hosts: tuple[HostEntry, ...] = Field(default=(), max_length=4096)

    @model_validator(mode="after")
    def _coherent(self) -> Plan:
        must_be_unique(tuple(image.name for image in self.images), "image")
        must_be_unique(tuple(broker.name for broker in self.brokers), "broker")
        must_be_unique(tuple(f"{guest.role} {guest.name}" for guest in self.guests), "guest")
        must_be_unique(tuple(f"{user.member}/{user.name}" for user in self.users), "user")
        must_be_unique(tuple(name for entry in self.hosts for name in entry.names), "host")
        images = {image.name for image in self.images}
        servers = {guest.name for guest in self.guests if guest.role == "server"}
        inner = {guest.name for guest in self.guests if guest.role == "inner"}
        if both := sorted(servers & inner):
            raise ValueError(f"{both[0]} is the name of a server and of an inner node")
        for guest in self.guests:
            if guest.image not in images:
                raise ValueError(f"{guest.role} {guest.name}: there is no image {guest.image} in the plan")
            parents = servers | inner if guest.role in {"inner", "gateway"} else servers
            if guest.server is not None and guest.server not in parents:
                raise ValueError(f"{guest.role} {guest.name}: there is no server {guest.server} in the plan")
        for user in self.users:
            if user.server not in servers:
                raise ValueError(f"user {user.name}: there is no server {user.server} in the plan")
        return self

    def image(self, name: str) -> PlannedImage:
        """The image of this name; the plan's own names are in it, which validation saw to."""
        return next(image for image in self.images if image.name == name)

    def server(self, name: str) -> ServerAddress:
        """Where others reach a server, or an inner node."""
        found = next(guest for guest in self.guests if guest.role in {"server", "inner"} and guest.name == name)
        if found.address is None:
            raise MalformedDocument("a server needs an `address`", where=name, do="Add it to the plan.")
        return ServerAddress(name=name, address=found.address)

    def server_of(self, guest: PlannedGuest) -> ServerAddress | None:
        """Where a guest reaches the server that it joins; None for one that joins none."""
        if guest.server is None:
            return None
        if guest.server_at is not None:
            return ServerAddress(name=guest.server, address=guest.server_at)
        return self.server(guest.server)

    def broker_listens(self, broker: BrokerAddress) -> str:
        """Where a broker listens on its host."""
        for planned in self.brokers:
            if planned.name == broker.name:
                return planned.listen
        return f"{ANYWHERE}:{urlsplit(broker.url).port or 443}"


def read_plan(raw: bytes, where: str) -> Plan:
    """Return the plan in consortium.toml. Raises MalformedDocument, naming what is wrong or that there is none."""
    do = "Correct the file; docs/reference/kits.md lists the fields of [deployment]."
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedDocument(f"not valid TOML: {error}", where=where, do=do) from error
    planned = table.get(PLAN)
    if not isinstance(planned, dict):
        raise MalformedDocument("there is no table [deployment]", where=where, do=do)
    return from_table(Plan, planned, where)


def broker_addresses(charter: Charter) -> tuple[BrokerAddress, ...]:
    """Every broker of a charter with its URL."""
    return tuple(BrokerAddress(name=broker.name, url=broker.url) for broker in charter.consortium.brokers)


def brokers_for(guest: PlannedGuest, charter: Charter) -> tuple[BrokerAddress, ...]:
    """Every broker of a charter as a guest reaches it. Raises Unusable where the plan names a broker that is none."""
    own = {broker.name: broker for broker in guest.reaches}
    every = broker_addresses(charter)
    unknown = sorted(own.keys() - {broker.name for broker in every})
    if unknown:
        raise Unusable(
            f"{guest.role} {guest.name} reaches {', '.join(unknown)}, which is no broker of the charter",
            where="deployment",
            do="Correct `reaches` in the plan.",
        )
    return tuple(own.get(broker.name, broker) for broker in every)


def init_data_of(guest: PlannedGuest, plan: Plan, charter: Charter) -> bytes:
    """The file with which a guest's host starts it."""
    return write_init_data(
        InitData(
            version=1,
            algorithm="sha256",
            charter=charter.id,
            role=guest.role,
            name=guest.name,
            brokers=brokers_for(guest, charter),
            listen=guest.listen,
            server=plan.server_of(guest),
            resources=guest.resources,
            user_data=guest.user_data,
        )
    )


def enrolment_of(guest: PlannedGuest, plan: Plan, charter: Charter) -> Enrolment:
    """The place that members sign for a guest."""
    if charter.consortium.member(guest.member) is None:
        raise Unusable(
            f"{guest.role} {guest.name} is of {guest.member}, which is no member of the charter",
            where="deployment",
            do="Correct the plan, or take the member into the charter.",
        )
    return Enrolment(
        role=guest.role,
        name=guest.name,
        member=guest.member,
        image=guest.image,
        init_data_sha256=init_data_digest(init_data_of(guest, plan, charter)),
        chips=guest.chips,
        address=guest.address,
        jurisdiction=guest.jurisdiction,
    )
