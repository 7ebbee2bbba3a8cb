"""Putting the time on a charter: a timestamp says that a snapshot is the newest, signed by `broker_threshold` brokers.

One broker begins it (`sign_timestamp`) and offers it to the others, each of whom judges it against its own copy of the
charter and its own clock (`read_offered`, `cosign_timestamp`); what they add is put together (`joined`). Two brokers
may complete two timestamps of one version over one snapshot; readers take either, since both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from policies.charter.layout import metadata_file, root_roles, tuf_key
from policies.charter.proposal import FIRST_ROOT, TIMESTAMP_FILE, newest_snapshot
from policies.charter.signing import AnyKey, add_signature, all_reasons, refusal, signer_pem
from policies.charter.trust import Inspection, inspect, metadata_bytes, parse_metadata
from policies.documents import format_time

TIMESTAMP_LIFETIME: Final = timedelta(days=1)
TIMESTAMP_LIMIT: Final = 16 * 1024
"""Bytes of a timestamp."""
LEAP: Final = 16
"""How far above the last one a version may be that this broker signs, so that nobody runs through all numbers."""
CLOCKS: Final = timedelta(minutes=5)
"""How far brokers' clocks may differ."""


def sign_timestamp(
    store: Mapping[str, bytes], broker_key: AnyKey, at: datetime, lifetime: timedelta = TIMESTAMP_LIFETIME
) -> dict[str, bytes]:
    """Return the store with a timestamp by this broker over its newest snapshot, valid for `lifetime` from `at`.

    If the charter wants several brokers and the timestamp there still lacks signatures, this one is added to it;
    otherwise a new version begins. Raises ProposalRefused if the rest of the store does not hold at `at`, or if the
    key is no broker's.
    """
    version = newest_snapshot(store)
    charter, work = inspect(store, store.get(FIRST_ROOT, b""), at, snapshot=version)
    if charter is None or work.shortfalls:
        raise refusal(
            "the charter to put the time on does not hold", all_reasons(work), "Publish a charter that holds."
        )
    keyid = tuf_key(signer_pem(broker_key)).keyid
    role = root_roles(charter.consortium)[Timestamp.type]
    if keyid not in role.keyids:
        raise refusal("this key is no broker's of this charter", [f"key {keyid[:16]}… may not sign the timestamp"])
    meta = _snapshot_meta(store)
    last, _ = parse_metadata(Timestamp, TIMESTAMP_FILE, store.get(TIMESTAMP_FILE, b""))
    if last is not None and _joinable(last, meta, keyid, role.keyids, role.threshold, at):
        stamp = last
    else:
        number = last.signed.version + 1 if last is not None else 1
        stamp = Metadata(Timestamp(version=number, expires=(at + lifetime).replace(microsecond=0), snapshot_meta=meta))
    add_signature(stamp, broker_key)
    return {**store, TIMESTAMP_FILE: metadata_bytes(stamp)}


def _joinable(
    last: Metadata[Timestamp], meta: MetaFile, keyid: str, keyids: list[str], threshold: int, at: datetime
) -> bool:
    """Whether a further broker's signature completes the timestamp that is there."""
    return (
        last.signed.snapshot_meta == meta
        and not last.signed.is_expired(at)
        and keyid not in last.signatures
        and set(last.signatures) <= set(keyids)
        and len(last.signatures) < threshold
    )


@dataclass(frozen=True, slots=True)
class Offered:
    """A timestamp in good form, not lapsed, whose every signature is a broker's of the charter."""

    raw: bytes
    version: int
    snapshot: int
    """The charter's version that it names."""
    expires: datetime
    complete: bool
    """Whether as many brokers have signed it as the charter asks for."""
    names: bool
    """Whether it names the newest snapshot that the reader has, by its digest."""


