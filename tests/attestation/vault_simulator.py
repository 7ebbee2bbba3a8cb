"""A simulator of brokers that follow the rules of vaults, of the calls to them, and of a host with its disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from attestation.errors import BrokerRefused, BrokerUnavailable
from attestation.fresh_state import FILE
from attestation.vaults import (
    NEW,
    Claim,
    Deal,
    Mark,
    VaultCall,
    VaultState,
    open_reasons,
    opened,
    recovered,
)
from policies.errors import SealwrightError
from policies.vaults import VaultRecovery

VAULT = "borealis-hospital/vault-site/north"
NAMES = ("one", "two", "three")
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own in it; the store syncs each write


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


def never_mounted(key: bytes, fresh: bool) -> Path:
    raise AssertionError("a boot that was overtaken got the key")


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
