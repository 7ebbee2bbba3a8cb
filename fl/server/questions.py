"""What secure aggregation has asked of a job's sites, and what it told them that they do not answer. Pure, not locked.

A site whose connection was cut is asked and told again when it is back: what it has not answered, and what it was told
in the round that is still on.
"""

from __future__ import annotations

from collections.abc import Mapping

from fl.aggregation.mask_talk import Step


class Questions:
    """One question at a time, and one thing told."""

    def __init__(self) -> None:
        self._asked: tuple[int, Step, dict[str, str]] = (-1, "keys", {})  # to whom has not answered yet
        self._told: tuple[int, Step, Mapping[str, str]] = (-1, "dealt", {})

    def ask(self, round_: int, step: Step, bodies: Mapping[str, str]) -> None:
        """These sites are asked this; without bodies nobody is asked any more."""
        self._asked = (round_, step, dict(bodies))

    def tell(self, round_: int, step: Step, bodies: Mapping[str, str]) -> None:
        """These sites are told this."""
        self._told = (round_, step, dict(bodies))

    def take_answer(self, site: str, round_: int, step: Step) -> bool:
        """Whether the site owed this answer; it does not any more."""
        return (round_, step) == self._asked[:2] and self._asked[2].pop(site, None) is not None

    def again(self, site: str, on: int | None) -> list[tuple[int, Step, str]]:
        """What is said to a site that is back, while round `on` is on."""
        said = [self._told, self._asked] if self._told[0] == on else [self._asked]
        return [(round_, step, bodies[site]) for round_, step, bodies in said if site in bodies]
