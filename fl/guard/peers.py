"""What a guest asks of its peer beyond the credential: the consortium's further demands (`policies/peers.rego`)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from attestation.errors import PeerRefused
from policies.questions import Place, peer_reasons

if TYPE_CHECKING:
    from attestation.identity import Peer
    from policies.charter import Charter


def check_peer(charter: Charter, here: Place, peer: Peer, at: datetime) -> None:
    """Ask the charter's rules about `peer` on behalf of the guest `here`. Raises PeerRefused with every reason."""
    claims = peer.ear.to_claims()
    oldest = min(ear.issued_at for ear in peer.ears)
    facts = {
        "role": peer.role,
        "name": peer.name,
        "age_seconds": max(0, int((at - oldest).total_seconds())),  # a broker's clock may be a second ahead
        "submods": claims["submods"],
        "brokers": sorted(ear.broker for ear in peer.ears),
    }
    reasons = peer_reasons(charter, here, facts, at)
    if reasons:
        raise PeerRefused(reasons, who=f"{peer.role}/{peer.name}")
