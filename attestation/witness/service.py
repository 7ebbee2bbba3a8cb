"""A witness at work: a request's bytes in, an HTTP answer out; the cosignature is made when its state is on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.errors import BrokerUnavailable
from attestation.ledger.cosignature import cosign
from attestation.ledger.witness import SIZE_TYPE, Denied, authentic, extends, known_logs, parse_add_checkpoint
from attestation.witness.store import WitnessStore
from policies.documents import Consortium
from policies.errors import Unusable
from policies.keys import public_pem

PREFIX: Final = "/v1/witness"
"""A witness's URL is that of its server with this path (C2SP: its submission prefix)."""
TRIES: Final = 4
"""How often a request is judged anew because another one moved the state meanwhile."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; `problem` is for the log: why nothing was cosigned."""

    status: int
    body: str
    content_type: str = "text/plain"
    problem: str | None = None


class Witness:
    """One witness. `consortium` gives what its charter says now, or None while it has none."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        store: WitnessStore,
        consortium: Callable[[], Consortium | None],
        clock: Callable[[], datetime],
    ) -> None:
        self._key = key
        self._public_key = public_pem(key)
        self._store = store
        self._consortium = consortium
        self._clock = clock

    def add_checkpoint(self, raw: bytes) -> Answer:
        """Answer one request. It blocks (disk); it may be called from any thread."""
        try:
            request = parse_add_checkpoint(raw)
        except Unusable as error:
            return _denied(Denied(400, error.what))
        consortium = self._consortium()
        logs = None if consortium is None else known_logs(consortium, self._public_key)
        if logs is None:
            return _denied(Denied(404, "no charter that is followed here names this witness"))
        new = authentic(request, logs.keys)
        if isinstance(new, Denied):
            return _denied(new)
        try:
            for _ in range(TRIES):
                seen = self._store.seen(new.origin)
                if isinstance(denied := extends(request, new, seen), Denied):
                    return _denied(denied)
                if seen == new or self._store.advance(seen, new):
                    return Answer(200, cosign(new, logs.name, self._key, self._clock()).line())
        except BrokerUnavailable as error:
            return Answer(503, f"{error.what}\n", problem=error.what)
        return Answer(503, "this ledger's state moves too fast\n", problem="the state moved at every try")

    def close(self) -> None:
        """Close its state."""
        self._store.close()


def _denied(denied: Denied) -> Answer:
    if denied.size is not None:
        return Answer(denied.status, f"{denied.size}\n", SIZE_TYPE, denied.reason)
    return Answer(denied.status, f"{denied.reason}\n", problem=denied.reason)
