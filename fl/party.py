"""An attested party to federated jobs: what server and site need from the guest that they run in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from attestation.errors import LeaseEnded
from attestation.pauses import PAUSE_SECONDS

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter


LOOK_SECONDS: Final = 0.5
"""Between two looks whether a lease is back."""


@dataclass(frozen=True, slots=True)
class Party:
    """How server and site reach their guest's identity, charter, time and ledger. All are called from many threads.

    - `identity`: the current identity; after each renewal the new one, over the same keys. Raises LeaseEnded while
      there is none, because too few brokers could be reached to renew it.
    - `charter`: the current charter, verified.
    - `clock`: the time that the brokers vouch for.
    - `record`: write `(kind, document)` into the ledger, return when it is there; the entry and its receipt as JSON
      text, or "" if there is none. Raises if it is not there.
    - `tell`: one line for the guest's log; never a secret.
    """

    identity: Callable[[], Identity]
    charter: Callable[[], Charter]
    clock: Callable[[], datetime]
    record: Callable[[str, Mapping[str, Any]], str]
    tell: Callable[[str], None]

    def standing(self, seconds: float = PAUSE_SECONDS) -> Identity:
        """The current identity; while there is none, wait for it, `seconds` at most. Raises LeaseEnded."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.identity()
            except LeaseEnded:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(LOOK_SECONDS)
