"""A vault as a broker's ledger has it: the state in the newest entry about it, under the charter that is followed."""

from __future__ import annotations

from dataclasses import dataclass

from attestation.broker.transaction import Transaction
from attestation.ear import Ear
from attestation.ledger.entry import parse_entry
from attestation.vaults import NEW, VAULT_KIND, VaultState, read_state, recovered
from policies.charter import Charter

KINDS = ("release", VAULT_KIND)
"""The kinds of entries that change a vault's state."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A vault's state, and whether a boot has held the vault before."""

    state: VaultState
    held: bool


def sight(step: Transaction, vault: str, boot: str, charter: Charter) -> Sight:
    """What the ledger says of `vault`, and of `boot` (hex REPORT_ID; empty: of none)."""
    found = [step.last_about(kind, resource=vault) for kind in KINDS]
    states = [read_state(parse_entry(raw).body["state"]) for raw in found if raw is not None]
    newest = max(states, key=lambda state: state.step, default=NEW)
    held = boot != "" and any(step.count(kind, resource=vault, boot=boot) for kind in KINDS)
    return Sight(recovered(newest, charter.recovery(vault)), held)


def boot_of(ear: Ear) -> str:
    """A guest's REPORT_ID in hex; empty if its EAR has none."""
    boot = ear.claims.get("report_id")
    return boot if isinstance(boot, str) else ""
