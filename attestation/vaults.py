"""What brokers remember of a vault, as functions without I/O: who holds it, and which store of it is the newest.

A vault is a sealed volume of one guest. Its key is made in the guest and dealt out to brokers. Inside the volume lies
a small store (attestation.fresh_state) with a generation, which grows with each change, and a root over its content.
Each broker that has a share of the key (its holders) keeps one `VaultState` and changes it by these rules alone:

1. *Deposit.* The guest deals its key out while nothing is committed yet; later there is one key for good.
2. *Fence.* Whoever deposits or opens names its epoch and its REPORT_ID (its boot). The claim that is higher, epoch
   first, holds the vault from then on. A boot that held it and was overtaken never holds it again.
3. *Prepare* (g, root), by the holder: no generation below the committed one, nor another root of the same.
4. *Commit* (g, root), by the holder, of what was prepared.
5. *Recovery.* A document that the charter's threshold signed takes the place of what was committed, once.

The guest prepares at k of the holders, writes its disk, and commits at k of them, k being more than half: so any k
holders know of each store that was ever written, and no generation is used twice, not even after a recovery. When it
starts, k holders say what was committed; its disk has to hold that or what was prepared after it (`judge_store`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from attestation.errors import BrokersDisagree, BrokerUnavailable, StoreRefused
from attestation.messages import Message, check_message
from attestation.split import share_complaint
from policies.charter import Charter
from policies.charter.content import split_complaints
from policies.documents import Digest, Name, Split
from policies.errors import Unusable
from policies.vaults import VaultRecovery, vault_place

VAULT_KIND: Final = "vault"
"""The ledger's kind of entry for what is done to a vault."""
KEY_SIZE: Final = 32
"""Bytes of a vault's key."""
LEAP: Final = 2**20
"""How far the epochs that honest brokers tell of may lie apart: one that was away missed fewer boots."""
MAX_GENERATION: Final = 2**53 - 1
Generation = Annotated[int, Field(ge=0, le=MAX_GENERATION)]
Root = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{128})?$")]
"""A store's root (attestation.fresh_state.store_root) in hex; empty where nothing is said of it."""
Boot = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
"""A REPORT_ID in hex."""


class Deal(Message):
    """How a vault's key lies: any `k` of `brokers` join it, more than half of them.

    `number` grows with each deal of a vault. `commitments` are those of a `Split`; with one broker, which has the key
    whole, there are none.
    """

    number: Annotated[int, Field(ge=1, lt=2**31)]
    k: Annotated[int, Field(ge=1, le=16)]
    brokers: Annotated[list[Name], Field(min_length=1, max_length=16)]
    commitments: Annotated[dict[Name, Digest], Field(max_length=16)] = Field(default_factory=dict)

    def split(self, vault: str) -> Split | None:
        """The same as a split resource's document; None if one broker has the key. Raises Unusable for what is none."""
        if len(self.brokers) == 1 and self.k == 1 and not self.commitments:
            return None
        member, kind, tag = vault.split("/")
        try:
            return Split(
                member=member,
                type=kind,
                tag=tag,
                k=self.k,
                brokers=tuple(self.brokers),
                generation=self.number,
                commitments=dict(self.commitments),
            )
        except ValidationError as error:
            why = error.errors(include_url=False, include_input=False)[0]["msg"]
            do = "Deal the key out to brokers, more than half of which join it."
            raise Unusable(f"this deals no key: {why}", where=vault, do=do) from error


class Mark(Message):
    """One store: its generation and its root."""

    generation: Generation
    root: Root


class VaultState(Message):
    """What one broker remembers of a vault. `step` counts what was done to it, `boot` holds it since `epoch`; of all
    stores that were ever prepared, `reached` has the highest generation."""

    step: Annotated[int, Field(ge=0, lt=2**53)] = 0
    recovery: Annotated[int, Field(ge=0, lt=2**31)] = 0
    deal: Deal | None = None
    epoch: Annotated[int, Field(ge=0, lt=2**53)] = 0
    boot: Boot = ""
    committed: Mark = Mark(generation=0, root="")
    prepared: Mark | None = None
    reached: Mark = Mark(generation=0, root="")

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return self.model_dump(mode="json")


