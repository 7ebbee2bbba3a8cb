"""The attacks of the TUF paper, and those of a member or a broker, each played against a charter.

Forgeries are signed with the keys that the attacker has; what the attacker cannot sign is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from charter_world import MEMBERS, NOW, World, both, changed, compact, image, parsed, signed_by
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile, Targets

from policies.charter import (
    Changes,
    Charter,
    Lifetimes,
    files_of,
    found,
    load_charter,
    propose,
    publish,
    sign,
    sign_timestamp,
)
from policies.charter.layout import SIGNED_DIGEST_FIELD, delegations, root_keys, root_roles, target_file, tuf_key
from policies.charter.proposal import newest_snapshot
from policies.charter.trust import metadata_bytes, signed_digest
from policies.errors import CharterRefused, ProposalRefused
from policies.keys import public_pem

Keys = dict[str, Ed25519PrivateKey]


@pytest.fixture
def world() -> World:
    return World().found()


def refused(store: dict[str, bytes], world: World, *, at: Any = NOW, known: Charter | None = None) -> str:
    with pytest.raises(CharterRefused) as caught:
        load_charter(store, world.root, at, known=known)
    return "\n".join(caught.value.reasons)


def restamped(store: dict[str, bytes], world: World, *, snapshot_keys: list[Ed25519PrivateKey]) -> dict[str, bytes]:
    """The store with snapshot and timestamp that list what is in it, signed by the keys given."""
    version = newest_snapshot(store)
    snapshot = parsed(store, f"{version}.snapshot").signed
    for name in snapshot.meta:
        role = name.removesuffix(".json")
        number = max(int(n.split("/")[1].split(".")[0]) for n in store if n.endswith(f".{role}.json"))
        digest = signed_digest(parsed(store, f"{number}.{role}"))
        snapshot.meta[name] = MetaFile(number, unrecognized_fields={SIGNED_DIGEST_FIELD: digest})
    raw = signed_by(snapshot, *snapshot_keys)
    store = changed(store, f"metadata/{version}.snapshot.json", raw)
    stamp = parsed(store, "timestamp").signed
    stamp.version += 1
    stamp.snapshot_meta = MetaFile.from_data(version, raw, ["sha256"])
    return changed(store, "metadata/timestamp.json", signed_by(stamp, world.broker_key))


def forged_role(
    store: dict[str, bytes], role: str, files: dict[str, bytes], *keys: Ed25519PrivateKey
) -> dict[str, bytes]:
    """The store whose current metadata of `role` also lists `files`, signed by the keys given."""
    signed: Targets = parsed(store, f"1.{role}").signed
    extra = {}
    for path, raw in files.items():
        signed.targets[path] = TargetFile.from_data(path, raw, ["sha256"])
        extra[target_file(path, signed.targets[path].hashes["sha256"])] = raw
    return {**store, **extra, f"metadata/1.{role}.json": signed_by(signed, *keys)}


# --- expiry, freeze ---------------------------------------------------------------------------------------------------


def test_an_honest_charter_holds(world: World) -> None:
    charter = load_charter(world.store, world.root, NOW)
    assert charter.version == 1
    assert [i.name for i in charter.images()] == ["demo"]
    assert charter.warnings == ()


def test_freeze_an_old_timestamp_lapses_within_a_day(world: World) -> None:
    load_charter(world.store, world.root, NOW + timedelta(hours=23, minutes=59))
    assert "metadata/timestamp.json: expired on 2026-03-02T12:00:00Z" in refused(
        world.store, world, at=NOW + timedelta(days=1)
    )


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "images", "enrolments", "code", "policies"])
def test_each_role_lapses(role: str) -> None:
    short = {"root": "root", "snapshot": "snapshot"}.get(role, "roles")
    world = World().found(lifetimes=Lifetimes(**{short: timedelta(hours=1)}))
    assert f"{role}.json: expired on" in refused(world.store, world, at=NOW + timedelta(hours=1))


def test_an_expired_charter_tells_every_part_that_lapsed(world: World) -> None:
    assert refused(world.store, world, at=NOW + timedelta(days=800)).count("expired on") == 8


def test_a_lapsed_member_takes_its_own_files_along_and_nobody_elses() -> None:
    world = World().found(lifetimes=Lifetimes(roles=timedelta(days=30)))
    later = NOW + timedelta(days=20)
    shared = frozenset({"targets", "images", "enrolments", "code", "policies", "member-acme-pharma"})
    world.store = world.amend(Changes(renew=shared), at=later)
    store = sign_timestamp(world.store, world.broker_key, NOW + timedelta(days=40))
    charter = load_charter(store, world.root, NOW + timedelta(days=40))
    assert charter.user("acme-pharma", "ada") is not None
    assert charter.release_policy("borealis-hospital/key/data") is None
    assert "member-borealis-hospital.json: expired" in charter.warnings[0]


def test_an_auditor_judges_at_the_time_of_the_deed(world: World) -> None:
    assert load_charter(world.store, world.root, NOW + timedelta(hours=1)).version == 1


# --- rollback, mix and match --------------------------------------------------------------------------------------


def test_rollback_to_a_charter_before_a_withdrawal(world: World) -> None:
    old = dict(world.store)
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    known = load_charter(world.store, world.root, NOW)
    load_charter(old, world.root, NOW)  # who has never seen the new one cannot know
    words = refused(old, world, known=known)
    assert "snapshot: version 1 is offered, version 2 is known" in words
    assert "images: version 1 is offered, version 2 is known" in words
    assert "timestamp: version 1 is offered" in words


def test_rollback_by_a_broker_that_signs_a_fresh_timestamp(world: World) -> None:
    old = dict(world.store)
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    known = load_charter(world.store, world.root, NOW)
    for _ in range(3):
        old = sign_timestamp(old, world.broker_key, NOW)
    words = refused(old, world, known=known)
    assert "timestamp" not in words
    assert "snapshot: version 1 is offered, version 2 is known" in words


def test_two_contents_of_one_version(world: World) -> None:
    other = world.amend(world.put(image("evil", "00" * 48)))
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    known = load_charter(world.store, world.root, NOW)
    assert "version 2 is offered with other content than is known" in refused(other, world, known=known)


def test_rollback_of_the_root(world: World) -> None:
    old = dict(world.store)
    world.store = world.amend(Changes(consortium=world.with_consortium(lease_seconds=30)))
    known = load_charter(world.store, world.root, NOW)
    assert "root: version 1 is offered, version 2 is known" in refused(old, world, known=known)


def test_another_charter_than_the_known_one(world: World) -> None:
    other = World().found()
    known = load_charter(other.store, other.root, NOW)
    assert "known is" in refused(world.store, world, known=known)


def test_mix_an_old_role_into_a_new_snapshot(world: World) -> None:
    old = dict(world.store)
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    mixed = {**world.store, **{n: raw for n, raw in old.items() if "images" in n}}
    words = refused(mixed, world)
    assert "'metadata/1.images.json': does not belong to this charter" in words
    renamed = {**world.store, "metadata/2.images.json": old["metadata/1.images.json"]}
    words = refused(renamed, world)
    assert "metadata/2.images.json: says it is version 1" in words
    assert "not the images that the snapshot names" in words


def test_mix_an_old_snapshot_under_a_new_timestamp(world: World) -> None:
    old = dict(world.store)
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    mixed = {**old, "metadata/timestamp.json": world.store["metadata/timestamp.json"]}
    assert "metadata/2.snapshot.json: missing" in refused(mixed, world)
    mixed["metadata/2.snapshot.json"] = old["metadata/1.snapshot.json"]
    words = refused(mixed, world)
    assert "not the snapshot that the timestamp names" in words
    assert "says it is version 1" in words


def test_fast_forward_by_a_stolen_broker_key_heals_with_its_replacement(world: World) -> None:
    stamp = parsed(world.store, "timestamp").signed
    stamp.version = 2**31 - 1
    ahead = changed(world.store, "metadata/timestamp.json", signed_by(stamp, world.broker_key))
    known = load_charter(ahead, world.root, NOW)
    fresh = Ed25519PrivateKey.generate()
    broker = world.consortium.brokers[0].model_copy(update={"signing_key": public_pem(fresh)})
    healed = world.with_consortium(brokers=(broker.model_dump(),))
    proposal = propose(world.store, Changes(consortium=healed), NOW)
    for key in both(world):
        proposal = sign(proposal, key, NOW)
    store = sign_timestamp(publish(world.store, proposal, NOW), fresh, NOW)
    assert load_charter(store, world.root, NOW, known=known).version == 2


# --- thresholds and keys ----------------------------------------------------------------------------------------------


def test_one_signature_where_two_are_needed(world: World) -> None:
    proposal = sign(propose(world.store, world.put(image("two", "00" * 48)), NOW), world.keys["cygnus-bio"], NOW)
    with pytest.raises(ProposalRefused) as caught:
        publish(world.store, proposal, NOW)
    assert caught.value.reasons == (
        "metadata/2.snapshot.json: role snapshot needs 2 signatures, has 1 (by cygnus-bio)",
        "metadata/2.images.json: role images needs 2 signatures, has 1 (by cygnus-bio)",
    )
    store = {**proposal.store(), "metadata/timestamp.json": world.store["metadata/timestamp.json"]}
    stamp = parsed(store, "timestamp").signed
    stamp.version += 1
    stamp.snapshot_meta = MetaFile.from_data(2, store["metadata/2.snapshot.json"], ["sha256"])
    store = changed(store, "metadata/timestamp.json", signed_by(stamp, world.broker_key))
    words = refused(store, world)
    assert "role snapshot needs 2 signatures, has 1 (by cygnus-bio)" in words
    assert "role images needs 2 signatures, has 1 (by cygnus-bio)" in words


def test_a_broker_does_not_stamp_what_lacks_signatures(world: World) -> None:
    proposal = sign(propose(world.store, world.put(image("two", "00" * 48)), NOW), world.keys["cygnus-bio"], NOW)
    with pytest.raises(ProposalRefused, match="does not hold"):
        sign_timestamp(proposal.store(), world.broker_key, NOW)


def test_one_key_signing_twice(world: World) -> None:
    name = "metadata/1.images.json"
    document = json.loads(world.store[name])
    document["signatures"] = [document["signatures"][0]] * 2
    assert "not readable" in refused(changed(world.store, name, compact(document)), world)


def test_one_key_under_two_names_cannot_be_listed(world: World) -> None:
    """A key listed under a second key id would count twice: the key ids follow from the keys."""
    key = world.keys["cygnus-bio"]
    root: Root = parsed(world.store, "1.root").signed
    twin = tuf_key(public_pem(key))
    twin.keyid = "ab" * 32
    root.keys[twin.keyid] = twin
    for role in root.roles.values():
        role.keyids.append(twin.keyid)
    metadata: Metadata[Root] = Metadata(root)
    payload = metadata.signed_bytes
    for keyid in (tuf_key(public_pem(key)).keyid, twin.keyid):
        metadata.signatures[keyid] = Signature(keyid, key.sign(payload).hex())
    raw = metadata_bytes(metadata)
    with pytest.raises(CharterRefused) as caught:
        load_charter(changed(world.store, "metadata/1.root.json", raw), raw, NOW)
    words = "\n".join(caught.value.reasons)
    assert "its keys are not exactly its members' and brokers'" in words
    assert "the role root is not signed by whom its consortium says" in words


def test_one_key_for_two_members_is_refused(world: World) -> None:
    members = [member.model_dump() for member in world.consortium.members]
    members[1]["public_key"] = members[0]["public_key"]
    with pytest.raises(ValueError, match="one key is given to two parties"):
        world.with_consortium(members=tuple(members))


def test_signatures_by_strangers_count_for_nothing_and_are_named(world: World) -> None:
    raw = signed_by(parsed(world.store, "1.images").signed, world.keys["acme-pharma"], Ed25519PrivateKey.generate())
    words = refused(changed(world.store, "metadata/1.images.json", raw), world)
    assert "role images needs 2 signatures, has 1 (by acme-pharma)" in words
    assert "the signature by the unknown key" in words


@pytest.mark.parametrize("member", MEMBERS)
def test_a_stolen_member_key_changes_nothing_shared(world: World, member: str) -> None:
    """With one key, a thief can sign a role, a snapshot, even a root; each lacks a second signature."""
    thief = world.keys[member]
    raw = image("evil", "00" * 48).to_bytes()
    store = forged_role(world.store, "images", {"images/evil.json": raw}, thief)
    words = refused(restamped(store, world, snapshot_keys=[thief]), world)
    assert f"role images needs 2 signatures, has 1 (by {member})" in words
    assert f"role snapshot needs 2 signatures, has 1 (by {member})" in words
    root: Root = parsed(world.store, "1.root").signed
    alone = world.with_consortium(threshold=1)
    root.version, root.roles = 2, root_roles(alone)
    root.unrecognized_fields["sealwright"] = alone.model_dump(mode="json")
    words = refused({**world.store, "metadata/2.root.json": signed_by(root, thief)}, world)
    assert f"the signers of the root before it: role root needs 2 signatures, has 1 (by {member})" in words


def test_a_stolen_member_key_does_not_even_change_that_member_without_the_others(world: World) -> None:
    thief = world.keys["borealis-hospital"]
    path = "members/borealis-hospital/release/key.data.rego"
    evil = b"package sealwright.release\n\nallow := true\n\nreasons := set()\n"
    store = forged_role(world.store, "member-borealis-hospital", {path: evil}, thief)
    assert "not the member-borealis-hospital that the snapshot names" in refused(store, world)


# --- delegations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("images", "enrolments/site/evil.json"),
        ("enrolments", "images/evil.json"),
        ("code", "policies/floor.rego"),
        ("policies", "code/" + "12" * 32 + ".json"),
        ("member-acme-pharma", "members/borealis-hospital/release/key.data.rego"),
        ("member-acme-pharma", "members/borealis-hospital/users/eve.json"),
        ("member-acme-pharma", "images/evil.json"),
        ("images", "images/../policies/floor.rego"),
        ("images", "images/UPPER.json"),
        ("images", "images/demo.txt"),
        ("images", "/images/evil.json"),
    ],
)
def test_no_role_reaches_into_anothers_paths(world: World, role: str, path: str) -> None:
    """Not even fully signed: a delegation is for its own paths alone."""
    keys = both(world) if not role.startswith("member-") else [world.keys["acme-pharma"]]
    store = forged_role(world.store, role, {path: b"{}"}, *keys)
    words = refused(restamped(store, world, snapshot_keys=both(world)), world)
    assert f"{path} is not for the role {role} to decide" in words


def test_a_member_cannot_be_made_to_propose_for_another(world: World) -> None:
    change = Changes(put={"members/borealis-hospital/release/key.data.rego": b"package sealwright.release\n"})
    proposal = propose(world.store, change, NOW)
    for name in ("acme-pharma", "cygnus-bio"):
        proposal = sign(proposal, world.keys[name], NOW)
    with pytest.raises(ProposalRefused) as caught:
        publish(world.store, proposal, NOW)
    assert caught.value.reasons == (
        "metadata/2.member-borealis-hospital.json: role member-borealis-hospital needs 1 signatures, has 0 (by nobody)",
    )


def test_widened_delegations_are_refused_even_fully_signed(world: World) -> None:
    top: Targets = parsed(world.store, "1.targets").signed
    wide = delegations(world.consortium)
    assert wide.roles is not None
    wide.roles["member-acme-pharma"].paths = ["members/*/*/*"]
    top.delegations = wide
    store = changed(world.store, "metadata/1.targets.json", signed_by(top, *both(world)))
    words = refused(restamped(store, world, snapshot_keys=both(world)), world)
    assert "its delegations do not follow from the consortium in the root" in words


def test_further_delegation_is_refused(world: World) -> None:
    signed: Targets = parsed(world.store, "1.images").signed
    signed.delegations = delegations(world.consortium)
    store = changed(world.store, "metadata/1.images.json", signed_by(signed, *both(world)))
    assert "delegates further" in refused(restamped(store, world, snapshot_keys=both(world)), world)


@pytest.mark.parametrize("name", ["1.images", "1.targets", "1.snapshot", "1.member-acme-pharma"])
def test_the_broker_key_signs_nothing_but_the_timestamp(world: World, name: str) -> None:
    raw = signed_by(parsed(world.store, name).signed, world.broker_key)
    words = refused(changed(world.store, f"metadata/{name}.json", raw), world)
    assert "has 0 (by nobody)" in words
    assert "the signature by broker broker-1 is not valid for the role" in words


def test_a_broker_can_sign_no_proposal(world: World) -> None:
    proposal = propose(world.store, world.put(image("two", "00" * 48)), NOW)
    with pytest.raises(ProposalRefused, match="has no say in this proposal"):
        sign(proposal, world.broker_key, NOW)
    with pytest.raises(ProposalRefused, match="belongs to no member"):
        sign(proposal, Ed25519PrivateKey.generate(), NOW)


def test_members_cannot_sign_the_timestamp(world: World) -> None:
    stamp = parsed(world.store, "timestamp").signed
    raw = signed_by(stamp, *world.keys.values())
    assert "role timestamp needs 1 signatures, has 0" in refused(
        changed(world.store, "metadata/timestamp.json", raw), world
    )
    with pytest.raises(ProposalRefused, match="no broker's"):
        sign_timestamp(world.store, world.keys["acme-pharma"], NOW)


# --- platform ---------------------------------------------------------------------------------------------------------


def test_the_platform_never_flips_even_fully_signed(world: World) -> None:
    flipped = world.with_consortium(platform="hardware", trust_domain="research.example", virtual_roots=())
    change = Changes(consortium=flipped, remove=frozenset(files_of(world.documents())))
    with pytest.raises(ProposalRefused) as caught:
        propose(world.store, change, NOW)
    assert any("changes the platform, which never changes" in reason for reason in caught.value.reasons)
    root: Root = parsed(world.store, "1.root").signed
    root.version = 2
    root.keys, root.roles = root_keys(flipped), root_roles(flipped)
    root.unrecognized_fields["sealwright"] = flipped.model_dump(mode="json")
    store = {**world.store, "metadata/2.root.json": signed_by(root, *world.keys.values())}
    words = refused(store, world)
    assert "metadata/2.root.json: changes the platform, which never changes" in words
    assert "metadata/2.root.json: changes the trust domain, which never changes" in words


def test_a_hardware_image_does_not_enter_a_virtual_charter(world: World) -> None:
    other = image("real", "00" * 48).model_copy(update={"platform": "hardware"})
    with pytest.raises(ProposalRefused, match="does not hold") as caught:
        propose(world.store, world.put(other), NOW)
    assert "an image for hardware in a virtual charter" in caught.value.reasons[0]


def test_a_virtual_image_does_not_enter_a_hardware_charter() -> None:
    world = World()
    world.consortium = world.with_consortium(platform="hardware", trust_domain="research.example", virtual_roots=())
    real = image("demo").model_copy(update={"platform": "hardware"})
    world.store = found(world.consortium, files_of([real]), world.keys.values(), [world.broker_key], NOW)
    with pytest.raises(ProposalRefused, match="does not hold") as caught:
        propose(world.store, world.put(image("demonstration")), NOW)
    assert "an image for virtual in a hardware charter" in caught.value.reasons[0]


def test_the_trust_domain_says_what_the_platform_is(world: World) -> None:
    for domain in ("research.example", "notvirtual.research.example"):
        with pytest.raises(ValueError, match="trust_domain"):
            world.with_consortium(trust_domain=domain)


# --- endless data, odd forms ------------------------------------------------------------------------------------------


def test_endless_data_is_not_parsed(world: World) -> None:
    big = b"[" * (1024 * 1024 + 1)
    assert "larger than 1048576 bytes" in refused(changed(world.store, "metadata/timestamp.json", big), world)
    many = {**world.store, **{f"targets/images/{n:064x}.x.json": b"" for n in range(9000)}}
    assert "more than 8192" in refused(many, world)
    heavy = {**world.store, **{f"targets/images/{n:064x}.x.json": bytes(1024 * 1024) for n in range(16)}}
    assert "the store is larger than" in refused(heavy, world)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"signed": {}}', b'{"signed":{"_type":"timestamp"}}'],
)
def test_nonsense_is_named(world: World, raw: bytes) -> None:
    for name in ("metadata/timestamp.json", "metadata/1.root.json", "metadata/1.images.json"):
        assert name in refused(changed(world.store, name, raw), world)


def edits() -> dict[str, Callable[[dict[str, Any]], Any]]:
    def version(value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda document: document["signed"].update(version=value)

    return {
        "version as text": version("1"),
        "version as float": version(1.5),
        "version true": version(True),
        "version zero": version(0),
        "version huge": version(2**40),
        "extra field": lambda document: document.update(extra=1),
        "extra signed field": lambda document: document["signed"].update(extra=1),
        "consortium in the wrong place": lambda document: document["signed"].update(sealwright={}),
        "upper-case signature": lambda document: document["signatures"][0].update(
            sig=document["signatures"][0]["sig"].upper()
        ),
        "no signatures": lambda document: document.update(signatures=[]),
        "other type": lambda document: document["signed"].update(_type="root"),
        "expiry nonsense": lambda document: document["signed"].update(expires="soon"),
    }


@pytest.mark.parametrize("edit", edits())
def test_odd_forms_are_refused(world: World, edit: str) -> None:
    for name in ("metadata/timestamp.json", "metadata/1.images.json", "metadata/1.snapshot.json"):
        document = json.loads(world.store[name])
        edits()[edit](document)
        assert name in refused(changed(world.store, name, compact(document)), world)


def test_every_byte_of_every_file_is_accounted_for(world: World) -> None:
    """A flipped bit anywhere is noticed and the file is named (a bit in eight positions of each file)."""
    for name, raw in world.store.items():
        for part in range(8):
            place = len(raw) * part // 8
            for bit in (0x01, 0x20):
                forged = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
                assert name in refused(changed(world.store, name, forged), world)


def test_whitespace_and_spare_signatures_are_noticed(world: World) -> None:
    for name in [name for name in world.store if name.startswith("metadata/")]:
        assert f"{name}: not in its one byte form" in refused(
            changed(world.store, name, world.store[name] + b"\n"), world
        ) or name.endswith("1.root.json")


@pytest.mark.parametrize("name", sorted(World().found().store))
def test_a_missing_file_is_named(name: str) -> None:
    world = World().found()
    lost = next(n for n in world.store if n.split(".", 1)[-1] == name.split(".", 1)[-1])
    store = {n: raw for n, raw in world.store.items() if n != lost}
    with pytest.raises(CharterRefused) as caught:
        load_charter(store, world.root, NOW)
    assert any(lost in reason for reason in caught.value.reasons)


@pytest.mark.parametrize(
    "name",
    ["metadata/2.images.json", "metadata/evil.json", "targets/images/x.json", "README", "targets/../x", "a" * 900],
)
def test_foreign_files_are_named(world: World, name: str) -> None:
    assert name[:200] in refused({**world.store, name: b"{}"}, world)


def test_another_root_is_refused(world: World) -> None:
    other = World().found()
    with pytest.raises(CharterRefused) as caught:
        load_charter(world.store, other.root, NOW)
    assert "metadata/1.root.json: not the root that you trust" in caught.value.reasons
    with pytest.raises(CharterRefused, match="does not hold"):
        load_charter(world.store, b"", NOW)


def test_a_later_root_is_no_first_root(world: World) -> None:
    world.store = world.amend(Changes(consortium=world.with_consortium(lease_seconds=30)))
    with pytest.raises(CharterRefused) as caught:
        load_charter(world.store, world.store["metadata/2.root.json"], NOW)
    assert "must be version 1" in caught.value.reasons[0]


def test_a_gap_in_the_root_chain_is_noticed(world: World) -> None:
    for seconds in (30, 20):
        world.store = world.amend(Changes(consortium=world.with_consortium(lease_seconds=seconds)))
    store = {name: raw for name, raw in world.store.items() if name != "metadata/2.root.json"}
    assert "3.root.json': does not belong" in refused(store, world)
