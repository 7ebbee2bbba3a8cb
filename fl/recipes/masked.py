"""FedAvg under secure aggregation: the server's half of the protocol, round by round (`fl.aggregation.masking`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from attestation.canonical import b64, unb64
from fl.aggregation.fixed_point import Vector, next_unit
from fl.aggregation.mask_talk import (
    Notary,
    arrays_of,
    bag,
    confirmation,
    decode_sum,
    fixed_point,
    introduced,
    is_for,
    keys_in,
    named,
    read_bag,
    read_revealed,
    round_of,
    signed_before,
)
from fl.aggregation.masking import MaskedSum, Round
from fl.errors import MaskingRefused
from fl.jobs.settings import MASKED, MASKED_TAIL, JobSettings, SecureAggregation
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.transport.stored import Stored
from policies.errors import SealwrightError

UNIT: Final = "unit"


def masked_fedavg(
    sites: Federation, settings: JobSettings, secure: SecureAggregation, notary: Notary, model: Stored
) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; the last global model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does, MaskingRefused if a sum cannot be unmasked.
    """
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    leader = _Leader(sites, settings, secure, notary, rounds.state)
    for round_ in rounds:
        following, metrics = leader.run(round_, model)
        rounds.end(round_, metrics, received=model, following=following, state=leader.state)
        model.close()
        model = following
    return model


class _Leader:
    """The server in its rounds. It trusts no site: whoever answers amiss is out of the job."""

    def __init__(
        self,
        sites: Federation,
        settings: JobSettings,
        secure: SecureAggregation,
        notary: Notary,
        state: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """`state`: that of the leader of an earlier run, if there was one."""
        self._sites = sites
        self._settings = settings
        self._secure = secure
        self._notary = notary
        units = state.get(UNIT, np.empty(0))
        self._unit = float(units[0]) if units.size else None  # of weights, when a round has told what they sum up to
        self._introductions: dict[str, str] = {}  # of the next round, as far as sites have sent them ahead
        self._first = True
        self._room: list[Vector] = []

    @property
    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What the next leader needs to go on: sites do not write one update in two ways."""
        return {UNIT: np.array([] if self._unit is None else [self._unit], dtype=np.float64)}

    def run(self, number: int, model: Stored) -> tuple[Stored, dict[str, float]]:
        """One round: the next model, and the mean metrics."""
        sites, unit = self._sites, self._unit
        introductions = self._introduced(number)
        sites.schema = self._settings.schema_of_masked(64 if unit is None else 32)
        begun: list[tuple[Round, MaskedSum]] = []
        task = Task(number, self._settings.num_rounds, model)
        # Keys and shares are exchanged while the sites train.
        exchange = partial(self._exchange, number, introductions, begun.append)
        for update in sites.train(task, among=introductions, meanwhile=exchange):
            begun[0][1].fold(update.site, [update.tensors.array(name) for name in (MASKED, MASKED_TAIL)])
            update.close()
        round_, total = begun[0]
        survivors = total.survivors
        confirmed = sites.ask(number, "survivors", dict.fromkeys(survivors, named(survivors)))
        wanted = confirmation(round_, survivors)
        for site, token in confirmed.items():
            if self._notary.signed(site, token) != wanted:
                raise MaskingRefused(f"{site} has signed other survivors")
        answers = {
            site: read_revealed(body)
            for site, body in sites.ask(number, "unmask", dict.fromkeys(confirmed, bag(confirmed))).items()
        }
        self._introductions = {site: answer.following for site, answer in answers.items() if answer.following}
        sums = total.unmask({site: _decoded(site, answer.texts) for site, answer in answers.items()})
        following, metrics, weights = decode_sum(
            sums, model.tensors(), self._settings, fixed_point(round_, self._secure)
        )
        if self._secure.bits == 32:
            self._unit = next_unit(weights, len(survivors))
        return following, metrics

    def _introduced(self, number: int) -> dict[str, str]:
        """The sites that can take part, with their introductions, which nobody has looked at yet."""
        ahead, self._introductions = self._introductions, {}
        present = self._sites.sites
        found = {site: token for site, token in ahead.items() if site in present}
        asked = {site: "" for site in present if site not in found}
        found |= self._sites.ask(number, "keys", asked) if asked else {}
        first, self._first = self._first, False
        return self._of_before(number, found) if first else found

    def _of_before(self, number: int, introductions: dict[str, str]) -> dict[str, str]:
        """Those who take part in a round that may have been run before by a server that was killed.

        Sites that have signed survivors sign no others: they take part among themselves, or not at all.
        """
        claims: dict[str, frozenset[str]] = {}
        for site, token in list(introductions.items()):
            try:
                signed = signed_before(self._notary, site, token, number)
            except SealwrightError as error:
                del introductions[site]
                self._sites.lose(site, error.what, kind="refused")
            else:
                claims |= {} if signed is None else {site: signed}
        members = self._notary.sites()
        while claims:
            said = Counter(survivors for _, survivors in {(members[site], one) for site, one in claims.items()})
            survivors = max(said, key=lambda one: (said[one], sorted(one)))
            gone = survivors - introductions.keys()
            if not gone:
                for site in claims.keys() - {site for site, one in claims.items() if one == survivors}:
                    self._sites.lose(site, "it has signed other survivors than the rest", kind="refused")
                return {site: token for site, token in introductions.items() if site in survivors}
            for site in [site for site, one in claims.items() if one == survivors]:
                why = f"its round {number} was summed up with {', '.join(sorted(gone)[:5])}, who is gone"
                self._sites.lose(site, why, kind="refused")
                del claims[site], introductions[site]
        return introductions

    def _exchange(
        self, number: int, introductions: dict[str, str], begin: Callable[[tuple[Round, MaskedSum]], None]
    ) -> None:
        """Check the introductions, pass them on, then the shares. Who answers amiss is out of the job."""
        keys: dict[str, tuple[bytes, bytes]] = {}
        for site in list(introductions):
            try:
                keys[site] = self._keys_of(site, introductions, number)
            except SealwrightError as error:
                del introductions[site]
                self._sites.lose(site, error.what, kind="refused")
        round_ = round_of(self._notary, keys, number, self._secure, self._unit)
        total = MaskedSum(round_, self._zeros())
        begin((round_, total))
        message = introduced(introductions, self._unit)
        answers = self._sites.ask(number, "shares", dict.fromkeys(introductions, message))
        shares = total.shares_for({site: _decoded(site, read_bag(body)) for site, body in answers.items()})
        bodies = {site: bag({other: b64(share) for other, share in own.items()}) for site, own in shares.items()}
        self._sites.tell(number, "dealt", bodies)

    def _zeros(self) -> list[Vector]:
        """What a round's sum is gathered in: memory of the round before, if it had the same numbers."""
        if not is_for(self._sites.schema, self._room):
            self._room = arrays_of(self._sites.schema)
        for array in self._room:
            array.fill(0)
        return self._room

    def _keys_of(self, site: str, introductions: dict[str, str], number: int) -> tuple[bytes, bytes]:
        """A site's keys. Of an introduction that came ahead the lease may have ended since: then it sends another."""
        try:
            return keys_in(self._notary, site, introductions[site], number)
        except SealwrightError:
            introductions.update(self._sites.ask(number, "keys", {site: ""}))
            return keys_in(self._notary, site, introductions[site], number)


def _decoded(site: str, texts: Mapping[str, str]) -> dict[str, bytes]:
    return {other: unb64(text, where=site) for other, text in texts.items()}