NEW: Final = VaultState()
"""A vault of which nothing is known."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who wants to hold a vault: its boot, the epoch that it names, and whether this boot has held it before."""

    boot: str
    epoch: int
    held: bool


def read_state(value: Any) -> VaultState:
    """Check JSON values that should be a state. Raises Unusable."""
    if not isinstance(value, dict):
        raise Unusable("this is no state of a vault", where="vault", do="See docs/reference/broker-http.md.")
    return check_message(VaultState, value)


# --- a broker's rules -------------------------------------------------------------------------------------------------


def recovered(state: VaultState, recovery: VaultRecovery | None) -> VaultState:
    """The state that counts under a charter with this recovery of the vault: each number once, none after a later."""
    if recovery is None or recovery.number <= state.recovery:
        return state
    committed = Mark(generation=recovery.generation, root="")
    reached = state.reached if recovery.generation else committed
    changes = {"recovery": recovery.number, "committed": committed, "prepared": None, "reached": reached}
    return state.model_copy(update=changes)


def place_reasons(vault: str, role: str, name: str, member: str, charter: Charter) -> tuple[str, ...]:
    """Why the guest of this place and member is not the one whose vault this is."""
    place = vault_place(vault)
    if place is None:
        return (f"{vault} is no vault's name",)
    recovery = charter.recovery(vault)
    if recovery is not None:
        return () if (role, name) == (recovery.to_role, recovery.to_name) else (_not_theirs(vault, role, name),)
    own = (role, name) == place and member == vault.partition("/")[0]
    return () if own else (_not_theirs(vault, role, name),)


def _not_theirs(vault: str, role: str, name: str) -> str:
    return f"{vault} is not the vault of {role} {name}"


def fenced(vault: str) -> str:
    """The reason by which a broker says that a newer boot of a guest holds its vault, so that the older one stops."""
    return f"a newer boot of this guest holds the vault {vault}: this one stops"


def claim_reasons(vault: str, state: VaultState, claim: Claim) -> tuple[str, ...]:
    """Rule 2: why a boot cannot hold the vault."""
    ours = state.boot == claim.boot
    if (claim.epoch, claim.boot) < (state.epoch, state.boot) or (claim.held and not ours):
        return (fenced(vault),)
    return ()


def deposit_reasons(vault: str, state: VaultState, claim: Claim, deal: Deal) -> tuple[str, ...]:
    """Rule 1: why a vault's key is not taken."""
    reasons = list(claim_reasons(vault, state, claim))
    if state.committed.generation > 0:
        said = f"its store of generation {state.committed.generation} was committed"
        reasons.append(f"the vault {vault} has a key already, and {said}: it begins anew by a recovery only")
    if state.deal is not None and deal.number <= state.deal.number:
        reasons.append(f"the key's deal {deal.number} is not above the last ({state.deal.number})")
    return tuple(reasons)


def deposited(state: VaultState, claim: Claim, deal: Deal) -> VaultState:
    """The state after a deposit."""
    return _next(state, deal=deal, epoch=claim.epoch, boot=claim.boot, prepared=None, reached=NEW.reached)


def open_reasons(vault: str, state: VaultState, claim: Claim) -> tuple[str, ...]:
    """Why the vault's key is not given to a boot, its owner's policy apart."""
    if state.deal is None:
        return (f"no key of the vault {vault} was deposited at this broker",)
    return claim_reasons(vault, state, claim)


def opened(state: VaultState, claim: Claim) -> VaultState:
    """The state after the key was given."""
    return _next(state, epoch=claim.epoch, boot=claim.boot)


def prepare_reasons(vault: str, state: VaultState, boot: str, mark: Mark) -> tuple[str, ...]:
    """Rule 3: why a store cannot be prepared."""
    if state.boot != boot:
        return (fenced(vault),)
    if mark.generation < max(1, state.committed.generation):
        said = f"generation {mark.generation}, and {state.committed.generation} was committed"
        return (f"the store of {vault} has {said}: it was rolled back",)
    if mark.root == "":
        return ("a store is prepared by its root",)
    if mark.generation == state.committed.generation and state.committed.root not in ("", mark.root):
        return (f"another store of generation {mark.generation} of {vault} was committed",)
    return ()


