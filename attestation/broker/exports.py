"""Export budgets at their keeper: an owner's balance as the ledger has it, and what is against a debit."""

from __future__ import annotations

from typing import Any

from attestation.broker import journal
from attestation.broker.transaction import Transaction
from attestation.ear import Ear
from attestation.ledger.entry import parse_entry
from policies.budgets import EXPORT_KIND, Amount, Balance, Export, debit
from policies.charter import Charter


def balance(step: Transaction, owner: str, bundle: str) -> Balance:
    """What the newest entries say was spent, by the owner in all and on this bundle."""
    resource = journal.balance_of(owner)
    return Balance(
        _spent(step.last_about(EXPORT_KIND, resource=resource), "owner"),
        _spent(step.last_about(EXPORT_KIND, resource=resource, boot=bundle), "bundle"),
    )


def _spent(raw: bytes | None, what: str) -> Amount:
    if raw is None:
        return Amount()
    spent: Any = parse_entry(raw).body["spent"][what]
    return Amount.model_validate(spent)


def export_reasons(ear: Ear, kept_by: str, here: str) -> tuple[str, ...]:
    """Why this guest's exports are not for this broker to debit."""
    reasons = []
    if ear.subject.role != "site":
        reasons.append(f"{journal.place(ear.subject)} is no site, and has nothing to export")
    if kept_by != here:
        reasons.append(f"the export budget of {ear.subject.member} is kept by broker {kept_by}, not by {here}")
    return tuple(reasons)


def decide_export(charter: Charter, owner: str, content: Export, spent: Balance) -> tuple[Balance, tuple[str, ...]]:
    """The balance after an export, and every reason against it, by the charter's budgets."""
    approval = charter.bundle(content.bundle)
    if approval is None:
        return spent, (f"the bundle {content.bundle} is not approved in charter version {charter.version}",)
    return debit(content, spent, owner, charter.export_budget(owner), approval.budget)
