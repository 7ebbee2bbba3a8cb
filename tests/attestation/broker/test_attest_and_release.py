"""The whole way over real TLS: attest, take a credential, get what one's owner releases, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography import x509

from attestation.client import GuestSession
from attestation.errors import BrokerRefused, PeerRefused
from attestation.identity import appraise_peer
from attestation.ledger.checkpoint import parse_checkpoint

SITE_KEY, MODEL_KEY, TWICE_KEY = "borealis-hospital/key/data", "acme-pharma/key/model", "borealis-hospital/key/twice"
Guests = Callable[..., GuestSession]


def test_a_guest_attests_and_gets_its_key(guests: Guests, world: Any) -> None:
    guest = guests("site", "north")
    identity = guest.attest()
    assert identity.spiffe_id == "spiffe://virtual.trial/site/north"
    peer = appraise_peer(identity.certificate_der, guest.charter, guest.now(), role="site")
    assert (peer.role, peer.name, peer.member) == ("site", "north", "borealis-hospital")
    assert peer.ear.claims["platform"] == "virtual"
    assert guest.release(SITE_KEY) == b"north's data key"
    hub = guests("server", "hub")
    hub.attest()
    assert hub.release(MODEL_KEY) == b"the model key"


def test_a_certificate_carries_its_names_and_ear(guests: Guests) -> None:
    identity = guests("site", "south").attest()
    leaf, issuer = x509.load_pem_x509_certificates(identity.certificate_pem.encode())
    leaf.verify_directly_issued_by(issuer)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["south.site.sealwright.internal"]
    assert "PRIVATE" not in repr(identity)
    with pytest.raises(PeerRefused) as refused:
        appraise_peer(identity.certificate_der, guests("server", "hub").refresh_charter(), identity.lease_ends)
    assert any("ended" in reason for reason in refused.value.reasons)


def test_another_owners_key_is_denied_with_the_rules_that_failed(guests: Guests) -> None:
    guest = guests("site", "north")
    guest.attest()
    for resource in (MODEL_KEY, "cygnus-bio/key/data"):
        with pytest.raises(BrokerRefused) as refused:
            guest.release(resource)
        assert all(reason.startswith("owner's policy") for reason in refused.value.reasons)
    with pytest.raises(BrokerRefused, match="no release policy"):
        guest.release("cygnus-bio/key/unknown")
    assert guest.release(SITE_KEY) == b"north's data key"  # a denial spoils nothing


def test_use_limits_are_counted_from_the_ledger(guests: Guests) -> None:
    guest = guests("site", "north")
    guest.attest()
    for _ in range(2):
        guest.release(TWICE_KEY)
    with pytest.raises(BrokerRefused, match="not again in this boot"):
        guest.release(TWICE_KEY)
    guest.renew()
    with pytest.raises(BrokerRefused, match="not again in this boot"):
        guest.release(TWICE_KEY)
    rebooted = guests("site", "north")
    rebooted.attest()
    assert rebooted.release(TWICE_KEY) == b"twice a boot at most"


def test_a_limit_of_five_is_five_however_many_ask_at_once(guests: Guests) -> None:
    asking = [guests("site", "north") for _ in range(12)]

    def ask(guest: GuestSession) -> list[bytes | str]:
        guest.attest()
        had: list[bytes | str] = []
        for _ in range(3):
            try:
                had.append(guest.release("borealis-hospital/key/five"))
            except BrokerRefused as error:
                had.append(error.reasons[0])
        return had

    with ThreadPoolExecutor(12) as pool:
        had = [one for several in pool.map(ask, asking) for one in several]
    assert had.count(b"five times in all") == 5
    assert had.count("owner's policy: it was released as often as its owner allows") == 31


def test_records_are_in_the_ledger_and_the_brokers_kinds_are_not_theirs(guests: Guests) -> None:
    guest = guests("server", "hub")
    guest.attest()
    receipt = guest.record("job", {"job": "trial", "phase": "start"})
    assert parse_checkpoint(receipt.checkpoint).size > receipt.index
    with pytest.raises(BrokerRefused, match="broker's own"):
        guest.record("release", {})


def test_a_renewal_keeps_the_key_and_moves_the_ear(guests: Guests) -> None:
    guest = guests("site", "south")
    first = guest.attest()
    second = guest.renew()
    assert first.tls_key_pem == second.tls_key_pem
    assert first.ears != second.ears
    assert first.certificate_pem == second.certificate_pem
    peer = appraise_peer(first.certificate_der, guest.charter, guest.now(), ears=second.ears)
    assert (peer.ear.token,) == second.ears


def test_the_ledger_of_all_this_holds(broker: Any, world: Any, audited: Any) -> None:
    assert audited(broker, world).problems == ()
