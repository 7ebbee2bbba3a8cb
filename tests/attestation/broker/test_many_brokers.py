"""A guest and three brokers of which two are needed: whom it believes, what it gets, and from whom peers take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from attestation.broker.keys import load_issuer
from attestation.canonical import b64
from attestation.client import BrokerClient, GuestSession
from attestation.ear import Ear, sign_ear, verify_ear
from attestation.errors import BrokerRefused, BrokersDisagree, BrokerUnavailable, PeerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product
from attestation.identity import appraise_peer
from attestation.messages import Answer
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter.making import Changes
from policies.keys import load_private_key

NAMES = ("one", "two", "three")
SITE_KEY = "borealis-hospital/key/data"
Guests = Callable[..., GuestSession]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Any:
    """A consortium with three brokers, each of another member; two have to vouch for a guest."""
    folder = tmp_path_factory.mktemp("three")
    return tools.found_world(folder, virtual_vendor, virtual_chips, NAMES, broker_threshold=2)


@pytest.fixture(scope="module")
def running(world: Any, tools: Any) -> Iterator[dict[str, Any]]:
    """The three brokers by name; a resource lies at its owner's alone (`two` is borealis-hospital's)."""
    found: dict[str, Any] = {}
    try:
        for entry in world.entries:
            found[entry.name] = tools.start_broker(world.folder / entry.name, entry)
        client = BrokerClient(world.entries[1], "virtual.trial")
        key = world.member_keys["borealis-hospital"]
        client.deposit(SITE_KEY, b"north's data key", key, charter_id=world.charter().id)
        client.close()
        yield found
    finally:
        for broker in found.values():
            if broker.process.poll() is None:
                broker.stop()


@pytest.fixture
def guests(world: Any, running: dict[str, Any]) -> Iterator[Guests]:
    """Makes guests and closes them."""
    made: list[GuestSession] = []

    def make(*place: str, **overrides: Any) -> GuestSession:
        made.append(world.guest(*place, **overrides))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@contextmanager
def without(running: dict[str, Any], tools: Any, *names: str) -> Iterator[None]:
    """These brokers are not there for a while."""
    for name in names:
        running[name].stop()
    try:
        yield
    finally:
        for name in names:
            running[name] = tools.start_broker(running[name].folder, running[name].entry)


@dataclasses.dataclass
class SpoiltAttester:
    """A secure processor whose first reports are over something else than was asked for."""

    attester: Any
    spoilt: int

    def evidence(self, report_data: bytes) -> SnpEvidence:
        self.spoilt -= 1
        found: SnpEvidence = self.attester.evidence(bytes(64) if self.spoilt >= 0 else report_data)
        return found


def spoilt(guest: GuestSession, reports: int) -> GuestSession:
    attester = SpoiltAttester(guest._guest.attester, reports)
    guest._guest = dataclasses.replace(guest._guest, attester=attester)
    return guest


# --- who has to vouch -------------------------------------------------------------------------------------------------


def test_every_broker_appraises_a_report_of_its_own(guests: Guests, world: Any) -> None:
    guest = guests()
    identity = guest.attest()
    assert guest.brokers == NAMES
    assert len({report.report for report in guest._guest.attester.seen}) == 3  # type: ignore[attr-defined]
    peer = appraise_peer(identity.certificate_der, guest.charter, guest.now(), role="site")
    assert [ear.broker for ear in peer.ears] == ["one", "two"], "a certificate has as many EARs as are needed"
    assert len(identity.certificate_der) < 3000
    assert len(identity.ears) == 3
    assert (
        peer.good_until
        <= identity.lease_ends
        <= guest.now() + timedelta(seconds=world.charter().consortium.lease_seconds)
    )
    again = guest.renew()
    assert again.certificate_pem == identity.certificate_pem
    assert not set(again.ears) & set(identity.ears)
    assert len(appraise_peer(identity.certificate_der, guest.charter, guest.now(), ears=again.ears).ears) == 3


def test_one_broker_less_is_enough_and_two_less_are_too_few(
    guests: Guests, running: dict[str, Any], tools: Any
) -> None:
    guest = guests()
    with without(running, tools, "one"):
        identity = guest.attest()
        assert guest.brokers == ("two", "three")
        assert appraise_peer(identity.certificate_der, guest.charter, guest.now())
        with without(running, tools, "three"):
            with pytest.raises(BrokerUnavailable) as waiting:
                guest.renew()
            assert [reason.partition(":")[0] for reason in waiting.value.reasons][1:] == ["one", "three"]
            with pytest.raises(BrokerUnavailable):
                guests().attest()
        guest.renew()
    guest.renew()
    assert guest.brokers == NAMES


def test_one_refusal_is_outvoted_and_two_name_every_broker_and_reason(guests: Guests) -> None:
    guest = spoilt(guests(), 1)
    guest.attest()
    assert len(guest.brokers) == 2
    with pytest.raises(BrokerRefused) as refused:
        spoilt(guests(), 2).attest()
    reasons = refused.value.reasons
    assert reasons[0] == "1 of the 2 brokers that are needed affirm the guest"
    named = {reason.partition(":")[0] for reason in reasons[1:] if "freshness" in reason}
    assert len(named) == 2
    assert named < set(NAMES)


def test_a_refusal_and_silence_wait_and_refusals_alone_do_not(
    guests: Guests, running: dict[str, Any], tools: Any
) -> None:
    with without(running, tools, "three"):
        with pytest.raises(BrokerUnavailable) as waiting:
            spoilt(guests(), 1).attest()
        assert any("cannot be reached" in reason for reason in waiting.value.reasons)
        with pytest.raises(BrokerRefused):
            spoilt(guests(), 2).attest()


# --- time and charter -------------------------------------------------------------------------------------------------


def lie(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[Answer], Answer]) -> None:
    """Brokers gone bad: what they sign is changed by their own hand, so that every signature holds."""
    honest = BrokerClient.answer

    def answer(client: BrokerClient, *arguments: Any, **more: Any) -> Answer:
        found = honest(client, *arguments, **more)
        change = changes.get(client.name)
        return found if change is None else change(found)

    monkeypatch.setattr(BrokerClient, "answer", answer)


def shifted(by: timedelta) -> Callable[[Answer], Answer]:
    return lambda answer: dataclasses.replace(answer, time=answer.time + by)


def test_a_broker_whose_clock_is_wrong_is_not_believed(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, one=shifted(timedelta(hours=-5)))
    guest = guests()
    guest.attest()
    assert guest.brokers == ("two", "three")
    assert abs(guest.now() - datetime.now(UTC)) < timedelta(seconds=30)


def test_without_k_brokers_of_one_time_there_is_none(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guests()
    guest.attest()
    lie(monkeypatch, one=shifted(timedelta(hours=-5)), two=shifted(timedelta(hours=5)))
    with pytest.raises(BrokersDisagree) as refused:
        guest.renew()
    assert "more than 10 s apart" in refused.value.reasons[0]
    assert len(refused.value.reasons) == 4


def test_brokers_older_than_the_image_are_not_believed(world: Any, running: dict[str, Any]) -> None:
    built = datetime.now(UTC) + timedelta(hours=1)
    guest = GuestSession(world.attester("site", "north"), world.init_data["site/north"], not_before=built)
    with pytest.raises(BrokerRefused, match="before this image was built"):
        guest.attest()
    guest.close()


def test_a_newer_charter_counts_when_k_brokers_follow_it_and_no_older_one_after_it(guests: Guests, world: Any) -> None:
    guest = guests()
    guest.attest()
    before = guest.charter.version
    world.change(Changes(renew=frozenset({"images"})), to=("one",))
    guest.renew()
    assert (guest.charter.version, guest.brokers) == (before, ("two", "three"))
    world.publish(("two",))
    guest.renew()
    assert (guest.charter.version, guest.brokers) == (before + 1, ("one", "two"))
    fresh = guests()
    fresh.attest()
    assert (fresh.charter.version, fresh.brokers) == (before + 1, ("one", "two"))
    world.publish()
    guest.renew()
    assert guest.brokers == NAMES


def test_an_older_charter_is_refused_however_many_name_it(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guests()
    guest.attest()

    def older(answer: Answer) -> Answer:
        charter = answer.result.get("charter")
        named = {} if charter is None else {"charter": {**charter, "version": charter["version"] - 1}}
        return dataclasses.replace(answer, result={**answer.result, **named})

    lie(monkeypatch, one=older, two=older, three=older)
    with pytest.raises(BrokersDisagree, match="not older than the known one"):
        guest.renew()


# --- credentials ------------------------------------------------------------------------------------------------------


def issuer_of(world: Any, name: str) -> Any:
    entry = next(entry for entry in world.entries if entry.name == name)
    return load_issuer(world.folder / name / "keys/issuer.pem", entry.issuer_certificate)


def certificate(world: Any, issuer: str, guest: GuestSession, ears: list[str]) -> bytes:
    """What a broker gone bad issues: any EARs under its own, real issuer key."""
    issued: bytes = issuer_of(world, issuer).guest_certificate(
        guest._keys.tls.public_key(),
        trust_domain="virtual.trial",
        role="site",
        name="north",
        ears=ears,
        at=datetime.now(UTC),
        seconds=3600,
    )
    return issued


def forged(world: Any, ear: Ear, broker: str, signer: str, **changes: Any) -> str:
    """An EAR in `broker`'s name by `signer`'s key."""
    document = ear.document.model_copy(update={"iss": broker, **changes})
    return sign_ear(document, load_private_key(world.folder / signer / "keys/signing.pem"))


def test_one_broker_gone_bad_makes_no_credential_that_peers_accept(guests: Guests, world: Any) -> None:
    honest = guests()
    honest.attest()
    charter, at = honest.charter, honest.now()
    ears = {ear.broker: ear for ear in honest.ears}
    mallory = guests()  # never attested: its keys are its own
    mine = {"keys": dict(mallory._keys.digests)}
    own = forged(world, ears["one"], "one", "one", **mine)

    def refusal(tokens: list[str], shown: list[str] | None = None) -> str:
        with pytest.raises(PeerRefused) as refused:
            appraise_peer(certificate(world, "one", mallory, tokens), charter, at, ears=shown)
        return "\n".join(refused.value.reasons)

    assert "1 of the 2 EARs that are needed hold" in refusal([own])
    in_twos_name = forged(world, ears["one"], "two", "one", **mine)
    assert "signature is not broker two's" in refusal([own, in_twos_name])
    assert "about different keys" in refusal([own, ears["two"].token])
    another = forged(world, ears["one"], "one", "one", nonce="another", **mine)
    assert "two EARs are broker one's" in refusal([own], [own, another])
    assert "shows no EARs" in refusal([own], [])
    elsewhere = ears["one"].subject.model_copy(update={"name": "south", "member": "cygnus-bio"})
    stolen = forged(world, ears["one"], "one", "one", subject=elsewhere)
    assert "about different places" in refusal([stolen, ears["two"].token])
    assert "another TLS key" in refusal([ears["one"].token, ears["two"].token])


def test_a_broker_checks_the_ears_that_it_puts_beside_its_own(guests: Guests, world: Any) -> None:
    guest, other = guests(), guests()
    guest.attest()
    other.attest()
    ears = {ear.broker: ear for ear in guest.ears}
    session = guest._sessions["one"]

    def refusal(*others: str) -> str:
        with pytest.raises(BrokerRefused) as refused:
            session.credential(others)
        return "\n".join(refused.value.reasons)

    assert "1 of the 2 EARs that are needed hold" in refusal()
    assert "two EARs are broker one's" in refusal(ears["one"].token)
    assert "about different keys" in refusal(other.ears[1].token)
    assert "signature is not broker two's" in refusal(forged(world, ears["one"], "two", "one"))
    past = int(datetime.now(UTC).timestamp()) - 500
    assert "ended at" in refusal(ears["three"].token, forged(world, ears["two"], "two", "two", iat=past, exp=past + 60))
    assert session.credential([ears["two"].token]).startswith("-----BEGIN CERTIFICATE-----")
    body = b'{"csr": "' + b64(guest._keys.certificate_request()).encode() + b'", "ears": "x"}'
    assert verify_ear(ears["one"].token, guest.charter, guest.now())
    with pytest.raises(Exception, match="no CredentialRequest"):
        session._prove(session._standing(), "POST", "/v1/credentials", body)


# --- resources and records --------------------------------------------------------------------------------------------


def test_a_resource_comes_from_the_broker_that_has_it(guests: Guests) -> None:
    guest = guests()
    guest.attest()
    assert guest.release(SITE_KEY) == b"north's data key"
    assert guest.release_from("two", SITE_KEY) == b"north's data key"
    with pytest.raises(BrokerRefused, match="was not deposited at this broker"):
        guest.release_from("one", SITE_KEY)
    with pytest.raises(BrokerUnavailable, match="has not affirmed"):
        guest.release_from("four", SITE_KEY)
    with pytest.raises(BrokerRefused) as refused:
        guest.release("borealis-hospital/key/open")
    assert {reason.partition(":")[0] for reason in refused.value.reasons} == set(NAMES)


def test_a_record_is_one_brokers_and_another_takes_it_when_that_is_gone(
    guests: Guests, running: dict[str, Any], tools: Any
) -> None:
    guest = guests()
    guest.attest()
    assert "/one/" in guest.record("note", {"n": 1}).checkpoint
    with without(running, tools, "one"):
        assert "/two/" in guest.record("note", {"n": 2}).checkpoint
        with without(running, tools, "two", "three"), pytest.raises(BrokerUnavailable):
            guest.record("note", {"n": 3})


def test_every_brokers_ledger_of_all_this_holds(world: Any, running: dict[str, Any], audited: Any) -> None:
    for name in NAMES:
        assert audited(running[name], world).problems == ()
