"""Each way to attest as what one is not, played against a real broker: no EAR, and every reason told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.storage import read_database
from attestation.canonical import b64
from attestation.client import BrokerClient
from attestation.errors import BrokerRefused
from attestation.evidence.report import Product
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.init_data import parse_init_data, write_init_data

RawGuests = Callable[..., Any]


def last_entries(broker: Any, count: int = 1) -> list[dict[str, Any]]:
    def read(step: Any) -> list[bytes]:
        return step.entries(step.size() - count, step.size())  # type: ignore[no-any-return]  # the step is untyped here

    return [json.loads(raw) for raw in read_database(broker.folder / "state/broker.sqlite", read)]


def changed_init_data(world: Any, place: str, **changes: Any) -> bytes:
    return write_init_data(parse_init_data(world.init_data[place]).model_copy(update=changes))


def test_evidence_of_an_earlier_session_is_refused_and_logged(raw_guests: RawGuests, broker: Any) -> None:
    guest = raw_guests()
    old = guest.evidence()
    guest.attest(old)
    guest.open()
    assert any(reason.startswith("freshness") for reason in guest.refused(old))
    (entry,) = last_entries(broker)
    assert entry["kind"] == "denial"
    assert any(reason.startswith("freshness") for reason in entry["body"]["reasons"])


def test_a_swapped_key_is_refused(raw_guests: RawGuests) -> None:
    guest, thief = raw_guests(), raw_guests()
    evidence = guest.evidence()
    thief.session, thief.guest_nonce = guest.session, guest.guest_nonce
    assert any(reason.startswith("freshness") for reason in thief.refused(evidence))


def test_keys_exchanged_among_their_purposes_are_unusable_or_refused(raw_guests: RawGuests) -> None:
    guest = raw_guests()
    keys = {purpose: b64(key) for purpose, key in guest.keys().items()}
    other = {**keys, "tls": b64(os.urandom(91))}
    assert any(reason.startswith("freshness") for reason in guest.refused(keys=other))


def test_a_nonce_works_once_even_if_its_first_use_was_wrong(raw_guests: RawGuests, broker: Any) -> None:
    guest = raw_guests()
    guest.refused(replace(guest.evidence(), certificates=b""))
    assert guest.refused() == ("the session's nonce was used before; each attestation needs a fresh one",)
    (entry,) = last_entries(broker)
    assert (entry["kind"], entry["body"]["call"]) == ("denial", "attest")
    again = raw_guests()
    again.attest()
    assert "used before" in again.refused()[0]


def test_init_data_of_another_charter_is_refused(raw_guests: RawGuests, world: Any) -> None:
    raw = changed_init_data(world, "site/north", charter="0" * 64)
    reasons = raw_guests(init_data=raw).refused()
    assert any("names another charter" in reason for reason in reasons)
    assert any("enrolled with other init-data" in reason for reason in reasons)


def test_init_data_that_host_data_does_not_bind_is_refused(raw_guests: RawGuests) -> None:
    reasons = raw_guests(host_data=bytes(32)).refused()
    assert any(reason.startswith("init-data") for reason in reasons)


def test_init_data_without_enrolment_is_refused(raw_guests: RawGuests, world: Any) -> None:
    raw = changed_init_data(world, "site/north", name="nowhere")
    assert any("site/nowhere is not enrolled" in reason for reason in raw_guests(init_data=raw).refused())


def test_no_usable_init_data_is_refused(raw_guests: RawGuests) -> None:
    for raw in (b"", b"not toml [", b"version = 1\n", b"x" * 70_000):
        assert any("init-data cannot be used" in reason for reason in raw_guests(init_data=raw).refused())


def test_anothers_place_is_refused(raw_guests: RawGuests, world: Any) -> None:
    server = changed_init_data(world, "site/north", role="server", name="hub", listen="127.0.0.1:1")
    reasons = raw_guests(init_data=server).refused()
    assert any("server/hub is enrolled with other init-data" in reason for reason in reasons)
    assert any("enrolled with the image server-image, it runs site-image" in reason for reason in reasons)
    south = changed_init_data(world, "site/north", name="south", listen="127.0.0.1:1")
    assert any("site/south is enrolled with other init-data" in r for r in raw_guests(init_data=south).refused())
    taken = raw_guests(init_data=world.init_data["server/hub"])
    assert any("it runs site-image" in reason for reason in taken.refused())


def test_a_tampered_image_is_refused(raw_guests: RawGuests) -> None:
    reasons = raw_guests(measurement=bytes([1]) * 47 + b"\0").refused()
    assert any(reason.startswith("measurement") for reason in reasons)


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        ({"policy": 0xB0000}, "policy-debug"),
        ({"policy": 0x70000}, "policy-migrate-ma"),
        ({"overrides": {"vmpl": 1}}, "vmpl"),
        ({"overrides": {"chip_id": bytes(64)}}, "hardware-id"),
    ],
)
def test_a_guest_that_its_host_may_look_into_is_refused(
    raw_guests: RawGuests, overrides: dict[str, Any], check: str
) -> None:
    assert any(reason.startswith(check) for reason in raw_guests(**overrides).refused())


def test_a_chip_that_is_not_enrolled_is_refused(raw_guests: RawGuests, world: Any) -> None:
    enrolment = world.charter().enrolment("site", "south")
    chip = world.chips[Product.GENOA].chip_id.hex()
    before = {"enrolments/site/south.json": enrolment.to_bytes()}
    world.change(Changes(put=files_of([enrolment.model_copy(update={"chips": (chip,)})])))
    try:
        assert any(reason.startswith("chip") for reason in raw_guests("site", "south").refused())
        raw_guests("site", "south", product=Product.GENOA).attest()
    finally:
        world.change(Changes(put=before))


def test_a_forged_signature_is_refused(raw_guests: RawGuests) -> None:
    guest = raw_guests()
    evidence = guest.evidence()
    forged = bytearray(evidence.report)
    forged[0x90] ^= 1
    assert any(r.startswith("report-signature") for r in guest.refused(replace(evidence, report=bytes(forged))))


def test_garbage_for_evidence_is_refused_in_words(raw_guests: RawGuests) -> None:
    for report, certificates in ((b"", b""), (b"\xff" * 1184, b"\xff" * 40), (os.urandom(1184), b"")):
        guest = raw_guests()
        assert guest.refused(replace(guest.evidence(), report=report, certificates=certificates))


def test_a_proof_by_another_key_is_refused(raw_guests: RawGuests) -> None:
    guest = raw_guests()
    body = guest.attest_body(guest.evidence())
    proof = guest.proof("POST", "/v1/attest", body, key=Ed25519PrivateKey.generate())
    with pytest.raises(BrokerRefused, match="proof of possession"):
        guest.post("/v1/attest", body, proof=proof)


def test_evidence_relayed_to_another_broker_is_refused(
    world: Any, broker: Any, tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, brokers_two: Any
) -> None:
    """`one` asks `two` for a nonce and hands it to the guest as its own; `two` gets the guest's evidence."""
    other, raw = brokers_two
    raw.open()
    relayed = raw.evidence(broker="one")
    assert any(reason.startswith("freshness") for reason in raw.refused(relayed))
    assert other.process.poll() is None


