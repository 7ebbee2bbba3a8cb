"""What several brokers agree on: the time and the charter's version. A function of what each has signed.

A broker signs its time between the moment at which it was asked and the one at which its answer came, by the guest's
own running clock; so its clock, carried on to now, lies between two bounds. Brokers agree if their clocks, with these
bounds, are at most SPREAD apart. What the most brokers agree on is believed, if they are as many as the charter asks
for (`Consortium.broker_threshold`). Of groups of one size that share a broker the one whose clocks are closest is
taken, so that one liar beside honest clocks cannot leave nothing to believe; of groups that share none, none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from attestation.canonical import format_time
from attestation.errors import BrokersDisagree

SPREAD: Final = timedelta(seconds=10)
"""How far apart the clocks of brokers that agree may be, beyond what their answers took."""


@dataclass(frozen=True, slots=True)
class Said:
    """A broker's signed word. `asked` and `heard` are seconds of the guest's running clock around the answer."""

    broker: str
    time: datetime
    version: int
    asked: float
    heard: float

    def earliest(self, at: float) -> datetime:
        """What the broker's clock shows at least at the running clock's `at`."""
        return self.time + timedelta(seconds=at - self.heard)

    def latest(self, at: float) -> datetime:
        """What it shows at most: the broker signed no sooner than it was asked, in a whole second."""
        return self.time + timedelta(seconds=at - self.asked + 1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The time (at the running clock's `mark`), the charter's version, and who said so."""

    time: datetime
    mark: float
    version: int
    brokers: tuple[str, ...]


def agree(words: Sequence[Said], needed: int, known: int, at: float) -> Agreement:
    """What at least `needed` brokers agree on, over a charter that is not older than version `known`.

    `words` has one word of each broker, `at` is the running clock's now. Of several versions that enough brokers name
    the newest counts. The time is one that none of the agreeing brokers has passed yet, as far as its answer tells, or
    else the latest that one of them has: a lease rather ends early than late. Raises BrokersDisagree.
    """
    together = _one_time(words, needed, at)
    by_version: dict[int, list[Said]] = {}
    for word in together:
        by_version.setdefault(word.version, []).append(word)
    versions = [version for version, named in by_version.items() if version >= known and len(named) >= needed]
    if not versions:
        raise BrokersDisagree(_versions_told({word.broker: word.version for word in words}, needed, known))
    version = max(versions)
    named = by_version[version]
    time = max(max(word.earliest(at) for word in named), min(word.latest(at) for word in named))
    return Agreement(time, at, version, tuple(word.broker for word in named))


def _one_time(words: Sequence[Said], needed: int, at: float) -> list[Said]:
    """The largest group whose clocks agree."""
    groups: list[list[Said]] = []
    for word in words:
        moment = word.earliest(at)
        group = [other for other in words if other.earliest(at) <= moment <= other.latest(at) + SPREAD]
        if group not in groups:
            groups.append(group)
    largest = max(map(len, groups), default=0)
    if largest < needed:
        few = f"{len(words)} brokers told the time, {needed} are needed"
        raise BrokersDisagree((few,) if len(words) < needed else _times_told(words, at))
    best = [group for group in groups if len(group) == largest]
    apart = [max(clocks) - min(clocks) for clocks in ([word.earliest(at) for word in group] for group in best)]
    shared = set.intersection(*({word.broker for word in group} for group in best))
    if len(best) > 1 and (not shared or apart.count(min(apart)) > 1):
        raise BrokersDisagree(_times_told(words, at))
    return best[apart.index(min(apart))]


def _times_told(words: Sequence[Said], at: float) -> tuple[str, ...]:
    apart = f"the brokers' clocks are more than {SPREAD.total_seconds():.0f} s apart, so none is believed"
    return (apart, *(f"{word.broker} says it is {format_time(word.earliest(at))}" for word in words))


def _versions_told(versions: Mapping[str, int], needed: int, known: int) -> tuple[str, ...]:
    return (
        f"fewer than {needed} brokers follow one version of the charter that is not older than the known one ({known})",
        *(f"{broker} follows version {version}" for broker, version in versions.items()),
    )