def prepared(state: VaultState, mark: Mark) -> VaultState:
    """The state after a store was prepared."""
    reached = mark if mark.generation > state.reached.generation else state.reached
    return _next(state, prepared=mark, reached=reached)


def commit_reasons(vault: str, state: VaultState, boot: str, mark: Mark) -> tuple[str, ...]:
    """Rule 4: why a store cannot be committed."""
    if state.boot != boot:
        return (fenced(vault),)
    if mark.root == "" or mark not in (state.prepared, state.committed):
        return (f"the store of generation {mark.generation} of {vault} was not prepared with this root",)
    return ()


def committed(state: VaultState, mark: Mark) -> VaultState:
    """The state after a store was committed."""
    return _next(state, committed=mark, prepared=None if state.prepared == mark else state.prepared)


def _next(state: VaultState, **changes: Any) -> VaultState:
    return state.model_copy(update={**changes, "step": state.step + 1})


@dataclass(frozen=True, slots=True)
class VaultCall:
    """What a guest asks of one broker for its vault; to open it is a release, and not among these."""

    vault: str
    step: Literal["deposit", "prepare", "commit"]
    epoch: int
    asked: Deal | Mark

    def to_json(self) -> dict[str, Any]:
        """As the ledger has it."""
        return {
            "asked": self.asked.model_dump(mode="json"),
            "epoch": self.epoch,
            "step": self.step,
            "vault": self.vault,
        }

    def outcome(self, state: VaultState, claim: Claim) -> tuple[tuple[str, ...], VaultState]:
        """Every reason against it by the rules above, and the state after it."""
        if isinstance(self.asked, Deal):
            return deposit_reasons(self.vault, state, claim, self.asked), deposited(state, claim, self.asked)
        if self.step == "prepare":
            return prepare_reasons(self.vault, state, claim.boot, self.asked), prepared(state, self.asked)
        return commit_reasons(self.vault, state, claim.boot, self.asked), committed(state, self.asked)


def read_call(body: Mapping[str, Any]) -> VaultCall:
    """What `VaultCall.to_json` has written into an entry. Raises Unusable, KeyError."""
    step, asked = body["step"], body["asked"]
    if step == "deposit":
        return VaultCall(body["vault"], step, body["epoch"], check_message(Deal, asked))
    if step in ("prepare", "commit"):
        return VaultCall(body["vault"], step, body["epoch"], check_message(Mark, asked))
    raise Unusable(f"{step!r} is nothing that is done to a vault", where="vault", do="Do not rely on it.")


def deal_reasons(vault: str, deal: Deal, broker: str, share: bytes | None, charter: Charter) -> tuple[str, ...]:
    """Why a deal of a vault's key is not one that this broker takes part in. `share` None: it is not at hand.

    Where a charter has several brokers, none of them and none of the members that run them has a key whole. Raises
    Unusable for what is no deal.
    """
    split, consortium = deal.split(vault), charter.consortium
    reasons = [f"the charter has no broker {name}" for name in deal.brokers if charter.broker(name) is None]
    if broker not in deal.brokers:
        reasons.append(f"the deal gives {broker} no share of {vault}")
    if charter.release_policy(vault) is None:
        reasons.append(f"its owner has no release policy for {vault}, so that it could never be opened")
    if split is None and len(consortium.brokers) > 1:
        reasons.append("the charter has several brokers, and no one of them has a vault's key whole")
    if split is None:
        complaint = f"a vault's key has {KEY_SIZE} bytes" if share is not None and len(share) != KEY_SIZE else None
    else:
        reasons += split_complaints(split, consortium)
        complaint = None if share is None or broker not in split.brokers else share_complaint(split, broker, share)
    return (*reasons, complaint) if complaint else tuple(reasons)


