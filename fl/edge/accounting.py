"""What a private edge job costs a device in (epsilon, delta): Google's dp-accounting, by Rényi differential privacy.

Neighbours differ by one device. A device adds at most `clip_norm` to one sum for each version; noise is
`noise_multiplier` times that. Up to V versions take updates at once, so that up to V of its contributions can meet in
one sum: a Gaussian mechanism of sensitivity V, in each of (versions / V) sums, is the worst that T versions allow.
Devices choose when they come, so nothing is gained from sampling.
"""

from __future__ import annotations

import math

from fl.edge.settings import EdgeSettings
from fl.errors import RecipeUnusable
from fl.guard.accounting import ORDERS


def device_epsilon(settings: EdgeSettings) -> float:
    """The epsilon of a whole job at `privacy.delta`. Raises RecipeUnusable without privacy, or dp-accounting."""
    privacy = settings.privacy
    if privacy is None:
        raise RecipeUnusable("the job has no privacy to account for", where="privacy")
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise RecipeUnusable(
            "privacy needs dp-accounting", where="privacy", do="pip install 'sealwright[privacy]'"
        ) from error
    contributions = settings.models.max_model_version - 1 if settings.devices.device_reuse else 1
    together = min(settings.models.versions_alive, contributions)
    sums = math.ceil(contributions / together)
    event = dp_accounting.GaussianDpEvent(privacy.noise_multiplier / together)
    accountant = rdp.RdpAccountant(orders=ORDERS)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, sums))
    return float(accountant.get_epsilon(privacy.delta))
