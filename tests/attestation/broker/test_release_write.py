"""Between a release's decision and its entry nothing may have moved: counters, charter, the deposited value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.keks import KekFile, seal_resource
from attestation.broker.releases import Released, Releases, Request
from attestation.broker.sessions import Session, open_session
from attestation.broker.storage import Storage, open_storage
from attestation.errors import BrokerUnavailable, ReleaseRefused
from attestation.ledger.entry import Entry, parse_entry

if TYPE_CHECKING:
    from attestation.client import GuestSession

RESOURCE = "borealis-hospital/key/five"
"""At most five releases of it, by its owner's policy."""


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(f"sqlite:///{tmp_path}/broker.sqlite", "virtual.trial/broker/one/ledger", KEY)
    yield opened
    opened.close()


KEY = Ed25519PrivateKey.generate()
KEK = KekFile(bytes(32))


class Decision:
    """A release that is decided over a fresh ledger; `meanwhile` runs between decision and entry, at the first try."""

    def __init__(self, storage: Storage, world: Any, guest: GuestSession) -> None:
        self.storage = storage
        self.followed = True
        self.deposit(1)
        charter = guest.charter
        session = open_session(
            "v1",
            identifier="0" * 32,
            nonce=bytes(32),
            guest_nonce="",
            at=guest.now(),
            seconds=60,
            charter_version=charter.version,
        ).model_copy(update={"state": "attested", "attested_at": int(guest.now().timestamp())})
        storage.transact_now(lambda step: step.new_session(session))
        self.session, self.ear, self.charter, self.at = session, guest.ear, charter, guest.now().replace(microsecond=0)
        self.releases = Releases(storage, KEK, lambda _, __: self.followed)

    def deposit(self, serial: int) -> None:
        self.storage.transact_now(lambda step: step.put_resource(seal_resource(RESOURCE, serial, b"value", KEK)))

    def another_release(self) -> None:
        """What another process on the same ledger writes."""
        entry = Entry("release", self.at, {"by": "another"})
        self.storage.transact_now(lambda step: step.append(entry, resource=RESOURCE, guest="site/south", boot="00"))

    def make(self, meanwhile: Callable[[], None] = lambda: None) -> Released | None:
        def seal(_: Session, value: bytes, serial: int) -> str:
            meanwhile()
            return f"{value.decode()} {serial}"

        request = Request(
            self.session, self.ear, RESOURCE, None, "digest", self.charter, self.at, lambda _: self.session, seal
        )
        return asyncio.run(self.releases.decide(request))

    def make_together(self, count: int, unsealed: int) -> list[Released | Exception | None]:
        """As many requests at once, of which one (`unsealed`) cannot be sealed."""

        def request(number: int) -> Request:
            def seal(_: Session, value: bytes, serial: int) -> str:
                if number == unsealed:
                    raise BrokerUnavailable("it cannot be sealed", where="here")
                return f"{value.decode()} {serial}"

            at = self.session, self.ear, RESOURCE, None, f"{number}", self.charter, self.at
            return Request(*at, lambda _: self.session, seal)

        async def run() -> list[Any]:
            made = [self.releases.decide(request(number)) for number in range(count)]
            return await asyncio.gather(*made, return_exceptions=True)

        return asyncio.run(run())

    def written(self) -> int:
        return self.storage.read(lambda step: step.size())


@pytest.fixture
def decision(storage: Storage, world: Any, guests: Callable[..., GuestSession]) -> Decision:
    guest = guests()
    guest.attest()
    return Decision(storage, world, guest)


def test_what_stands_is_written_and_released(decision: Decision) -> None:
    released = decision.make()
    assert released is not None
    assert (released.sealed, decision.written()) == ("value 1", 1)


def test_a_release_by_another_way_is_counted_before_this_one_is_written(decision: Decision) -> None:
    assert decision.make(decision.another_release) is None
    assert decision.written() == 1
    for _ in range(4):
        assert decision.make() is not None
    with pytest.raises(ReleaseRefused, match="often"):
        decision.make()


def test_a_charter_that_moved_meanwhile_is_asked_first(decision: Decision) -> None:
    def move() -> None:
        decision.followed = False

    assert decision.make(move) is None
    assert decision.written() == 0


def test_a_value_that_was_replaced_meanwhile_is_not_released(decision: Decision) -> None:
    assert decision.make(lambda: decision.deposit(2)) is None
    assert decision.written() == 0
    released = decision.make()
    assert released is not None
    assert released.sealed == "value 2"


def test_of_many_at_once_as_many_are_released_as_the_owner_allows_whichever_fail(decision: Decision) -> None:
    made = decision.make_together(40, unsealed=2)
    assert sum(isinstance(one, Released) for one in made) == 5
    assert isinstance(made[2], BrokerUnavailable)
    refused = [one for one in made if isinstance(one, ReleaseRefused)]
    assert len(refused) == 34
    assert all("often" in str(one) for one in refused)
    entries = decision.storage.read(lambda step: [parse_entry(raw) for raw in step.entries(0, 100)])
    assert [entry.kind for entry in entries] == ["release"] * 5 + ["denial"] * 34
    assert [entry.body["counters"]["releases"] for entry in entries] == [0, 1, 2, 3, 4] + [5] * 34