@pytest.fixture
def brokers_two(tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, tools: Any) -> Iterator[tuple[Any, Any]]:
    """A consortium with two brokers of which `two` runs, and a raw guest of `two`."""
    pair = tools.found_world(tmp_path, virtual_vendor, virtual_chips, ("one", "two"))
    running = tools.start_broker(tmp_path / "two", pair.entries[1])
    raw_init = pair.init_data["site/north"]
    guest = tools.RawGuest(pair, pair.entries[1], pair.attester("site", "north"), raw_init)
    try:
        yield running, guest
    finally:
        guest.client.close()
        running.stop()


def test_a_withdrawn_image_ends_what_it_had(raw_guests: RawGuests, guests: Any, world: Any) -> None:
    guest = guests("site", "north")
    guest.attest()
    image = world.charter().image("site-image")
    world.change(Changes(remove=frozenset({"images/site-image.json"})))
    try:
        with pytest.raises(BrokerRefused, match="no approved image"):
            guest.release("borealis-hospital/key/data")
        with pytest.raises(BrokerRefused):
            guest.renew()
    finally:
        world.change(Changes(put=files_of([image])))


def test_a_client_pinned_to_the_charter_talks_to_no_fake_broker(
    world: Any, broker: Any, tools: Any, tmp_path: Path
) -> None:
    other = tools.found_world(tmp_path, world.vendor, world.chips, ("one",))
    fake = tools.start_broker(tmp_path / "one", other.entries[0])
    client = BrokerClient(broker.entry, "virtual.trial", url=other.entries[0].url)
    try:
        with pytest.raises(Exception, match=r"cannot be reached: .*certificate"):
            client.time()
    finally:
        client.close()
        fake.stop()


def test_the_ledger_of_all_this_holds(broker: Any, world: Any, audited: Any) -> None:
    assert audited(broker, world).problems == ()
