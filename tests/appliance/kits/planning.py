"""The plan of the demonstration's consortium, with one reader for its user, and changes of its charter."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.demo.setting import IMAGE, OWNER, SERVER, Setting, now
from appliance.kits.plan import Plan, PlannedGuest, PlannedUser, read_plan
from policies.charter import Changes, amend, read_store, write_store
from policies.keys import load_private_key
from policies.kits import HostEntry


def plan_of(setting: Setting) -> Plan:
    """What consortium.toml says of hosts, its user replaced, with a gateway and a name that no DNS knows."""
    user = PlannedUser(name="reader", member=OWNER, server=SERVER, request="reader/request.json", rights="member")
    plan = read_plan(setting.plan.read_bytes(), "plan")
    gateway = PlannedGuest(
        role="gateway",
        name="edge",
        member=OWNER,
        image=IMAGE,
        vcpu_model="EPYC-Genoa",
        listen="0.0.0.0:7443",
        address="edge.acme-pharma.example:7443",
        server=SERVER,
    )
    images = tuple(image.model_copy(update={"roles": ("server", "site", "gateway")}) for image in plan.images)
    hosts = (HostEntry(address="192.0.2.7", names=("localhost",)),)
    guests = (*plan.guests, gateway)
    return plan.model_copy(update={"users": (user,), "guests": guests, "images": images, "hosts": hosts})


def member_key(setting: Setting, member: str = OWNER) -> Ed25519PrivateKey:
    """A member's private key."""
    return load_private_key(setting.member_key(member))


def store_of(setting: Setting) -> dict[str, bytes]:
    """The charter's files."""
    return read_store(setting.charter_folder)


def publish(setting: Setting, changes: Changes) -> None:
    """Two members and the broker sign a change."""
    keys = [member_key(setting, member) for member in ("acme-pharma", "borealis-hospital")]
    write_store(setting.charter_folder, amend(store_of(setting), changes, keys, [broker_key(setting)], now()))


def broker_key(setting: Setting) -> Ed25519PrivateKey:
    """The first broker's signing key, wherever its folder is."""
    (found,) = setting.home(OWNER).rglob("keys/signing.pem")
    return load_private_key(found)
