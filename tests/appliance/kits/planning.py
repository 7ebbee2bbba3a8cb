"""The plan of the demonstration's consortium, with one reader for its user, and changes of its charter."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.demo.setting import OWNER, SERVER, Setting, now
from appliance.kits.plan import Plan, PlannedUser, read_plan
from policies.charter import Changes, amend, read_store, write_store
from policies.keys import load_private_key


def plan_of(setting: Setting) -> Plan:
    """What consortium.toml says of hosts, its user replaced."""
    user = PlannedUser(name="reader", member=OWNER, server=SERVER, request="reader/request.json", rights="member")
    return read_plan(setting.plan.read_bytes(), "plan").model_copy(update={"users": (user,)})


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
