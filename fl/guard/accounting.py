"""What rounds of the trusted loop cost in (epsilon, delta): Google's dp-accounting, by Rényi differential privacy.

Each step is a Poisson-subsampled Gaussian mechanism (Mironov, Talwar and Zhang 2019), for neighbours that differ by one
record more or less. The rounds of one job are composed exactly; a round is debited what it adds to the job's epsilon at
the job's one delta, so that the debits of a job sum up to what the accountant says of all of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

from fl.errors import RecipeUnusable
from fl.jobs.privacy import DpSgd
from policies.budgets import MICRO, PICO

ORDERS: Final = [*range(2, 64), 72, 80, 96, 128, 192, 256, 512, 1024]
"""Rényi orders that are tried; for whole ones the accountant's formula is exact."""


@lru_cache(maxsize=4096)
def epsilon(privacy: DpSgd, rounds: int) -> float:
    """The epsilon of so many rounds at `privacy.delta`. Raises RecipeUnusable where dp-accounting is not installed."""
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise RecipeUnusable(
            "private training needs dp-accounting", where="privacy", do="pip install 'sealwright[privacy]'"
        ) from error
    if rounds == 0:
        return 0.0
    step = dp_accounting.PoissonSampledDpEvent(
        privacy.sample_rate, dp_accounting.GaussianDpEvent(privacy.noise_multiplier)
    )
    accountant = rdp.RdpAccountant(orders=ORDERS)
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, privacy.steps * rounds))
    return float(accountant.get_epsilon(privacy.delta))


def debited(privacy: DpSgd, round_: int) -> tuple[int, int]:
    """Millionths of epsilon and 10**-12 of delta that round `round_` (from 0) adds, rounded up."""
    upto = [math.ceil(epsilon(privacy, rounds) * MICRO) for rounds in (round_, round_ + 1)]
    return upto[1] - upto[0], math.ceil(privacy.delta * PICO) if round_ == 0 else 0
