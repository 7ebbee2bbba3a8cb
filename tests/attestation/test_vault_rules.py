"""The guest's own code against brokers that follow the rules, die, lose requests and answers; a host that swaps disks.

Whatever happens: a store that `save` has returned for is never gone back behind, of two live clones one stops, and an
honest disk always opens once the brokers are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from attestation.errors import BrokerRefused, BrokersDisagree, BrokerUnavailable, StoreRefused, VaultFenced
from attestation.fresh_state import FILE, Store, derive_keys, is_authentic, store_root
from attestation.guest_vault import GuestVault, open_vault
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
    opened,
    place_reasons,
    prepare_reasons,
    read_call,
    read_state,
    recovered,
)
from policies.errors import SealwrightError, Unusable
from policies.vaults import VaultRecovery, vault_name, vault_place

VAULT = "borealis-hospital/vault-site/north"
NAMES = ("one", "two", "three")
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own in it; the store syncs each write
TROUBLE = st.sampled_from((False, False, True)).flatmap(
    lambda some: st.lists(st.sampled_from(("none", "none", "request lost", "answer lost")), max_size=12 * some)
)
LEFT = st.sampled_from((None,) * 40 + tuple(range(40)))
"""Calls after which the guest is killed."""


class Killed(BaseException):
    """The guest died here."""


@dataclass
class Broker:
    """A broker that keeps one vault by the rules, and the trouble that calls to it meet."""

    name: str
    state: VaultState = NEW
    share: bytes = b""
    held: set[str] = field(default_factory=set)
    down: bool = False


@dataclass
class Network:
    """All brokers, the charter's word on the vault, and what goes wrong next."""

    brokers: dict[str, Broker]
    recovery: VaultRecovery | None = None
    trouble: list[str] = field(default_factory=list)
    left: int | None = None
    """Calls until the guest is killed."""

    def strike(self) -> str:
        return self.trouble.pop() if self.trouble else "none"

    def step(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class Calls:
    """One boot at one broker: what attestation.broker_session does over HTTP."""

    def __init__(self, network: Network, broker: Broker, boot: str) -> None:
        self.network = network
        self.broker = broker
        self.name = broker.name
        self.boot = boot

    def _through(self, work: Callable[[], Any]) -> Any:
        self.network.step()
        trouble = self.network.strike()
        if self.broker.down or trouble == "request lost":
            raise BrokerUnavailable("out of reach", where=self.name)
        self.broker.state = recovered(self.broker.state, self.network.recovery)
        value = work()
        self.network.step()
        if trouble == "answer lost":
            raise BrokerUnavailable("no answer", where=self.name)
        return value

    def look(self, vault: str) -> tuple[VaultState, bytes]:
        found: tuple[VaultState, bytes] = self._through(lambda: (self.broker.state, b"kem"))
        return found

    def open_vault(self, vault: str, epoch: int) -> tuple[bytes, VaultState]:
        def work() -> tuple[bytes, VaultState]:
            claim = self._claim(epoch)
            self._take(open_reasons(vault, self.broker.state, claim), opened(self.broker.state, claim))
            return self.broker.share, self.broker.state

        found: tuple[bytes, VaultState] = self._through(work)
        return found

    def deposit_share(self, vault: str, epoch: int, deal: Deal, share: bytes, kem: bytes) -> None:
        def work() -> None:
            self._take(*VaultCall(vault, "deposit", epoch, deal).outcome(self.broker.state, self._claim(epoch)))
            self.broker.share = share

        self._through(work)

    def mark(self, step: Any, vault: str, mark: Mark) -> None:
        call = VaultCall(vault, step, 0, mark)
        self._through(lambda: self._take(*call.outcome(self.broker.state, self._claim(0))))

    def _claim(self, epoch: int) -> Claim:
        return Claim(self.boot, epoch, self.boot in self.broker.held)

    def _take(self, reasons: tuple[str, ...], after: VaultState) -> None:
        if reasons:
            raise BrokerRefused(reasons, where=self.name)
        self.broker.state = after
        self.broker.held.add(self.boot)


class Session:
    """One boot of the guest, attested to every broker."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.boot = os.urandom(32).hex()
        self.init = SimpleNamespace(brokers=[SimpleNamespace(name=name) for name in network.brokers])
        subject = SimpleNamespace(role="site", name="north", member="borealis-hospital")
        self.ear = SimpleNamespace(claims={"report_id": self.boot}, subject=subject)

    @property
    def charter(self) -> Any:
        recovery = self.network.recovery
        return SimpleNamespace(
            broker=self.network.brokers.get,
            recovery=lambda vault: recovery,
            recoveries=lambda: () if recovery is None else (recovery,),
        )

    def ask_each(self, names: Any, question: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        answers, failures = {}, {}
        for name in names:
            try:
                answers[name] = question(Calls(self.network, self.network.brokers[name], self.boot))
            except SealwrightError as error:
                failures[name] = error
        return answers, failures

    def record(self, kind: str, document: Mapping[str, Any]) -> None:
        """Nothing is kept here."""


class Disk:
    """The volume's folder, and every store that it ever had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[bytes | None] = [None]
        self.newest: bytes | None = None
        self.abandoned: set[bytes] = set()
        """Stores that a recovery has given up."""
        self.fresh = False

    def mount(self, key: bytes, fresh: bool) -> Path:
        self.fresh = fresh
        if fresh:
            self.put(None)
        return self.folder

    def put(self, raw: bytes | None) -> None:
        (self.folder / FILE).unlink(missing_ok=True)
        if raw is not None:
            (self.folder / FILE).write_bytes(raw)

    def note(self, *, keep: bool) -> None:
        """Remember what is on the disk now; `keep`: as the one that an honest host shows next."""
        path = self.folder / FILE
        raw = path.read_bytes() if path.exists() else None
        self.newest = raw if keep else self.newest
        if raw not in self.history:
            self.history.append(raw)


class Vaults(RuleBasedStateMachine):
    """Boots, saves, crashes, clones, outages, swapped disks, recoveries, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.disk = Disk(Path(self.temporary.name))
        self.network = Network({})
        self.vault: GuestVault | None = None
        self.clones: list[GuestVault] = []
        self.acknowledged: tuple[int, Mapping[str, bytes] | None] = (0, {})
        self.swapped = False
        self.token = 0
        self.stores: dict[int, bytes | None] = {0: None}

    def teardown(self) -> None:
        self.temporary.cleanup()

    @initialize(count=st.sampled_from((3, 3, 3, 2, 1)), made=st.sampled_from((True, True, False)))
    def begin(self, count: int, made: bool) -> None:
        self.network.brokers = {name: Broker(name) for name in NAMES[:count]}
        if made:
            self._boot([], None, 0)
            self.save([], None, 2)

    @rule(down=st.sampled_from(((), (), (), ("one",), ("two",), ("three",), ("two", "three"))))
    def outage(self, down: tuple[str, ...]) -> None:
        for name, broker in self.network.brokers.items():
            broker.down = name in down

    @rule(trouble=TROUBLE, left=LEFT, back=st.integers(0, 6))
    def boot(self, trouble: list[str], left: int | None, back: int) -> None:
        """The guest dies, if it lives, and starts anew; of its disk the host may show any older state."""
        self._boot(trouble, left, back)

    def _boot(self, trouble: list[str], left: int | None, back: int) -> None:
        older = back > 2
        shown = self.disk.history[-min(back - 1, len(self.disk.history))] if older else self.disk.newest
        self.disk.put(shown)
        well = not trouble and left is None and not any(one.down for one in self.network.brokers.values())
        if self.vault is not None:
            self.clones.append(self.vault)  # the host may keep it running
        self.vault = None
        self.network.trouble, self.network.left = list(trouble), left
        allowed = True
        try:
            self.vault = open_vault(Session(self.network), self.disk.mount)  # type: ignore[arg-type]
        except StoreRefused:
            allowed = older or self.swapped
        except (BrokerUnavailable, BrokerRefused, Killed):
            allowed = not well
            self.swapped = self.swapped or older  # what became of that disk is the host's affair
        finally:
            self.network.trouble, self.network.left = [], None
            self.disk.note(keep=not older or self.vault is not None)
        assert allowed, "an honest disk is refused although all brokers are there"
        self.swapped = self.swapped or (older and self.vault is not None)
        if self.vault is not None:
            assert self.disk.fresh or shown not in self.disk.abandoned, "a store that was given up"
            generation, entries = self.acknowledged
            assert self.vault.generation >= generation, "rolled back"
            if self.vault.generation == generation and entries is not None:
                assert self.vault.entries == entries
            self.acknowledged = (self.vault.generation, self.vault.entries)
            self.stores[self.vault.generation] = self.disk.newest

    @precondition(lambda self: self.vault is not None)
    @rule(trouble=TROUBLE, left=LEFT, more=st.integers(0, 2))
    def save(self, trouble: list[str], left: int | None, more: int) -> None:
        assert self.vault is not None
        for _ in range(more):
            self._save([], None)
            if self.vault is None:
                return
        self._save(trouble, left)

    def _save(self, trouble: list[str], left: int | None) -> None:
        assert self.vault is not None
        self.token += 1
        entries = {"token": str(self.token).encode()}
        self.network.trouble, self.network.left = list(trouble), left
        try:
            self.vault.save(entries)
            self.acknowledged = (self.vault.generation, entries)
        except BrokerUnavailable:
            pass
        except Killed:
            self.vault = None
        finally:
            self.network.trouble, self.network.left = [], None
            self.disk.note(keep=True)
        if self.vault is not None and self.acknowledged[0] == self.vault.generation:
            self.stores[self.vault.generation] = self.disk.newest

    @precondition(lambda self: self.vault is not None and bool(self.clones))
    @rule(data=st.data())
    def clone_goes_on(self, data: st.DataObject) -> None:
        """An older boot that the host kept alive, with a disk of its own."""
        clone = data.draw(st.sampled_from(self.clones))
        before = (self.disk.folder / FILE).read_bytes()
        with pytest.raises((VaultFenced, BrokerUnavailable)):
            clone.save({"token": b"the clone's"})
        assert (self.disk.folder / FILE).read_bytes() == before, "a fenced clone wrote"
        with pytest.raises((VaultFenced, BrokerUnavailable)):
            clone.check()
        with pytest.raises((VaultFenced, BrokerUnavailable)):
            open_vault(clone._session, never_mounted)

    @precondition(lambda self: len(self.stores) > 1)
    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        """The disk is lost; the members let the vault go on from a copy of it, or from nothing."""
        generation = data.draw(st.sampled_from(sorted(self.stores)))
        number = 1 if self.network.recovery is None else self.network.recovery.number + 1
        self.network.recovery = recovery(number, generation)
        self.disk.newest = self.stores[generation]
        self.disk.abandoned |= {raw for raw in self.disk.history if raw is not None}
        self.disk.abandoned -= {self.disk.newest}
        self.stores = {generation: self.stores[generation], 0: None}
        self.acknowledged = (generation, None)
        self.swapped = False
        self.vault = None

    @invariant()
    def one_holder(self) -> None:
        states = [broker.state for broker in self.network.brokers.values()]
        deal = agreed_deal({broker.name: broker.state for broker in self.network.brokers.values()})
        if self.vault is not None and deal is not None:
            assert sum(state.boot == boot_of(self.vault) for state in states) >= deal.k


def never_mounted(key: bytes, fresh: bool) -> Path:
    raise AssertionError("a boot that was overtaken got the key")


def boot_of(vault: GuestVault) -> str:
    return str(vault._session.ear.claims["report_id"])


def recovery(number: int, generation: int, to: str = "north") -> VaultRecovery:
    return VaultRecovery(
        role="site",
        name="north",
        member="borealis-hospital",
        number=number,
        generation=generation,
        to_role="site",
        to_name=to,
    )


TestVaults = Vaults.TestCase
TestVaults.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# --- every step at which a guest can die ------------------------------------------------------------------------------


def begun(folder: Path) -> tuple[Network, Disk, GuestVault]:
    """A vault at three brokers with one value in it."""
    network, disk = Network({name: Broker(name) for name in NAMES}), Disk(folder)
    vault = boot(network, disk)
    vault.save({"n": b"1"})
    return network, disk, vault


def boot(network: Network, disk: Disk) -> GuestVault:
    network.trouble, network.left = [], None
    return open_vault(Session(network), disk.mount)  # type: ignore[arg-type]


def killed(network: Network, left: int, work: Callable[[], object]) -> bool:
    """Do this and be killed at this call of it; whether it was."""
    network.left = left
    try:
        work()
    except Killed:
        return True
    finally:
        network.left = None
    return False


@pytest.mark.parametrize("lost", ["request lost", "answer lost"])
def test_killed_at_any_step_after_a_commit_that_failed(tmp_path: Path, lost: str) -> None:
    """What is on the disk is committed before anything else is prepared: else neither would be known."""
    for left in range(1000):
        network, disk, vault = begun(tmp_path)
        network.trouble = [lost] * 3 + [
            "none"
        ] * 3  # from its end: prepared at all, committed, as far as is told, at none
        with pytest.raises(BrokerUnavailable):
            vault.save({"n": b"2"})
        died = killed(network, left, lambda vault=vault: vault.save({"n": b"3"}))
        again = boot(network, disk)
        assert again.entries["n"] in ((b"2", b"3") if died else (b"3",)), left
        if not died:
            return
    pytest.fail("it did not end")


@pytest.mark.parametrize("away", ["one", "two", "three", None])
def test_killed_at_any_step_of_taking_a_store_up(tmp_path: Path, away: str | None) -> None:
    """A boot that finds a store which was prepared and not committed may die at any step; so may the one after it."""
    for left in range(1000):
        network, disk, vault = begun(tmp_path)
        network.trouble = ["request lost"] * 3 + ["none"] * 3
        with pytest.raises(BrokerUnavailable):
            vault.save({"n": b"2"})
        if away is not None:
            network.brokers[away].down = True
        died = killed(network, left, lambda: open_vault(Session(network), disk.mount))  # type: ignore[arg-type] # noqa: B023
        for name in NAMES:
            network.brokers[name].down = False
        again = boot(network, disk)
        assert again.entries == {"n": b"2"}
        died = killed(network, left, lambda again=again: again.save({"n": b"3"})) or died
        assert boot(network, disk).entries["n"] in (b"2", b"3")
        if not died:
            return
    pytest.fail("it did not end")


def test_a_generation_is_never_used_twice(tmp_path: Path) -> None:
    """The host shows the disk of before a save that was prepared and not committed: both are good until one is."""
    network, disk, vault = begun(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    network.trouble = ["request lost"] * 2 + ["none"] * 4  # committed at one
    with pytest.raises(BrokerUnavailable):
        vault.save({"n": b"2"})
    other = (tmp_path / FILE).read_bytes()
    ahead = next(broker for broker in network.brokers.values() if broker.state.committed.generation == 3)
    disk.put(old)
    ahead.down = True
    again = boot(network, disk)
    assert again.entries == {"n": b"1"}
    again.save({"n": b"another 2"})
    ahead.down = False
    assert boot(network, disk).entries == {"n": b"another 2"}
    disk.put(other)
    with pytest.raises(StoreRefused, match="rolled back"):
        boot(network, disk)


def test_a_key_that_comes_back_as_another_is_no_key(tmp_path: Path) -> None:
    network = Network({"one": Broker("one")})
    opening = Calls.open_vault

    def swapped(self: Calls, vault: str, epoch: int) -> tuple[bytes, VaultState]:
        return bytes(32), opening(self, vault, epoch)[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calls, "open_vault", swapped)
        with pytest.raises(BrokerRefused, match="is not the one that was deposited"):
            open_vault(Session(network), never_mounted)  # type: ignore[arg-type]


# --- the rules one by one ---------------------------------------------------------------------------------------------

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
