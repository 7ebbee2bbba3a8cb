"""FedAvg under secure aggregation: the server's half of the protocol, round by round (`fl.aggregation.masking`)."""

from __future__ import annotations

import numpy as np

from attestation.canonical import b64, unb64
from fl.aggregation.mask_talk import MASKED, Notary, bag, confirmation, decode_sum, named, read_bag, round_of
from fl.aggregation.masking import MaskedSum
from fl.errors import MaskingRefused
from fl.jobs.settings import JobSettings, SecureAggregation
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.tensors import parse
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
    for round_ in rounds:
        masked = _MaskedRound(sites, settings, secure, notary, round_)
        following, metrics = masked.run(model)
        rounds.end(round_, metrics, received=model, following=following)
        model.close()
        model = following
    return model


class _MaskedRound:
    """One round, as the server leads it. It trusts no site: whoever answers amiss is out of the job."""

    def __init__(
        self, sites: Federation, settings: JobSettings, secure: SecureAggregation, notary: Notary, number: int
    ) -> None:
        self._sites = sites
        self._settings = settings
        self._secure = secure
        self._notary = notary
        self._number = number

    def run(self, model: SealedMemory) -> tuple[SealedMemory, dict[str, float]]:
        """The next model, and the mean metrics."""
        sites, number = self._sites, self._number
        introductions = self._introductions()
        round_ = round_of(self._notary, introductions, number, self._secure)
        (elements,) = self._settings.schema_of_update[MASKED].shape
        total = MaskedSum(round_, elements)
        dealt = {
            site: {other: unb64(text, where=site) for other, text in read_bag(body).items()}
            for site, body in sites.ask(number, "shares", dict.fromkeys(introductions, bag(introductions))).items()
        }
        shares = total.shares_for(dealt)
        bodies = {site: bag({other: b64(share) for other, share in own.items()}) for site, own in shares.items()}
        sites.ask(number, "dealt", bodies)
        for update in sites.train(Task(number, self._settings.num_rounds, model)):
            total.fold(update.site, update.tensors.array(MASKED).astype(np.uint64, copy=True))
            update.close()
        survivors = total.survivors
        confirmed = sites.ask(number, "survivors", dict.fromkeys(survivors, named(survivors)))
        wanted = confirmation(round_, survivors)
        for site, token in confirmed.items():
            if self._notary.signed(site, token) != wanted:
                raise MaskingRefused(f"{site} has signed other survivors")
        revealed = {
            site: {other: unb64(text, where=site) for other, text in read_bag(body).items()}
            for site, body in sites.ask(number, "unmask", dict.fromkeys(confirmed, bag(confirmed))).items()
        }
        summed = total.unmask(revealed)
        return decode_sum(summed, parse(model.view, max_size=model.size), self._settings, self._secure)

    def _introductions(self) -> dict[str, str]:
        """The sites that introduce themselves well; others are out of the job."""
        found: dict[str, str] = {}
        asked = dict.fromkeys(self._sites.sites, "")
        for site, token in self._sites.ask(self._number, "keys", asked).items():
            try:
                self._notary.introduced(site, token)
                found[site] = token
            except SealwrightError as error:
                self._sites.lose(site, error.what, kind="refused")
        return found
