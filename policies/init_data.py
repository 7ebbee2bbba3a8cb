"""The init-data that a guest is started with: strict TOML, bound to the guest's evidence by HOST_DATA.

The host writes them and is believed in nothing that they say: brokers are met under the charter's keys, data under
the site's, and a guest with other init-data is another guest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from policies.documents import Role
from policies.errors import MalformedDocument
from policies.forms import Address, Digest, Document, Name, Resource, Url, must_be_unique, parse_toml

INIT_DATA_LIMIT: Final = 64 * 1024
"""Bytes of an init-data file."""


class BrokerAddress(Document):
    """Where a broker is, as the host says: it earns nothing, since the broker's keys come from the charter."""

    name: Name
    url: Url


class ServerAddress(Document):
    """Where the FL server is, the name under which it is enrolled, and how to get there (`fl.transport.route`)."""

    name: Name
    address: Address
    more_addresses: tuple[Address, ...] = Field(default=(), max_length=15)
    """Tried in this order when the first does not answer."""
    driver: Literal["grpc", "https"] = "grpc"
    connection_security: Literal["mtls", "tls", "clear"] = "mtls"
    """Where TLS ends: at the server; at a proxy before it; nowhere, because that proxy has none."""
    proxy: str | None = Field(default=None, max_length=300)
    """`http://host:port` of an HTTP proxy that connects to the address."""
    custom_ca_cert: str | None = Field(default=None, max_length=64 << 10)
    """With `tls`: the authority of the proxy's certificate, in PEM."""


def _server(text: str) -> str:
    address = IPv4Address(text)
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise ValueError("no server has this address")
    return text


def _exported(text: str) -> str:
    if {".", ".."} & set(text.split("/")):
        raise ValueError("a path with . or .. in it")
    return text


class DataExport(Document):
    """A site's data volume as a file on an NFS server, which is trusted with nothing: it sees what a host's disk does.

    `server` is an IPv4 address (a guest asks no name server), spoken to by NFSv4.1 on its port 2049. The folder of
    `path` is what the guest mounts, read-only.
    """

    server: Annotated[str, Field(max_length=15), AfterValidator(_server)]
    path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_.-]{1,255}){1,16}$", max_length=1024), AfterValidator(_exported)]


class InitData(Document):
    """What the host tells a guest at launch, bound to its evidence by HOST_DATA (SHA-256 of the file's bytes)."""

    version: int = Field(ge=1, le=1)  # not Literal[1], which takes `true` for 1
    algorithm: Literal["sha256"]
    charter: Digest
    role: Role
    name: Name
    brokers: tuple[BrokerAddress, ...] = Field(min_length=1, max_length=16)
    listen: Address | None = None
    listen_https: Address | None = None
    """A server's second port, if HTTPS is not to share the first with gRPC."""
    connection_security: Literal["mtls", "tls", "clear"] = "mtls"
    """What a server admits: with `tls` and `clear` also what comes by proxies that end TLS, or have none."""
    server: ServerAddress | None = None
    resources: dict[Name, Resource] = Field(default_factory=dict, max_length=64)
    user_data: DataExport | None = None
    """Where a site's data volume is, if it is not the disk `user-data`."""

    @model_validator(mode="after")
    def _distinct(self) -> InitData:
        must_be_unique(tuple(broker.name for broker in self.brokers), "broker")
        return self


def parse_init_data(raw: bytes, where: str = "init-data") -> InitData:
    """Return the init-data in the TOML `raw` (at most INIT_DATA_LIMIT bytes). Raises MalformedDocument."""
    return parse_toml(InitData, raw, where, INIT_DATA_LIMIT)


def init_data_digest(raw: bytes) -> str:
    """Return the SHA-256 of the file's bytes as hex: the HOST_DATA of a guest launched with it."""
    return hashlib.sha256(raw).hexdigest()


def write_init_data(init: InitData) -> bytes:
    """Return `init` as TOML that `parse_init_data` reads back to the same. Raises MalformedDocument if it cannot be."""
    words = init.model_dump(mode="json", exclude_defaults=True)
    lines = list(_entries(words))
    for table in words.get("brokers", ()):
        lines += ["", "[[brokers]]", *_entries(table)]
    for name in ("server", "resources", "user_data"):
        if table := words.get(name):
            lines += ["", f"[{name}]", *_entries(table)]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _entries(table: Mapping[str, object]) -> Iterator[str]:
    """The lines of a table's own values; JSON's strings, numbers and lists of strings are TOML's, too."""
    for name, value in table.items():
        if isinstance(value, str) and "\x7f" in value:
            raise MalformedDocument("a text of the init-data has a control character", where=name, do="Leave it out.")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            continue
        if not isinstance(value, dict):
            key = name if name.replace("_", "").isalnum() else json.dumps(name)
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
