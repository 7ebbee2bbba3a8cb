"""Secure aggregation: the server gets the sum of its sites' vectors, and of no fewer than `threshold` members' sites.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (the protocol for an active
server, figure 4), on the k-regular graph of Bell et al. 2020 where there are many sites. One round of it:

1. *keys*: every site advertises two X25519 keys, signed by its attested key. The server passes all of them on.
2. *shares*: every site deals shares of its mask key and of a random seed to its neighbours and itself, encrypted to
   each. Shares are Shamir's, one for each *member*: the sites of one member hold the same one.
3. A site's vector leaves with a mask for each neighbour, whose pairs cancel in the sum, and one of its own seed.
4. *survivors*: the server says whose vectors it has; every one of them signs that set, and the list of keys.
5. *unmask*: a site that has the signatures of `threshold` members over one set reveals its shares: of a survivor's
   seed, or of a lost site's mask key, never of both.

A vector is some arrays of whole numbers, and sums are modulo the size of theirs (`fl.aggregation.fixed_point`). Pure:
messages are bytes in, bytes out; randomness is an argument.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.canonical import canonical_bytes
from attestation.shamir import deal, join
from fl.aggregation.fixed_point import PIECE, Vector
from fl.errors import MaskingRefused
from fl.guard.keystream import KEY_SIZE, SLACK, STRETCH, Keystream

COMPLETE: Final = 16
"""Up to so many sites every one is every other's neighbour."""
ONE_HAND: Final = 8 << 20
"""Bytes of masks that are made before further threads are worth their beginning."""
SECRETS: Final = 2 * KEY_SIZE
"""Bytes of what is shared: the mask key, then the seed."""
MAX_MEMBERS: Final = 255

Keys = Mapping[str, tuple[bytes, bytes]]
"""A site's two public keys: the one for shares, the one for masks; 32 bytes each."""


