"""Round numbers that bring each of the 30 features near 0 to 1; no patient's data are in them."""

from __future__ import annotations

import numpy as np

_MEANS = [14, 19, 92, 650, 0.1, 0.1, 0.1, 0.05, 0.2, 0.06]
_SCALES = [4, 4, 24, 350, 0.01, 0.05, 0.08, 0.04, 0.03, 0.007]
_ERROR_SCALES = [0.3, 0.6, 2, 45, 0.003, 0.02, 0.03, 0.006, 0.008, 0.003]
_WORST = [1.2, 1.3, 1.2, 1.4, 1.3, 2.5, 2.7, 2.3, 1.5, 1.3]

MEAN = np.array([*_MEANS, *_ERROR_SCALES, *np.multiply(_MEANS, _WORST)])
SCALE = np.array([*_SCALES, *_ERROR_SCALES, *np.multiply(_SCALES, _WORST)])
