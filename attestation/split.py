"""Split resources: dealing an owner's value out to brokers, and joining it in the guest that attested to them.

The owner deals: a fresh polynomial for each generation, a share for each broker, and a commitment to each share in a
document (`policies.documents.Split`) that the owner signs as part of the charter. A broker keeps its share as it keeps
whole values, and learns nothing of the value from it. A guest takes shares from k brokers and knows of each, by the
commitment, whether it is the one that was dealt; so a false share is named, and cannot spoil what the others hold.

A share as it is deposited and released: `seal-share-1`, a zero byte, the generation (8 bytes, big-endian), the index
(1 byte), 32 secret random bytes, and the value's share, as long as the value. The random bytes hide it: the charter, in
which the commitment stands, is for all to read.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from attestation import shamir
from attestation.canonical import canonical_bytes
from attestation.errors import BrokerUnavailable, SharesMissing
from policies.documents import Split
from policies.errors import Refused, SealwrightError, Unusable

MAGIC: Final = b"seal-share-1\0"
SALT_SIZE: Final = 32
OVERHEAD: Final = len(MAGIC) + 8 + 1 + SALT_SIZE
"""Bytes of a share beyond those of its value."""
_CONTEXT: Final = b"sealwright-share-v1\0"


@dataclass(frozen=True, slots=True)
class Share:
    """A share, read."""

    generation: int
    index: int
    part: bytes


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of the shares that brokers gave: the good ones, what is against each of the others, and which of
    these are false: they claim to be of this generation, or are no shares at all."""

    good: Mapping[str, Share]
    against: Mapping[str, str]
    false: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """A joined value, and what is against brokers whose shares were false."""

    value: bytes
    false: Mapping[str, str]


Ask = Callable[[Sequence[str]], tuple[Mapping[str, bytes], Mapping[str, SealwrightError]]]
"""Asks these brokers for their shares at once; gives what they released, and what failed, by broker."""


def split_value(
    resource: str, value: bytes, brokers: Sequence[str], k: int, generation: int, randomness: Callable[[int], bytes]
) -> tuple[Split, dict[str, bytes]]:
    """Deal `value` out: the document for the charter, and each broker's share by its name.

    Raises Unusable if k is not more than half of the brokers, or something else makes no Split.
    """
    member, kind, tag = resource.split("/")
    names = tuple(sorted(brokers))
    if len(set(names)) != len(names) or not 2 <= k <= len(names) < 2 * k:
        raise Unusable(
            f"{k} of {len(names)} brokers cannot hold a resource between them",
            where=resource,
            do="Name each broker once, and choose k of at least 2 and more than half of them.",
        )
    dealt = shamir.deal(value, k, range(1, len(names) + 1), randomness)
    shares = {
        name: MAGIC + generation.to_bytes(8, "big") + bytes([index]) + randomness(SALT_SIZE) + dealt[index]
        for index, name in enumerate(names, 1)
    }
    commitments = {name: share_commitment(resource, name, share) for name, share in shares.items()}
    document = Split(
        member=member, type=kind, tag=tag, k=k, brokers=names, generation=generation, commitments=commitments
    )
    return document, shares


def share_commitment(resource: str, broker: str, share: bytes) -> str:
    """SHA-256 (hex) of a context, the resource, the broker, and the share with its secret random bytes."""
    return sha256(_CONTEXT + canonical_bytes({"broker": broker, "resource": resource}) + b"\0" + share).hexdigest()


def kept_as(resource: str, generation: int) -> str:
    """The name under which a broker keeps a resource: its own, or with the generation of its share (from 1)."""
    return resource if generation == 0 else f"{resource}#{generation}"


def parse_share(raw: bytes) -> Share:
    """Read a share. Raises Unusable for what is none."""
    if not raw.startswith(MAGIC) or len(raw) <= OVERHEAD:
        raise Unusable("this is no share of a split resource", where="share", do="Make it by `seal secret split`.")
    place = len(MAGIC)
    return Share(int.from_bytes(raw[place : place + 8], "big"), raw[place + 8], raw[OVERHEAD:])