def majority(members: int) -> int:
    """More than half, and at least two: two sets of survivors never both have so many honest members' signatures."""
    return max(2, members // 2 + 1)


def neighbours(sites: Collection[str], seed: bytes) -> dict[str, tuple[str, ...]]:
    """Each site's neighbours: all others; of many sites, the Harary graph of a permutation by `seed`, of a degree that
    grows with the logarithm of their number (Bell et al. 2020, section 3)."""
    names = sorted(sites)
    count = len(names)
    if count <= COMPLETE:
        return {name: tuple(other for other in names if other != name) for name in names}
    order = np.argsort(Keystream(hashlib.sha256(seed).digest()).words(count), kind="stable")
    ring = [names[int(position)] for position in order]
    half = math.ceil(1.5 * math.log2(count))
    return {
        name: tuple(sorted(ring[(at + step) % count] for step in range(-half, half + 1) if step))
        for at, name in enumerate(ring)
    }


@dataclass(frozen=True)
class Round:
    """What all sites of one round must see alike: whose keys there are, and everything that follows from that."""

    context: bytes
    """The job's record and the number of the round: nothing of one round means anything in another."""
    keys: Keys
    members: Mapping[str, str]
    """Whose each site is, by the charter."""
    threshold: int
    """Members that have to be among the survivors."""
    unit: float | None = None
    """How numbers are written (`fl.aggregation.fixed_point`): alike at all sites, or one's would stand out."""

    @cached_property
    def digest(self) -> str:
        """Names the round: what survivors sign."""
        return hashlib.sha256(
            canonical_bytes(
                {
                    "context": self.context.hex(),
                    "keys": {site: [one.hex() for one in pair] for site, pair in self.keys.items()},
                    "members": dict(self.members),
                    "threshold": self.threshold,
                    "unit": None if self.unit is None else self.unit.hex(),
                }
            )
        ).hexdigest()

    @cached_property
    def graph(self) -> dict[str, tuple[str, ...]]:
        """The neighbours. The graph's seed is the digest: nobody chooses it, and all sign it."""
        return neighbours(self.keys, bytes.fromhex(self.digest))

    @cached_property
    def indices(self) -> dict[str, int]:
        """Each member's index among the shares."""
        return {member: at for at, member in enumerate(sorted({self.members[site] for site in self.keys}), 1)}

    def share_threshold(self, holders: Collection[str]) -> int:
        """How many of the holders' members join a secret."""
        held_by = len({self.members[site] for site in holders})
        return min(held_by, majority(held_by))

    def check(self) -> None:
        """Raises MaskingRefused if so few members take part that their sum would tell too much."""
        count = len({self.members[site] for site in self.keys})
        if not 2 <= self.threshold <= count or count > MAX_MEMBERS:
            raise MaskingRefused(f"{count} members take part, and a sum is over at least {self.threshold}")


class Participant:
    """One site in one round. Each step is taken once, in order; whatever is out of turn is refused."""

    def __init__(self, site: str, random: Callable[[int], bytes]) -> None:
        self._site = site
        self._random = random
        self._cipher = X25519PrivateKey.from_private_bytes(random(32))
        self._mask = X25519PrivateKey.from_private_bytes(random(32))
        self._seed = random(KEY_SIZE)
        self._round: Round | None = None
        self._around: tuple[str, ...] = ()
        self._shares: dict[str, bytes] = {}
        self._common: dict[str, bytes] = {}  # what this site's cipher key and each neighbour's give
        self._ahead: Masks | None = None
        self._masked = False
        self._signed: tuple[str, ...] | None = None
        self._revealed = False

    @property
    def public_keys(self) -> tuple[bytes, bytes]:
        """What is advertised."""
        return self._cipher.public_key().public_bytes_raw(), self._mask.public_key().public_bytes_raw()

    def share(self, round_: Round) -> dict[str, bytes]:
        """The encrypted shares for each neighbour. Raises MaskingRefused for a second round, or one without it."""
        if self._round is not None or round_.keys.get(self._site) != self.public_keys:
            raise MaskingRefused("the list of keys does not have this site's own, or is a second one")
        if len({key for pair in round_.keys.values() for key in pair}) != 2 * len(round_.keys):
            raise MaskingRefused("two sites have one key")
        round_.check()
        self._round, self._around = round_, round_.graph[self._site]
        holders = (*self._around, self._site)
        indices = round_.indices
        wanted = sorted({indices[round_.members[site]] for site in holders})
        secret = self._mask.private_bytes_raw() + self._seed
        shares = deal(secret, round_.share_threshold(holders), wanted, self._random)
        self._shares[self._site] = shares[indices[round_.members[self._site]]]
        return {
            other: self._sealed(other, shares[indices[round_.members[other]]], self._site) for other in self._around
        }

    def receive(self, shares: Mapping[str, bytes]) -> None:
        """Take the neighbours' shares; whoever sent none takes no part. Raises MaskingRefused."""
        round_ = self._begun()
        if len(self._shares) != 1:
            raise MaskingRefused("shares were received before")
        for other, sealed in shares.items():
            if other not in self._around:
                raise MaskingRefused(f"{other} is no neighbour")
            share = self._opened(other, sealed)
            if len(share) != SECRETS:
                raise MaskingRefused(f"the share of {other} has another size")
            self._shares[other] = share
        taking_part = {round_.members[site] for site in self._shares}
        if len(taking_part) < min(round_.threshold, round_.share_threshold((*self._around, self._site))):
            raise MaskingRefused(f"only {len(taking_part)} members have shared their keys")

    def masks(self) -> Masks:
        """The masks of this site's vector. Once: two vectors under one mask would tell their difference."""
        round_ = self._begun()
        if self._masked or self._site not in self._shares:
            raise MaskingRefused("a vector was masked before, or there are no shares")
        self._masked = True
        return self._ahead or Masks(self._streams(round_))

    def ahead(self) -> Masks | None:
        """What `masks` will give, for who has time to make them before; None if it has given them already."""
        if self._masked or self._ahead is not None or self._site not in self._shares:
            return None
        self._ahead = Masks(self._streams(self._begun()))
        return self._ahead

    def confirm(self, survivors: Collection[str]) -> tuple[str, ...]:
        """What to sign, once: the sorted survivors. Raises MaskingRefused for a set that tells too much."""
        round_ = self._begun()
        named = tuple(sorted(survivors))
        if not self._masked or self._signed is not None:
            raise MaskingRefused("survivors are named before there is anything to unmask, or a second time")
        if self._site not in named or len(set(named)) != len(named) or not set(named) <= set(round_.keys):
            raise MaskingRefused("the survivors are not sites of this round, or do not have this one")
        count = len({round_.members[site] for site in named})
        if count < round_.threshold:
            raise MaskingRefused(f"the sum would be over {count} members, and is over at least {round_.threshold}")
        self._signed = named
        return named

    def are_enough(self, signers: Collection[str]) -> bool:
        """Whether so many members have signed what this site has that it may reveal its shares."""
        round_, signed = self._begun(), self._signed or ()
        return len({round_.members[site] for site in signers if site in signed}) >= round_.threshold

    def reveal(self, signers: Collection[str]) -> dict[str, bytes]:
        """This site's shares: of survivors' seeds, and of the lost sites' mask keys.

        `signers` are the sites whose signatures over the same set were checked. Raises MaskingRefused.
        """
        round_ = self._begun()
        if self._signed is None or self._revealed:
            raise MaskingRefused("nothing was signed, or shares were revealed before")
        if not self.are_enough(signers):
            count = len({round_.members[site] for site in signers if site in self._signed})
            raise MaskingRefused(f"{count} members have signed the survivors, {round_.threshold} are needed")
        self._revealed = True
        return {
            site: share[KEY_SIZE:] if site in self._signed else share[:KEY_SIZE] for site, share in self._shares.items()
        }

    def _begun(self) -> Round:
        if self._round is None:
            raise MaskingRefused("the round has no keys yet")
        return self._round

    def _streams(self, round_: Round) -> Iterator[tuple[bytes, bool]]:
        yield self._seed, True
        for other in self._around:
            if other in self._shares:
                yield pair_seed(self._mask, round_.keys[other][1], round_), self._site < other

    def _sealed(self, other: str, share: bytes, sender: str) -> bytes:
        round_ = self._begun()
        return AESGCM(self._pair_key(other)).encrypt(bytes(12), share, _label(round_, sender, other))

    def _opened(self, other: str, sealed: bytes) -> bytes:
        round_ = self._begun()
        try:
            return AESGCM(self._pair_key(other, received=True)).decrypt(
                bytes(12), sealed, _label(round_, other, self._site)
            )
        except InvalidTag as error:
            raise MaskingRefused(f"the share of {other} is not its own") from error

    def _pair_key(self, other: str, *, received: bool = False) -> bytes:
        """A key for one direction of one pair in one round, so that its one message may have the nonce 0."""
        round_ = self._begun()
        if other not in self._common:
            self._common[other] = _exchanged(self._cipher, round_.keys[other][0])
        sender, receiver = (other, self._site) if received else (self._site, other)
        return _derived(self._common[other], b"share" + _label(round_, sender, receiver))


class MaskedSum:
    """The server's half of one round: adds masked vectors up, and unmasks the sum."""

    def __init__(self, round_: Round, arrays: Sequence[Vector]) -> None:
        """`arrays`: zeros, which the sum is gathered in."""
        round_.check()
        self._round = round_
        self._graph = round_.graph
        self._sum = tuple(arrays)
        self._sharers: set[str] = set()
        self._folded: set[str] = set()

    def shares_for(self, dealt: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """The encrypted shares for each site, out of what each has dealt (sender → receiver → share).

        Raises MaskingRefused naming a site that has not dealt exactly to its neighbours.
        """
        for sender, shares in dealt.items():
            if set(shares) != set(self._graph[sender]):
                raise MaskingRefused(f"{sender} has not dealt to its neighbours")
        self._sharers = set(dealt)
        return {
            receiver: {sender: dealt[sender][receiver] for sender in self._graph[receiver] if sender in dealt}
            for receiver in dealt
        }

    def fold(self, site: str, vector: Sequence[Vector]) -> None:
        """Add a site's masked vector, once. Raises MaskingRefused."""
        kinds = [[(one.dtype, one.shape) for one in arrays] for arrays in (vector, self._sum)]
        if site not in self._sharers or site in self._folded or kinds[0] != kinds[1]:
            raise MaskingRefused(f"{site} has not shared its keys, has sent a vector before, or one of another size")
        self._folded.add(site)
        for total, array in zip(self._sum, vector, strict=True):
            total += array

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, sorted."""
        return tuple(sorted(self._folded))

    def unmask(self, revealed: Mapping[str, Mapping[str, bytes]]) -> tuple[Vector, ...]:
        """The sum of the survivors' vectors, from the shares that sites revealed. Raises MaskingRefused."""
        streams: list[tuple[bytes, bool]] = []
        for site in sorted(self._sharers):
            around = self._graph[site]
            if site in self._folded:
                streams.append((self._joined(site, revealed), False))
                continue
            folded_around = [other for other in around if other in self._folded]
            if not folded_around:
                continue
            key = X25519PrivateKey.from_private_bytes(self._joined(site, revealed))
            if key.public_key().public_bytes_raw() != self._round.keys[site][1]:
                raise MaskingRefused(f"the shares of {site}'s key do not join to it: a site has lied")
            seeds = {other: pair_seed(key, self._round.keys[other][1], self._round) for other in folded_around}
            streams.extend((seed, site < other) for other, seed in seeds.items())
        spread(streams, self._sum, hands=len(os.sched_getaffinity(0)))  # all sites wait for this
        return self._sum

    def _joined(self, site: str, revealed: Mapping[str, Mapping[str, bytes]]) -> bytes:
        holders = (*self._graph[site], site)
        needed = self._round.share_threshold(holders)
        indices = self._round.indices
        found: dict[int, bytes] = {}
        for holder in holders:
            share = revealed.get(holder, {}).get(site)
            if share is not None and len(share) == KEY_SIZE:
                found.setdefault(indices[self._round.members[holder]], share)
        if len(found) < needed:
            raise MaskingRefused(f"{len(found)} members have revealed their shares of {site}, {needed} are needed")
        return join(dict(sorted(found.items())[:needed]))


class Masks:
    """Masks by their seeds, each added (True) or taken away, over one array after the other."""

    def __init__(self, seeds: Iterable[tuple[bytes, bool]]) -> None:
        self.seeds = tuple(seeds)
        self._streams = _streams(self.seeds)
        self._scratch = _scratch()
        self._made: list[Vector] | None = None
        self._used = 0  # numbers of the first of them

    def make(self, arrays: Sequence[Vector]) -> None:
        """Make the masks of such arrays now, in these, whatever they hold: what is left is one addition."""
        spread(self.seeds, arrays, fresh=True)
        self._made = list(arrays)

    @property
    def are_used_up(self) -> bool:
        """Whether they were made ahead, and nobody needs the arrays any more in which they were."""
        return self._made is not None and not self._made

    def add_to(self, vector: Vector) -> None:
        """Mask the next numbers, in place. What was made ahead is for arrays of those sizes, one after the other."""
        if self._made is None:
            _change(vector, self._streams, self._scratch)
            return
        mask = self._made[0][self._used : self._used + vector.size]
        if (mask.size, mask.dtype) != (vector.size, vector.dtype):
            raise MaskingRefused("the masks were made for other numbers")
        np.add(vector, mask, out=vector)
        self._used += vector.size
        if self._used == self._made[0].size:
            self._made.pop(0)
            self._used = 0


def spread(
    seeds: Sequence[tuple[bytes, bool]], arrays: Sequence[Vector], *, hands: int = 1, fresh: bool = False
) -> None:
    """What `Masks.add_to` does to the arrays one after the other; to zeros if they are `fresh`.

    `hands`: threads at most, where there is enough to do for more than one.
    """
    stretches: list[tuple[int, list[Vector]]] = []  # bytes to skip, and what begins in it
    at = 0
    for array in arrays:
        rest = array.reshape(-1)
        while rest.size:
            begun = at % STRETCH
            if at // STRETCH == len(stretches):
                stretches.append((begun, []))
            part = rest[: -(-(STRETCH - begun) // rest.itemsize)]  # a number may reach into the next one
            stretches[-1][1].append(part)
            at, rest = at + part.nbytes, rest[part.size :]
    hands = min(len(stretches), hands) if at * len(seeds) > ONE_HAND else 1

    def take(hand: int) -> None:
        scratch = _scratch()
        for number in range(hand, len(stretches), hands):
            skipped, parts = stretches[number]
            streams = _streams(seeds, number)
            for stream, _ in streams:
                stream.fill(scratch, skipped)
            for part in parts:
                _change(part, streams, scratch, fresh=fresh)

    if hands < 2:
        take(0)
        return
    with ThreadPoolExecutor(hands) as threads:
        for done in [threads.submit(take, hand) for hand in range(hands)]:
            done.result()


def _streams(seeds: Iterable[tuple[bytes, bool]], stretch: int = 0) -> list[tuple[Keystream, np.ufunc]]:
    return [(Keystream(seed, stretch), np.add if adds else np.subtract) for seed, adds in seeds]


def _scratch() -> npt.NDArray[np.uint8]:
    return np.empty(PIECE * np.dtype(np.uint64).itemsize + SLACK, dtype=np.uint8)


def _change(
    vector: Vector,
    streams: Iterable[tuple[Keystream, np.ufunc]],
    scratch: npt.NDArray[np.uint8],
    *,
    fresh: bool = False,
) -> None:
    for start in range(0, vector.size, PIECE):
        part = vector[start : start + PIECE]
        mask = scratch[: part.nbytes].view(vector.dtype)
        if fresh:
            part.fill(0)  # here, where a cache keeps it
        for stream, change in streams:
            stream.fill(scratch, part.nbytes)
            change(part, mask, out=part)


def pair_seed(own: X25519PrivateKey, theirs: bytes, round_: Round) -> bytes:
    """The key of the mask that two sites have in common in a round."""
    return _derived(_exchanged(own, theirs), b"mask" + round_.context)


def _exchanged(own: X25519PrivateKey, theirs: bytes) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise MaskingRefused("a key is none") from error


def _derived(common: bytes, purpose: bytes) -> bytes:
    info = b"sealwright-masking-v1\0" + purpose
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=None, info=info).derive(common)


def _label(round_: Round, sender: str, receiver: str) -> bytes:
    """One direction of one pair in one round; names have no NUL."""
    return b"\0".join((round_.digest.encode(), sender.encode(), receiver.encode()))
