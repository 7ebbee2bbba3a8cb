"""Which contributions the tree has had: each is claimed once, and delivered once in a partial sum. Pure; at the root.

A gateway claims a contribution before it folds it, by the random name of its own start (`origin`), which says the same
again after a cut. What is claimed and never delivered was lost with a node on the way; it is told, by origin, when the
version is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from fl.edge.contract import ID_BYTES
from fl.edge.partial_sum import MAX_IDS, PartialSum

_DELIVERED: Final = ""


class Contributions:
    """Of the versions that are alive."""

    def __init__(self, *, once: bool = False, used: bytes = b"") -> None:
        """`once`: an id counts once in the whole job, not once a version; `used`: those that were, where it goes on."""
        self._claimed: dict[int, dict[bytes, str]] = {}
        self._once = once
        self._used = {used[at : at + ID_BYTES] for at in range(0, len(used), ID_BYTES)}

    @property
    def used(self) -> bytes:
        """The contributions of a job that takes each once, one after the other."""
        return b"".join(sorted(self._used))

    def begin(self, version: int) -> None:
        """A version takes updates from now on."""
        self._claimed[version] = {}

    def claim(self, origin: str, ids: Mapping[int, Iterable[bytes]]) -> list[bytes]:
        """The gateway `origin` claims contributions; those that it may not fold: claimed by another, delivered before,
        for a version that is over, or more than there is room for."""
        refused: list[bytes] = []
        for version, wanted in ids.items():
            claimed = self._claimed.get(version)
            for contribution in wanted:
                if claimed is None or len(claimed) >= MAX_IDS:
                    refused.append(contribution)
                elif contribution in claimed:
                    if claimed[contribution] != origin:
                        refused.append(contribution)
                elif self._once and contribution in self._used:
                    refused.append(contribution)
                else:
                    claimed[contribution] = origin
                    if self._once:
                        self._used.add(contribution)
        return refused

    def deliver(self, partial: PartialSum) -> str | None:
        """A partial sum has come. None: each contribution in it was claimed and is new. Else why all of it is refused:
        a sum cannot be taken apart. Versions that are over are the caller's to drop."""
        for version, part in partial.versions.items():
            claimed = self._claimed.get(version)
            if claimed is None:
                continue
            for contribution in part.ids:
                owner = claimed.get(contribution)
                if owner is None:
                    return f"version {version}: a contribution was not claimed"
                if owner == _DELIVERED:
                    return f"version {version}: a contribution was delivered before"
        for version, part in partial.versions.items():
            if version in self._claimed:
                self._claimed[version].update(dict.fromkeys(part.ids, _DELIVERED))
        return None

    def missing(self) -> Counter[str]:
        """How many contributions each origin has claimed that have not come."""
        return sum((_missing(claimed) for claimed in self._claimed.values()), Counter())

    def end(self, version: int) -> Counter[str]:
        """A version is over: how many of its contributions were lost, by the origin that claimed them."""
        return _missing(self._claimed.pop(version))


def _missing(claimed: Mapping[bytes, str]) -> Counter[str]:
    return Counter(origin for origin in claimed.values() if origin != _DELIVERED)