def read_offered(store: Mapping[str, bytes], raw: bytes, at: datetime) -> Offered:
    """Judge a timestamp that another broker offers by the brokers of the newest root in `store`, which has to hold.

    Raises ProposalRefused with every reason: its form, that it has lapsed, that a signature is no broker's or that
    nobody has signed it.
    """
    if len(raw) > TIMESTAMP_LIMIT:
        raise refusal("this timestamp is not taken", [f"it is larger than {TIMESTAMP_LIMIT} bytes"], _OFFER)
    here = Inspection(store, at)
    chain = here.root_chain(store.get(FIRST_ROOT, b""))
    if chain is None or here.reasons or here.shortfalls:
        raise refusal("the charter here does not hold", all_reasons(here), "Publish a charter that holds.")
    work = Inspection({TIMESTAMP_FILE: raw}, at, names=here.names)
    meta = work.timestamp(chain[0])
    metadata, _ = parse_metadata(Timestamp, TIMESTAMP_FILE, raw)
    reasons = [*work.reasons] if metadata is None or metadata.signatures else [*work.reasons, "nobody has signed it"]
    if reasons or meta is None or metadata is None:
        raise refusal("this timestamp is not taken", reasons, _OFFER)
    return Offered(
        raw,
        metadata.signed.version,
        meta.version,
        metadata.signed.expires,
        complete=not work.shortfalls,
        names=meta == _snapshot_meta(store),
    )


def cosign_timestamp(
    store: Mapping[str, bytes], offered: Offered, broker_key: AnyKey, at: datetime, longest: timedelta
) -> bytes:
    """Return the offered timestamp with this broker's signature on it as well.

    The broker says by it what it would say itself: that the charter in `store`, with the newest snapshot that it has,
    holds at `at`. Raises ProposalRefused if the timestamp names another snapshot, is valid for more than `longest`
    from `at`, or its version is not above the one in `store`, or too far above it.
    """
    last, _ = parse_metadata(Timestamp, TIMESTAMP_FILE, store.get(TIMESTAMP_FILE, b""))
    number = last.signed.version if last is not None else 0
    reasons = []
    if not offered.names:
        reasons.append(f"it names another snapshot than the newest here, version {newest_snapshot(store)}")
    if not number < offered.version <= number + LEAP:
        reasons.append(f"its version {offered.version} does not come after {number}, the last here")
    if offered.expires > at + longest + CLOCKS:
        reasons.append(f"it would hold until {format_time(offered.expires)}, longer than this broker vouches")
    charter, work = inspect(store, store.get(FIRST_ROOT, b""), at, snapshot=newest_snapshot(store))
    if charter is None or work.shortfalls:
        reasons.extend(all_reasons(work))
    elif tuf_key(signer_pem(broker_key)).keyid not in root_roles(charter.consortium)[Timestamp.type].keyids:
        reasons.append("this key is no broker's of this charter")
    if reasons:
        raise refusal("this timestamp is not signed here", reasons, _OFFER)
    metadata: Metadata[Timestamp] = Metadata.from_bytes(offered.raw)
    add_signature(metadata, broker_key)
    return metadata_bytes(metadata)


def joined(stamp: bytes, others: Iterable[bytes]) -> bytes:
    """Return `stamp` with the signatures that `others` have over the very same signed part; not verified here."""
    whole, reasons = parse_metadata(Timestamp, TIMESTAMP_FILE, stamp)
    if whole is None or reasons:
        return stamp
    for raw in others:
        other, reasons = parse_metadata(Timestamp, TIMESTAMP_FILE, raw)
        if other is not None and not reasons and other.signed_bytes == whole.signed_bytes:
            whole.signatures.update(other.signatures)
    return metadata_bytes(whole)


_OFFER: Final = "Look at the clocks, the charters and `timestamp_hours` of both brokers."


def _snapshot_meta(store: Mapping[str, bytes]) -> MetaFile:
    version = newest_snapshot(store)
    return MetaFile.from_data(version, store[metadata_file(Snapshot.type, version)], ["sha256"])
