"""The rules of vaults one by one: who holds one, what may be prepared and committed, which store is taken."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vault_simulator import NAMES, VAULT, recovery

from attestation.errors import BrokersDisagree, BrokerUnavailable, StoreRefused
from attestation.fresh_state import Store, derive_keys, is_authentic, store_root
from attestation.vaults import (
    NEW,
    Claim,
    Deal,
    Mark,
    VaultCall,
    VaultState,
    agreed_deal,
    fenced,
    judge_store,
    next_epoch,
    open_reasons,
    place_reasons,
    prepare_reasons,
    read_call,
    read_state,
    recovered,
)
from policies.errors import Unusable
from policies.vaults import VaultRecovery, vault_name, vault_place

KEYS = derive_keys(VAULT, bytes(range(32)))
DEAL = Deal(number=1, k=2, brokers=sorted(NAMES), commitments=dict.fromkeys(NAMES, "a" * 64))
OLD, NOW, NEXT = ("1" * 64, "2" * 64, "3" * 64)


def mark(generation: int, word: bytes = b"") -> Mark:
    return store_root(VAULT, KEYS, Store(generation, {"word": word}))


def state(committed: Mark, prepared: Mark | None = None, **more: Any) -> VaultState:
    return VaultState(deal=DEAL, epoch=4, boot=NOW, committed=committed, prepared=prepared, **more)


def judge(states: Mapping[str, VaultState], found: Mark | None, said: VaultRecovery | None = None) -> Any:
    return judge_store(VAULT, DEAL, states, said, found, lambda one: is_authentic(VAULT, KEYS, one))


def test_who_may_hold_a_vault() -> None:
    held = state(mark(1))
    for claim, why in (
        (Claim(NOW, 4, True), ()),
        (Claim(NEXT, 5, False), ()),
        (Claim(NEXT, 4, False), ()),
        (Claim(OLD, 4, False), (fenced(VAULT),)),
        (Claim(NEXT, 3, False), (fenced(VAULT),)),
        (Claim(NEXT, 9, True), (fenced(VAULT),)),  # it was overtaken before: whatever epoch it names
    ):
        assert open_reasons(VAULT, held, claim) == why, claim
    assert open_reasons(VAULT, NEW, Claim(NOW, 1, False)) == (
        f"no key of the vault {VAULT} was deposited at this broker",
    )


def test_what_may_be_deposited() -> None:
    claim = Claim(NEXT, 5, False)
    again = DEAL.model_copy(update={"number": 2})
    new = VaultState(deal=DEAL, epoch=4, boot=NOW, prepared=mark(1))
    reasons, after = VaultCall(VAULT, "deposit", 5, again).outcome(new, claim)
    assert reasons == ()
    assert (after.deal, after.boot, after.epoch, after.prepared, after.step) == (again, NEXT, 5, None, 1)
    assert "is not above the last (1)" in VaultCall(VAULT, "deposit", 5, DEAL).outcome(new, claim)[0][0]
    assert "has a key already" in VaultCall(VAULT, "deposit", 5, again).outcome(state(mark(1)), claim)[0][0]


def test_what_may_be_prepared_and_committed() -> None:
    held = state(mark(3), prepared=mark(4))
    assert prepare_reasons(VAULT, held, NOW, mark(9)) == ()
    assert prepare_reasons(VAULT, held, NOW, mark(3)) == ()
    for boot, asked, why in (
        (OLD, mark(9), "a newer boot"),
        (NOW, mark(2), "it was rolled back"),
        (NOW, mark(3, b"other"), "another store of generation 3"),
        (NOW, Mark(generation=9, root=""), "by its root"),
        (NOW, Mark(generation=0, root=""), "rolled back"),
    ):
        assert why in prepare_reasons(VAULT, held, boot, asked)[0]
    reasons, after = VaultCall(VAULT, "commit", 0, mark(4)).outcome(held, Claim(NOW, 0, True))
    assert (reasons, after.committed, after.prepared) == ((), mark(4), None)
    reasons, after = VaultCall(VAULT, "commit", 0, mark(3)).outcome(held, Claim(NOW, 0, True))
    assert (reasons, after.committed, after.prepared) == ((), mark(3), mark(4))
    for boot, asked, why in (
        (OLD, mark(4), "a newer boot"),
        (NOW, mark(4, b"other"), "was not prepared"),
        (NOW, mark(5), "was not prepared"),
    ):
        assert why in VaultCall(VAULT, "commit", 0, asked).outcome(held, Claim(boot, 0, True))[0][0]


def test_a_recovery_counts_once() -> None:
    before = state(mark(5), prepared=mark(6))
    before = before.model_copy(update={"reached": mark(6)})
    after = recovered(before, recovery(1, 2))
    assert (after.recovery, after.committed, after.prepared) == (1, Mark(generation=2, root=""), None)
    assert (after.epoch, after.boot, after.deal) == (before.epoch, before.boot, before.deal)
    moved = after.model_copy(update={"committed": mark(3)})
    for same in (None, recovery(1, 0)):
        assert recovered(moved, same) == moved
    assert after.reached == mark(6), "a generation is not used again, though its store was given up"
    begun_anew = recovered(moved, recovery(2, 0))
    assert (begun_anew.committed, begun_anew.reached) == (NEW.committed, NEW.reached)


def test_whose_vault_it_is() -> None:
    charter: Any = SimpleNamespace(recovery=lambda vault: None)
    assert place_reasons(VAULT, "site", "north", "borealis-hospital", charter) == ()
    for role, name, member in (
        ("server", "north", "borealis-hospital"),
        ("site", "south", "borealis-hospital"),
        ("site", "north", "cygnus-bio"),
    ):
        assert place_reasons(VAULT, role, name, member, charter) == (f"{VAULT} is not the vault of {role} {name}",)
    assert place_reasons("borealis-hospital/key/data", "site", "north", "borealis-hospital", charter)
    given: Any = SimpleNamespace(recovery=lambda vault: recovery(1, 3, to="south"))
    assert place_reasons(VAULT, "site", "south", "cygnus-bio", given) == ()
    assert place_reasons(VAULT, "site", "north", "borealis-hospital", given)
    assert vault_place(VAULT) == ("site", "north")
    assert vault_name("borealis-hospital", "site", "north") == VAULT
    for other in ("borealis-hospital/vault-king/north", "borealis-hospital/vault/north", "north", "a/b/c/d", ""):
        assert vault_place(other) is None


def test_which_store_is_taken() -> None:
    good = {"one": state(mark(5)), "two": state(mark(4), prepared=mark(5)), "three": state(mark(4), prepared=mark(7))}
    assert judge(good, mark(5)).behind == ("three", "two")
    assert judge(good, mark(5)).next_generation == 8, "a generation that was prepared anywhere is not used again"
    assert judge(good, mark(7)).committed == 5
    for found, why in (
        (None, "is missing"),
        (mark(4), "rolled back"),
        (mark(5, b"other"), "another one"),
        (mark(6), "was not prepared"),
        (mark(7, b"other"), "was not prepared"),
        (mark(8), "was not prepared"),
    ):
        with pytest.raises(StoreRefused, match=why):
            judge(good, found)
    fork = {"one": state(mark(5)), "two": state(mark(5, b"other"))}
    with pytest.raises(BrokersDisagree, match="different stores of generation 5"):
        judge(fork, mark(5))


def test_a_broker_that_makes_something_up_is_not_believed() -> None:
    lies = (
        state(Mark(generation=99, root="ab" * 64)),
        state(mark(98).model_copy(update={"generation": 99})),
        state(mark(5), prepared=Mark(generation=6, root="0" * 128)),
        state(mark(5), reached=Mark(generation=2**53 - 1, root="0" * 128)),
        state(Mark(generation=3, root="")),
        state(mark(5)).model_copy(update={"deal": DEAL.model_copy(update={"number": 2})}),
    )
    for lie in lies:
        assert judge({"one": state(mark(5)), "two": state(mark(5)), "three": lie}, mark(5)).committed == 5
        with pytest.raises(BrokerUnavailable, match="1 of the 2 brokers that are needed"):
            judge({"one": state(mark(5)), "three": lie}, mark(5))
    said = recovery(2, 3)
    knows = recovered(state(mark(5)), said)
    with pytest.raises(BrokerUnavailable, match="does not know of recovery 2"):
        judge({"one": knows, "two": state(mark(5))}, mark(3), said)
    assert judge({"one": knows, "two": knows}, mark(3), said).next_generation == 4
    with pytest.raises(StoreRefused, match="rolled back"):
        judge({"one": knows, "two": knows}, mark(2), said)
    with pytest.raises(StoreRefused, match="was not prepared"):
        judge({"one": knows, "two": knows}, mark(5), said)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ("step", "recovery", "deal", "epoch", "boot", "committed", "prepared", "generation", "root", "k")
                ),
                x,
            )
        ),
    )
)
def test_no_other_value_is_a_state(value: Any) -> None:
    try:
        found = read_state(value)
    except Unusable:
        return
    assert found.to_json() | value == found.to_json()


@settings(max_examples=30, deadline=None)
@given(
    st.builds(VaultCall, st.just(VAULT), st.sampled_from(("prepare", "commit")), st.integers(0, 9), st.just(mark(3)))
)
def test_a_call_reads_back(call: VaultCall) -> None:
    assert read_call(call.to_json()) == call
    with pytest.raises(Unusable):
        read_call({**call.to_json(), "step": "open"})


def test_in_which_epoch_a_vault_is_opened() -> None:
    def after(*epochs: int) -> int:
        return next_epoch({str(n): VaultState(epoch=epoch) for n, epoch in enumerate(epochs)})

    assert [after(), after(0), after(4), after(4, 2), after(7, 4, 2)] == [1, 1, 5, 5, 8]
    assert [after(4, 2**52), after(4, 5, 2**52), after(2**52, 2**52, 4)] == [5, 6, 2**52 + 1]


def test_what_makes_no_deal() -> None:
    for changes in (
        {"k": 1},
        {"brokers": ["one", "three"]},
        {"brokers": ["two", "one", "three"]},
        {"commitments": {}},
        {"brokers": ["one"], "k": 2},
    ):
        with pytest.raises(Unusable, match="this deals no key"):
            DEAL.model_copy(update=changes).split(VAULT)
    whole = Deal(number=1, k=1, brokers=["one"], commitments={})
    assert whole.split(VAULT) is None
    assert agreed_deal({"one": VaultState(deal=whole)}) == whole
    assert agreed_deal({"one": VaultState(deal=DEAL), "two": NEW}) is None
    assert agreed_deal({"one": VaultState(deal=DEAL), "two": VaultState(deal=DEAL)}) == DEAL