# --- the guest's judgement --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """What k holders say: the newest committed generation, the generation that the next store has, and which of the
    holders do not have the store that was found committed."""

    committed: int
    next_generation: int
    behind: tuple[str, ...]


def agreed_deal(states: Mapping[str, VaultState]) -> Deal | None:
    """The newest deal that as many of its own brokers tell of as join it; None if there is none."""
    deals = [state.deal for name, state in states.items() if state.deal is not None and name in state.deal.brokers]
    whole = [deal for deal in deals if deals.count(deal) >= deal.k]
    return max(whole, key=lambda deal: deal.number, default=None)


def next_epoch(states: Mapping[str, VaultState]) -> int:
    """The epoch in which a boot opens a vault: above all that brokers tell of.

    One that is far above what more than half of them tell of is passed over, so that no broker alone uses up all that
    there are.
    """
    told = sorted((state.epoch for state in states.values()), reverse=True)
    if not told:
        return 1
    most = told[len(told) // 2] + LEAP
    return max(epoch for epoch in told if epoch <= most) + 1


def highest(states: Mapping[str, VaultState]) -> int:
    """The highest generation that any of them has committed."""
    return max((state.committed.generation for state in states.values()), default=0)


def judge_store(
    vault: str,
    deal: Deal,
    states: Mapping[str, VaultState],
    recovery: VaultRecovery | None,
    found: Mark | None,
    authentic: Callable[[Mark], bool],
) -> Judged:
    """Whether the store that a guest found in its volume (None: there is none) is one that its brokers accept.

    `states` are those of holders that have given this boot the key; `authentic` knows the marks that were made with it,
    so that a broker makes none up. Raises StoreRefused for a store that is older than what was committed, or another;
    BrokerUnavailable if fewer than k holders can be believed; BrokersDisagree.
    """
    good, against = _believed(deal, states, recovery, authentic)
    if len(good) < deal.k:
        told = tuple(f"{name}: {why}" for name, why in sorted(against.items()))
        reasons = (f"{vault}: {len(good)} of the {deal.k} brokers that are needed tell its state", *told)
        raise BrokerUnavailable("; ".join(reasons), where="brokers", reasons=reasons)
    newest = highest(good)
    roots = {s.committed.root for s in good.values() if s.committed.generation == newest} - {""}
    if len(roots) > 1:
        raise BrokersDisagree((f"{vault}: brokers have committed different stores of generation {newest}",))
    if found is None:
        if newest > 0:
            raise StoreRefused((f"its store is missing, and generation {newest} was committed",), vault=vault)
        found = Mark(generation=0, root="")
    if found.generation < newest:
        what = f"its store has generation {found.generation}, and {newest} was committed: the disk was rolled back"
        raise StoreRefused((what,), vault=vault)
    if found.generation == newest and roots and found.root not in roots:
        raise StoreRefused((f"its store is another one than was committed as generation {newest}",), vault=vault)
    if found.generation > newest and all(state.prepared != found for state in good.values()):
        what = f"its store has generation {found.generation}, which was not prepared at its brokers"
        raise StoreRefused((what,), vault=vault)
    return Judged(
        newest,
        max(mark.generation for state in good.values() for mark in (found, *_marks(state))) + 1,
        tuple(name for name in deal.brokers if name not in good or good[name].committed != found),
    )


def _believed(
    deal: Deal,
    states: Mapping[str, VaultState],
    recovery: VaultRecovery | None,
    authentic: Callable[[Mark], bool],
) -> tuple[dict[str, VaultState], dict[str, str]]:
    """The states that can be believed, and what is against the others."""
    number = 0 if recovery is None else recovery.number
    good: dict[str, VaultState] = {}
    against: dict[str, str] = {}
    for name in deal.brokers:
        state = states.get(name)
        if state is None:
            against[name] = "it has not answered"
        elif state.deal != deal:
            against[name] = "it has another deal of the key"
        elif state.recovery < number:
            against[name] = f"it does not know of recovery {number}"
        elif not all(_made(mark, recovery, authentic) for mark in _marks(state)):
            against[name] = "it tells of a store that this guest never made"
        else:
            good[name] = state
    return good, against


def _marks(state: VaultState) -> tuple[Mark, ...]:
    return (state.committed, state.reached, *(() if state.prepared is None else (state.prepared,)))


def _made(mark: Mark, recovery: VaultRecovery | None, authentic: Callable[[Mark], bool]) -> bool:
    if mark.root == "":  # nothing yet, or what the members have said
        return mark.generation in (0, 0 if recovery is None else recovery.generation)
    return authentic(mark)
