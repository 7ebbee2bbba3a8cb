"""An attested party to federated jobs: what server and site need from the guest that they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attestation.identity import Identity
    from policies.charter import Charter


@dataclass(frozen=True, slots=True)
class Party:
    """How server and site reach their guest's identity, charter, time and ledger. All are called from many threads.

    - `identity`: the current identity; after each renewal the new one, over the same keys.
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
