"""Dealing a resource out to brokers: all shares first, then the document that the charter is to have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.connection import BrokerClient, fetch_charter
from attestation.ledger.receipt import Receipt
from attestation.split import split_value
from policies.charter import Charter
from policies.charter.content import split_complaints
from policies.documents import Split
from policies.errors import Refused, SealwrightError, Unusable


@dataclass(frozen=True, slots=True)
class Dealt:
    """The charter's document, and each broker's receipt of its share."""

    document: Split
    receipts: Mapping[str, Receipt]


def deal_out(
    resource: str,
    value: bytes,
    key: Ed25519PrivateKey,
    brokers: Sequence[tuple[str, str]],
    root: bytes,
    k: int | None,
    *,
    again: bool,
) -> Dealt:
    """Deposit a share of `value` at each of the `brokers` (name, URL), signed by its owner's `key`.

    `again`: whether the charter must say already that the resource is split; its next generation is dealt, any k left
    out is as before. Raises Unusable for what makes no split, Refused with every broker that did not take its share:
    nothing has changed then, and it may be tried again.
    """
    fetched = fetch_charter(brokers, root=root)
    fetched.client.close()
    charter = fetched.charter
    before = charter.split(resource)
    if again != (before is not None):
        state, verb = ("is split already", "refresh") if before else ("is not split", "split")
        raise Unusable(f"{resource} {state}", where="charter", do=f"Use `seal secret {verb}`.")
    generation = 1 if before is None else before.generation + 1
    needed = k if k is not None or before is None else before.k
    document, shares = split_value(resource, value, [name for name, _ in brokers], needed or 0, generation, os.urandom)
    _check(document, charter)
    receipts: dict[str, Receipt] = {}
    reasons: list[str] = []
    for name, url in sorted(brokers):
        try:
            receipts[name] = _deposit(charter, name, url, resource, shares[name], key, generation)
        except SealwrightError as error:
            reasons += [f"{name}: {why}" for why in (error.reasons if isinstance(error, Refused) else (error.what,))]
    if reasons:
        raise Refused(
            f"{len(receipts)} of {len(brokers)} brokers took their share",
            where=resource,
            do="Correct what is said and split it again; until the charter says otherwise, all is as before.",
            reasons=tuple(reasons),
        )
    return Dealt(document, receipts)


def _check(document: Split, charter: Charter) -> None:
    unknown = [name for name in document.brokers if charter.broker(name) is None]
    reasons = [f"the charter has no broker {name}" for name in unknown]
    reasons += split_complaints(document, charter.consortium)
    if reasons:
        raise Unusable("; ".join(reasons), where=document.resource, do="Choose brokers of different members.")


def _deposit(
    charter: Charter, name: str, url: str, resource: str, share: bytes, key: Ed25519PrivateKey, generation: int
) -> Receipt:
    entry = charter.broker(name)
    if entry is None:
        raise Unusable(f"the charter has no broker {name}", where="charter", do="Name another.")
    client = BrokerClient(entry, charter.consortium.trust_domain, url=url)
    try:
        return client.deposit(resource, share, key, charter_id=charter.id, generation=generation)
    finally:
        client.close()
