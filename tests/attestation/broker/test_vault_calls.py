"""Calls about vaults by hand, at one broker, which has keys whole: what is malformed, sealed otherwise or too late."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attestation.broker.storage import read_database
from attestation.canonical import b64, unb64
from attestation.errors import BrokerRefused, StoreRefused
from attestation.guest_vault import open_vault
from attestation.hybrid import seal
from attestation.messages import release_info, request_digest
from attestation.vault_messages import deposit_info
from attestation.vaults import Deal
from policies.charter.making import Changes
from policies.errors import SealwrightError, Unusable

NORTH = "borealis-hospital/vault-site/north"
KEY = bytes(range(32))
ROOT = "ab" * 64


@pytest.fixture(scope="module")
def with_vault(world: Any, broker: Any, tools: Any) -> Any:
    """The consortium of one broker, with a policy for the vault of site north."""
    path = "members/borealis-hospital/release/vault-site.north.rego"
    world.change(Changes(put={path: tools.release_rules("site", "north")}))
    return world


@pytest.fixture
def guest(with_vault: Any, raw_guests: Callable[..., Any]) -> Any:
    made = raw_guests()
    made.attest()
    return made


def ask(guest: Any, step: str, **asked: Any) -> dict[str, Any]:
    found: dict[str, Any] = guest.post(f"/v1/vaults/{step}", json.dumps({"vault": NORTH, **asked}).encode())
    return found


def deal(number: int, **changes: Any) -> dict[str, Any]:
    return {"number": number, "k": 1, "brokers": ["one"], "commitments": {}, **changes}


def deposit(guest: Any, number: int, epoch: int, *, key: bytes = KEY, info: bytes | None = None, **changes: Any) -> Any:
    kem = unb64(ask(guest, "look")["kem"], where="kem")
    sealed = seal(key, kem, info=info or deposit_info("one", NORTH, number))
    return ask(guest, "deposit", epoch=epoch, deal=deal(number, **changes), sealed=b64(sealed))


def why(work: Callable[[], Any]) -> str:
    with pytest.raises(SealwrightError) as refused:
        work()
    error = refused.value
    return "; ".join(error.reasons) if isinstance(error, BrokerRefused) else error.what


def test_what_is_malformed_is_told_in_a_sentence(guest: Any) -> None:
    for step, asked in (
        ("look", {"vault": "borealis-hospital/key/data"}),
        ("look", {"vault": "north"}),
        ("look", {"more": 1}),
        ("open", {}),
        ("open", {"epoch": 0}),
        ("open", {"epoch": True}),
        ("open", {"epoch": 2**53}),
        ("deposit", {"epoch": 1, "deal": deal(0), "sealed": ""}),
        ("deposit", {"epoch": 1, "deal": {}, "sealed": ""}),
        ("deposit", {"epoch": 1, "deal": deal(1, more=1), "sealed": ""}),
        ("deposit", {"epoch": 1, "deal": deal(1), "sealed": "no base64"}),
        ("prepare", {"mark": {"generation": 1}}),
        ("prepare", {"mark": {"generation": -1, "root": ROOT}}),
        ("prepare", {"mark": {"generation": 1, "root": ROOT.upper()}}),
        ("commit", {"mark": {"generation": 1, "root": ROOT + "\n"}}),
        ("commit", {"mark": None}),
    ):
        said = why(lambda step=step, asked=asked: ask(guest, step, **asked))
        assert said, (step, asked)
        assert "fault" not in said, (step, asked, said)
    with pytest.raises(Unusable):
        guest.client.answer(
            "POST", "/v1/vaults/look", b"[]", nonce=guest.guest_nonce, proof=guest.proof("POST", "/", b"")
        )


def test_a_key_goes_in_and_comes_back_sealed(guest: Any, broker: Any) -> None:
    before = ask(guest, "look")["state"]
    number, epoch = 1 + (before["deal"] or {"number": 0})["number"], before["epoch"] + 1
    for changes, said in (
        ({"key": KEY[:31]}, "has 32 bytes"),
        ({"info": deposit_info("two", NORTH, number)}, "do not open"),
        ({"info": deposit_info("one", NORTH, number + 1)}, "do not open"),
        ({"brokers": ["two"]}, "the deal gives one no share"),
        ({"brokers": ["one", "two"], "k": 1, "commitments": dict.fromkeys(("one", "two"), "0" * 64)}, "deals no key"),
        (
            {"brokers": ["one", "two"], "k": 2, "commitments": dict.fromkeys(("one", "two"), "0" * 64)},
            "the charter has no broker two",
        ),
    ):
        assert said in why(lambda changes=changes: deposit(guest, number, epoch, **changes)), changes
    if before["deal"] is None:
        assert "no key of the vault" in why(lambda: ask(guest, "open", epoch=epoch))
    done = deposit(guest, number, epoch)
    assert (done["state"]["deal"], done["state"]["boot"]) == (
        deal(number),
        guest.attester.context.report_id.hex(),
    )
    assert KEY not in (broker.folder / "state/broker.sqlite").read_bytes()
    assert "is not above the last" in why(lambda: deposit(guest, number, epoch))
    body = json.dumps({"epoch": epoch, "vault": NORTH}).encode()
    proof = guest.proof("POST", "/v1/vaults/open", body)
    given = guest.post("/v1/vaults/open", body, proof=proof)
    info = release_info("one", NORTH, given["serial"], request_digest(body, proof))
    assert guest.kem_key.open(unb64(given["sealed"], where="sealed"), info=info) == KEY
    assert "was used before" in why(lambda: guest.post("/v1/vaults/open", body, proof=proof))


def test_one_broker_keeps_a_vault(
    with_vault: Any, guests: Callable[..., Any], tmp_path: Path, audited: Any, broker: Any
) -> None:
    """The whole life of a vault whose charter has one broker; and its story holds in an audit."""

    def mount(key: bytes, fresh: bool) -> Path:
        (tmp_path / "volume").mkdir(exist_ok=True)
        return tmp_path / "volume"

    def opened() -> Any:
        session = guests()
        session.attest()
        return open_vault(session, mount)

    vault = opened()
    assert vault._deal.brokers == ["one"]
    vault.save({"rounds": os.urandom(8)})
    old = (tmp_path / "volume/fresh-state").read_bytes()
    vault.save({"rounds": b"2"})
    new = (tmp_path / "volume/fresh-state").read_bytes()
    (tmp_path / "volume/fresh-state").write_bytes(old)
    with pytest.raises(StoreRefused, match="rolled back"):
        opened()
    (tmp_path / "volume/fresh-state").write_bytes(new)
    assert opened().entries == {"rounds": b"2"}
    session = guests()
    session.attest()
    assert "has a key already" in why(
        lambda: session._sessions["one"].deposit_share(NORTH, 99, vault_deal(9), KEY, kem_of(session))
    )
    assert audited(broker, with_vault).problems == ()
    size = read_database(broker.folder / "state/broker.sqlite", lambda step: step.resources())
    assert [name for name, _ in size if name.startswith(NORTH)] == [f"{NORTH}#{vault._deal.number}"]


def vault_deal(number: int) -> Deal:
    return Deal(number=number, k=1, brokers=["one"], commitments={})


def kem_of(session: Any) -> bytes:
    kem: bytes = session._sessions["one"].look(NORTH)[1]
    return kem
