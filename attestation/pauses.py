"""How long a pause may last, for whoever needs a lease; light to import, as simulations count it too."""

from __future__ import annotations

from typing import Final

PAUSE_SECONDS: Final = 600.0
"""How long whatever needs a lease waits for one that ended because brokers are out of reach; then it gives up."""
