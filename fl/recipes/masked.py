"""FedAvg under secure aggregation: the server's half of the protocol, round by round (`fl.aggregation.masking`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import numpy as np

from attestation.canonical import b64, unb64
from fl.aggregation.fixed_point import next_unit
from fl.aggregation.mask_talk import (
    Notary,
    bag,
    confirmation,
    decode_sum,
    fixed_point,
    introduced,
    named,
    read_bag,
    read_revealed,
    round_of,
)
from fl.aggregation.masking import MaskedSum
from fl.errors import MaskingRefused
from fl.jobs.settings import MASKED, MASKED_TAIL, JobSettings, SecureAggregation
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.tensors import NUMPY_DTYPE, parse
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError


def masked_fedavg(
    sites: Federation, settings: JobSettings, secure: SecureAggregation, notary: Notary, model: SealedMemory
) -> SealedMemory:
    """Run the rounds over `sites` from `model`, which is closed; the last global model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does, MaskingRefused if a sum cannot be unmasked.
    """
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    leader = _Leader(sites, settings, secure, notary)
    for round_ in rounds:
        following, metrics = leader.run(round_, model)
        rounds.end(round_, metrics, received=model, following=following)
        model.close()
        model = following
    return model


class _Leader:
    """The server in its rounds. It trusts no site: whoever answers amiss is out of the job."""

    def __init__(self, sites: Federation, settings: JobSettings, secure: SecureAggregation, notary: Notary) -> None:
        self._sites = sites
        self._settings = settings
        self._secure = secure
        self._notary = notary
        self._unit: float | None = None  # of weights, when a round has told what they sum up to
        self._introductions: dict[str, str] = {}  # of the next round, as far as sites have sent them ahead

    def run(self, number: int, model: SealedMemory) -> tuple[SealedMemory, dict[str, float]]:
        """One round: the next model, and the mean metrics."""
        sites, unit = self._sites, self._unit
        introductions = self._introduced(number)
        round_ = round_of(self._notary, introductions, number, self._secure, unit)
        sites.schema = self._settings.schema_of_masked(64 if unit is None else 32)
        kinds = [sites.schema[name] for name in (MASKED, MASKED_TAIL)]
        total = MaskedSum(round_, [np.zeros(kind.elements, dtype=NUMPY_DTYPE[kind.dtype]) for kind in kinds])
        task = Task(number, self._settings.num_rounds, model)
        # Keys and shares are exchanged while the sites train.
        exchange = partial(self._exchange, number, introduced(introductions, unit), introductions, total)
        for update in sites.train(task, among=introductions, meanwhile=exchange):
            total.fold(update.site, [update.tensors.array(name) for name in (MASKED, MASKED_TAIL)])
            update.close()
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
            sums, parse(model.view, max_size=model.size), self._settings, fixed_point(round_, self._secure)
        )
        if self._secure.bits == 32:
            self._unit = next_unit(weights, len(survivors))
        return following, metrics

    def _exchange(self, number: int, message: str, names: Collection[str], total: MaskedSum) -> None:
        """Pass the shares on. Who deals none is out of the job."""
        answers = self._sites.ask(number, "shares", dict.fromkeys(names, message))
        shares = total.shares_for({site: _decoded(site, read_bag(body)) for site, body in answers.items()})
        bodies = {site: bag({other: b64(share) for other, share in own.items()}) for site, own in shares.items()}
        self._sites.ask(number, "dealt", bodies)

    def _introduced(self, number: int) -> dict[str, str]:
        """The sites that introduce themselves well; others are out of the job."""
        ahead, self._introductions = self._introductions, {}
        present = self._sites.sites
        found = {  # of those whose leases have not ended since
            site: token for site, token in ahead.items() if site in present and self._why_not(site, token) is None
        }
        asked = {site: "" for site in present if site not in found}
        for site, token in (self._sites.ask(number, "keys", asked) if asked else {}).items():
            why = self._why_not(site, token)
            if why is None:
                found[site] = token
            else:
                self._sites.lose(site, why, kind="refused")
        return found

    def _why_not(self, site: str, token: str) -> str | None:
        try:
            self._notary.introduced(site, token)
        except SealwrightError as error:
            return error.what
        return None


def _decoded(site: str, texts: Mapping[str, str]) -> dict[str, bytes]:
    return {other: unb64(text, where=site) for other, text in texts.items()}
