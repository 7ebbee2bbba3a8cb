"""The guest's own code against brokers that follow the rules, die, lose requests and answers; a host that swaps disks.

Whatever happens: a store that `save` has returned for is never gone back behind, of two live clones one stops, and an
honest disk always opens once the brokers are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vault_simulator import MEMORY, NAMES, Broker, Calls, Disk, Killed, Network, Session, never_mounted, recovery

from attestation.errors import BrokerRefused, BrokerUnavailable, StoreRefused, VaultFenced
from attestation.fresh_state import FILE
from attestation.guest_vault import GuestVault, open_vault
from attestation.vaults import (
    VaultState,
    agreed_deal,
)

TROUBLE = st.sampled_from((False, False, True)).flatmap(
    lambda some: st.lists(st.sampled_from(("none", "none", "request lost", "answer lost")), max_size=12 * some)
)
LEFT = st.sampled_from((None,) * 40 + tuple(range(40)))
"""Calls after which the guest is killed."""


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


def boot_of(vault: GuestVault) -> str:
    return str(vault._session.ear.claims["report_id"])


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
