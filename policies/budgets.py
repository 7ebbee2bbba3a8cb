"""Export budgets: how much a data owner lets out of its sites, over all jobs, and how a debit is decided.

A site has each round's exports debited before they leave, as an entry of kind `export` in one broker's ledger: the
*keeper* of its owner's budget. Every entry carries the sums so far, so that the newest one is the balance: whatever is
restarted, restored or cloned, a balance goes only one way. Two budgets bind, each if it is there: the owner's own
(`members/MEMBER/budget/exports.json`) and the approved bundle's, once for every owner. Broker and auditor decide by the
one function here.

Amounts are whole numbers, so that sums are exact: bits, millionths of epsilon, and 10**-12 of delta. Epsilons and
deltas of rounds and jobs are added up (basic composition; Dwork and Roth 2014, theorem 3.16), which holds whatever the
jobs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.documents import Allowance, Consortium, Digest
from policies.errors import MalformedDocument

EXPORT_KIND: Final = "export"
"""The kind of ledger entry that a debit is."""
MICRO: Final = 10**6
PICO: Final = 10**12
MAX_AMOUNT: Final = 2**53 - 1
"""The largest amount: what every reader of JSON keeps exactly."""

_Count = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]


class Amount(BaseModel):
    """What an export costs, or what exports have cost so far."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: _Count = 0
    micro_epsilon: _Count = 0
    pico_delta: _Count = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount.model_construct(
            bits=self.bits + other.bits,
            micro_epsilon=self.micro_epsilon + other.micro_epsilon,
            pico_delta=self.pico_delta + other.pico_delta,
        )


class Export(BaseModel):
    """What a site asks to be debited: one round of one job, to `recipient` (`server/NAME`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    job: Annotated[str, Field(min_length=1, max_length=96)]
    bundle: Digest
    round: Annotated[int, Field(ge=0, lt=2**31)]
    recipient: Annotated[str, Field(min_length=3, max_length=140)]
    amount: Amount


@dataclass(frozen=True, slots=True)
class Balance:
    """What was spent so far: by an owner in all, and by the owner on one bundle."""

    owner: Amount
    bundle: Amount

    def to_json(self) -> dict[str, Any]:
        """As a ledger entry holds it."""
        return {"bundle": self.bundle.model_dump(), "owner": self.owner.model_dump()}


EMPTY: Final = Balance(Amount(), Amount())


def parse_export(document: dict[str, Any]) -> Export:
    """Check a debit's document. Raises MalformedDocument."""
    try:
        return Export.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:100] or "document"
        raise MalformedDocument(
            f"the export is wrong at {place}: {first['msg']}", where="export", do="See docs/reference/ledger.md."
        ) from error


def keeper(consortium: Consortium, owner: str) -> str:
    """The broker that keeps an owner's balance: the owner's own, the first by name; else the charter's first."""
    brokers = sorted(consortium.brokers, key=lambda broker: (broker.member != owner, broker.name))
    return brokers[0].name


def debit(
    export: Export, spent: Balance, owner: str, own: Allowance | None, approved: Allowance | None
) -> tuple[Balance, tuple[str, ...]]:
    """The balance after `export`, and every reason why it may not be debited (then the balance stays what it was).

    `own` is the owner's budget, `approved` the bundle's; None bounds nothing.
    """
    after = Balance(spent.owner + export.amount, spent.bundle + export.amount)
    reasons = (
        *_exceeded(f"the export budget of {owner}", own, spent.owner, after.owner),
        *_exceeded(f"the budget of {owner} for bundle {export.bundle[:16]}…", approved, spent.bundle, after.bundle),
        *_beyond_count(after),
    )
    return (spent if reasons else after), reasons


def limits_of(allowance: Allowance) -> dict[str, int]:
    """An allowance's limits by an amount's fields, rounded down; what is not limited is not in it."""
    found: dict[str, int] = {}
    if allowance.bits is not None:
        found["bits"] = allowance.bits
    if allowance.epsilon is not None:
        found["micro_epsilon"] = math.floor(allowance.epsilon * MICRO)
    if allowance.delta is not None:
        found["pico_delta"] = math.floor(allowance.delta * PICO)
    return found


def described(amount: Amount) -> str:
    """An amount as people read it."""
    words = [f"{amount.bits} bits"]
    if amount.micro_epsilon or amount.pico_delta:
        words.append(f"ε {amount.micro_epsilon / MICRO:g}, δ {amount.pico_delta / PICO:g}")
    return ", ".join(words)


_SAID: Final = {
    "bits": ("bits", 1),
    "micro_epsilon": ("epsilon", MICRO),
    "pico_delta": ("delta", PICO),
}


def _exceeded(what: str, allowance: Allowance | None, spent: Amount, after: Amount) -> Iterator[str]:
    for field, limit in ({} if allowance is None else limits_of(allowance)).items():
        if getattr(after, field) > limit:
            name, unit = _SAID[field]
            had, cost = getattr(spent, field), getattr(after, field) - getattr(spent, field)
            yield (
                f"{what} is spent: {had / unit:.15g} of {limit / unit:.15g} {name} are used, "
                f"and this round takes {cost / unit:.15g}"
            )


def _beyond_count(after: Balance) -> Iterator[str]:
    if any(value > MAX_AMOUNT for value in after.owner.model_dump().values()):
        yield f"the sum of all exports passes {MAX_AMOUNT}, beyond which nothing is counted"
