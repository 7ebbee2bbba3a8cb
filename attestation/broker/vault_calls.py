"""Vaults at a broker: what the ledger says of one, and what guests do to theirs (the rules are attestation.vaults').

The state of a vault stands in the newest entry about it, as its counters do in their entries; so a database that comes
back from a copy knows no more than its ledger, and what k brokers say decides.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.broker import journal
from attestation.broker.keks import seal_resource
from attestation.broker.releases import Authorise
from attestation.broker.service import Broker, Ruling
from attestation.broker.sessions import Session
from attestation.broker.transaction import StoredResource, Transaction
from attestation.broker.vault_states import boot_of, sight
from attestation.ear import Ear
from attestation.errors import BrokerRefused
from attestation.hybrid import PRIVATE_SIZE, HybridPrivateKey
from attestation.ledger.receipt import Receipt
from attestation.split import kept_as
from attestation.vault_messages import deposit_info
from attestation.vaults import Claim, Deal, Mark, VaultCall, VaultState, deal_reasons, place_reasons
from policies.charter import Charter

_KEM: Final = b"sealwright-broker-kem-v1"


@dataclass(frozen=True, slots=True)
class Done:
    """What was done to a vault: its state afterwards, and the entry."""

    state: VaultState
    entry: bytes
    receipt: Receipt


def kem_key(broker: Broker) -> HybridPrivateKey:
    """The key to which guests seal what they deposit: made from the broker's signing key, so that every process of the
    broker has it and nothing more has to be kept."""
    return _kem_key(broker.following.keys.signing.private_bytes_raw())


@lru_cache(maxsize=4)
def _kem_key(secret: bytes) -> HybridPrivateKey:
    return HybridPrivateKey.from_bytes(HKDF(hashes.SHA256(), PRIVATE_SIZE, None, _KEM).derive(secret))


async def look(broker: Broker, identifier: str, vault: str, authorise: Authorise) -> VaultState:
    """What this broker knows of a vault. Nothing is decided, so that nothing is written down."""

    def judge(step: Transaction, session: Session, ear: Ear, charter: Charter, at: datetime) -> Ruling[VaultState]:
        return Ruling(None, (), sight(step, vault, "", charter).state)

    ruling, _ = await broker.rule(identifier, "vault", authorise, judge)
    return ruling.result


async def deposit(
    broker: Broker, identifier: str, vault: str, epoch: int, deal: Deal, sealed: bytes, authorise: Authorise
) -> Done:
    """Keep this broker's share of a vault's key in the place of any before it. Raises BrokerRefused, every reason."""
    authorise(await broker.storage.look(lambda step: step.session(identifier)))  # before any work is done for it
    share = await asyncio.to_thread(kem_key(broker).open, sealed, info=deposit_info(broker.name, vault, deal.number))
    name = kept_as(vault, deal.number)
    stored = await asyncio.to_thread(seal_resource, name, deal.number, share, broker.keks)
    return await _do(broker, identifier, VaultCall(vault, "deposit", epoch, deal), authorise, share, stored)


async def mark(broker: Broker, identifier: str, call: VaultCall, authorise: Authorise) -> Done:
    """Prepare or commit a store. Raises BrokerRefused with every reason."""
    return await _do(broker, identifier, call, authorise)


async def _do(
    broker: Broker,
    identifier: str,
    call: VaultCall,
    authorise: Authorise,
    share: bytes | None = None,
    stored: StoredResource | None = None,
) -> Done:
    def judge(step: Transaction, session: Session, ear: Ear, charter: Charter, at: datetime) -> Ruling[VaultState]:
        subject, boot = ear.subject, boot_of(ear)
        seen = sight(step, call.vault, boot, charter)
        against = place_reasons(call.vault, subject.role, subject.name, subject.member, charter)
        reasons, after = call.outcome(seen.state, Claim(boot, call.epoch, seen.held))
        if isinstance(call.asked, Deal):
            reasons = (*deal_reasons(call.vault, call.asked, broker.name, share, charter), *reasons)
        if against or reasons:
            reasons = (*against, *reasons)
            return Ruling(journal.vault_denial(call, reasons, ear, session, charter, at), reasons, seen.state)
        if stored is not None:
            for number in step.generations(call.vault):
                step.drop_resource(kept_as(call.vault, number))
            step.put_resource(stored)
        return Ruling(journal.vault(call, after, ear, session, charter, at), (), after)

    ruling, receipt = await broker.rule(identifier, "vault", authorise, judge)
    if ruling.reasons or ruling.note is None or receipt is None:
        raise BrokerRefused(ruling.reasons, where=call.vault)
    return Done(ruling.result, ruling.note.entry.to_bytes(), receipt)


def marked(vault: str, step: str, asked: Mark) -> VaultCall:
    """The call that prepares or commits a store."""
    return VaultCall(vault, "prepare" if step == "prepare" else "commit", 0, asked)