def share_complaint(split: Split, broker: str, raw: bytes) -> str | None:
    """Why `raw` is not the share that was dealt to `broker`, or None if it is."""
    if broker not in split.commitments:
        return f"the charter gives {broker} no share of {split.resource}"
    try:
        share = parse_share(raw)
    except Unusable as error:
        return error.what
    if share.generation != split.generation:
        return f"the share is of generation {share.generation}, the charter's is {split.generation}"
    if not hmac.compare_digest(share_commitment(split.resource, broker, raw), split.commitments[broker]):
        return "the share is not the one that the owner dealt"
    return None


def judge_shares(split: Split, given: Mapping[str, bytes]) -> Judged:
    """Which of the shares that brokers gave are the ones that were dealt to them."""
    complaints = {broker: share_complaint(split, broker, raw) for broker, raw in given.items()}
    good = {broker: parse_share(raw) for broker, raw in given.items() if complaints[broker] is None}
    against = {broker: why for broker, why in complaints.items() if why is not None}
    return Judged(
        good, against, tuple(broker for broker in against if not _of_another_generation(split, given[broker]))
    )


def _of_another_generation(split: Split, raw: bytes) -> bool:
    try:
        return parse_share(raw).generation != split.generation
    except Unusable:
        return False


def join_shares(split: Split, given: Mapping[str, bytes]) -> bytes:
    """The value that k of the shares `given` (by broker) join to; others than those that were dealt are left out.

    Raises SharesMissing, which names every broker whose share is not good and why, if fewer than k are.
    """
    judged = judge_shares(split, given)
    if len(judged.good) < split.k:
        raise SharesMissing(_missing(split, judged, {}), resource=split.resource)
    return _joined(split, judged)


def gather_shares(split: Split, holders: Sequence[str], ask: Ask) -> Joined:
    """Take shares from as many of the `holders`, in their order, as it takes to have k good ones, and join them.

    Raises SharesMissing if no k good ones are to be had, with every broker that failed and why; BrokerUnavailable with
    the same if those that could not be reached would be enough.
    """
    given: dict[str, bytes] = {}
    failures: dict[str, SealwrightError] = {}
    left = [broker for broker in holders if broker in split.brokers]
    judged = judge_shares(split, given)
    while left and len(judged.good) < split.k:
        needed = split.k - len(judged.good)
        asked, left = left[:needed], left[needed:]
        released, failed = ask(asked)
        given |= released
        failures |= failed
        judged = judge_shares(split, given)
    if len(judged.good) >= split.k:
        return Joined(_joined(split, judged), {broker: judged.against[broker] for broker in judged.false})
    told = {broker: _reasons(error) for broker, error in failures.items()}
    absent = [broker for broker in split.brokers if broker not in holders]
    reasons = _missing(split, judged, {**told, **dict.fromkeys(absent, ("it has not affirmed this guest",))})
    silent = sum(isinstance(error, BrokerUnavailable) for error in failures.values()) + len(absent)
    if len(judged.good) + silent >= split.k:
        raise BrokerUnavailable("; ".join(reasons), where="brokers", reasons=reasons)
    raise SharesMissing(reasons, resource=split.resource)


def _joined(split: Split, judged: Judged) -> bytes:
    chosen = sorted(judged.good.values(), key=lambda share: share.index)[: split.k]
    return shamir.join({share.index: share.part for share in chosen})


def _missing(split: Split, judged: Judged, absent: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return (
        f"{split.resource}: {len(judged.good)} good shares, {split.k} are needed",
        *(f"{broker}: {why}" for broker, why in sorted(judged.against.items())),
        *(f"{broker}: {why}" for broker, whys in sorted(absent.items()) for why in whys),
    )


def _reasons(error: SealwrightError) -> tuple[str, ...]:
    return error.reasons if isinstance(error, Refused) else (error.what,)
