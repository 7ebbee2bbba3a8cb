"""Making a ledger's decisions over vaults again: each state must follow from the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attestation.broker.releases import not_opening, opening_outcome
from attestation.broker.vault_states import boot_of
from attestation.ear import Ear
from attestation.vaults import NEW, Claim, Deal, VaultState, deal_reasons, place_reasons, read_call, recovered
from policies.charter import Charter
from policies.vaults import vault_place


class VaultRetrial:
    """What a broker had to know of each vault, from entry to entry."""

    def __init__(self) -> None:
        self._states: dict[str, VaultState] = {}
        self._held: set[tuple[str, str]] = set()

    def opening(self, body: Mapping[str, Any], ear: Ear, charter: Charter) -> list[str]:
        """Why this release of a vault's key does not follow."""
        vault, before = body["resource"], self._before(body["resource"], charter)
        against, after = self._opening(body, ear, charter)
        reasons = [f"it should not have been released: {reason}" for reason in against]
        if before.deal is None or body["serial"] != before.deal.number:
            reasons.append(f"deal {body['serial']} of {vault} is not the last one before it")
        return reasons + self._took(vault, ear, body, after)

    def opening_denial(self, body: Mapping[str, Any], ear: Ear, charter: Charter) -> tuple[str, ...]:
        """What was against a release of this resource, if it is a vault's key."""
        return () if vault_place(body["resource"]) is None else self._opening(body, ear, charter)[0]

    def call(self, body: Mapping[str, Any], ear: Ear, broker: str, charter: Charter) -> list[str]:
        """Why this deposit, preparation or commit does not follow."""
        against, after = self._outcome(body, ear, broker, charter)
        reasons = [f"it should not have been done: {reason}" for reason in against]
        return reasons + self._took(body["vault"], ear, body, after)

    def call_denial(self, body: Mapping[str, Any], ear: Ear, broker: str, charter: Charter) -> tuple[str, ...]:
        """What was against such a call."""
        return self._outcome(body, ear, broker, charter)[0]

    def _opening(self, body: Mapping[str, Any], ear: Ear, charter: Charter) -> tuple[tuple[str, ...], VaultState]:
        vault, epoch = body["resource"], body.get("epoch")
        state = self._before(vault, charter)
        if epoch is None:
            return (not_opening(vault),), state
        return opening_outcome(vault, ear, epoch, state, (vault, boot_of(ear)) in self._held, charter)

    def _outcome(
        self, body: Mapping[str, Any], ear: Ear, broker: str, charter: Charter
    ) -> tuple[tuple[str, ...], VaultState]:
        call, subject, boot = read_call(body), ear.subject, boot_of(ear)
        claim = Claim(boot, call.epoch, (call.vault, boot) in self._held)
        against, after = call.outcome(self._before(call.vault, charter), claim)
        place = place_reasons(call.vault, subject.role, subject.name, subject.member, charter)
        deal = deal_reasons(call.vault, call.asked, broker, None, charter) if isinstance(call.asked, Deal) else ()
        return (*place, *deal, *against), after

    def _before(self, vault: str, charter: Charter) -> VaultState:
        return recovered(self._states.get(vault, NEW), charter.recovery(vault))

    def _took(self, vault: str, ear: Ear, body: Mapping[str, Any], after: VaultState) -> list[str]:
        self._states[vault] = after
        self._held.add((vault, boot_of(ear)))
        return [] if body["state"] == after.to_json() else ["its vault's state is not the one that follows"]
