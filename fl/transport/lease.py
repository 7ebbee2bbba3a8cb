"""Leases in band: what each side of a connection shows of its own standing, and how it judges its peer's.

A connection begins with the EARs of both sides and goes on with newer ones, shown before the older end, over the same
TLS keys. Each side ends it when the peer's lease has ended unrenewed (the peer may come back), and when what the peer
shows does not hold, or its place in the charter is gone (it is refused).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from attestation.canonical import b64, unb64
from attestation.errors import PeerLapsed, PeerRefused
from attestation.identity import MAX_CERTIFICATE, appraise_peer, enrolment_reasons
from fl.guard.peers import check_peer
from fl.transport.frames import Lease

if TYPE_CHECKING:
    from attestation.identity import Identity, Peer
    from policies.charter import Charter
    from policies.questions import Place

CHECK_SECONDS: Final = 1.0
"""How often each side looks at both leases and for a newer charter."""


class OwnLease:
    """What of our own lease the peer has seen. For one thread."""

    def __init__(self, certificate: bytes) -> None:
        """`certificate`: the one of the handshake, in DER."""
        self._certificate = certificate
        self._shown: tuple[str, ...] = ()

    def to_show(self, identity: Identity) -> Lease | None:
        """The frame that shows the newest EARs; None if the peer has them."""
        if identity.ears == self._shown:
            return None
        self._shown = identity.ears
        newest = identity.certificate_der
        return Lease(ears=identity.ears, certificate="" if newest == self._certificate else b64(newest))


class PeerLease:
    """A peer's lease on one connection, and what the consortium demands of peers.

    Both are judged at the connection's beginning, at each renewal, when the charter changes, before each job (`check`
    with `anew`), and at least every `attestation_interval_seconds` of the charter.
    """

    def __init__(
        self,
        certificate: bytes,
        lease: Lease,
        *,
        role: str,
        here: Place | None,
        charter: Callable[[], Charter],
        clock: Callable[[], datetime],
    ) -> None:
        """`certificate`: the peer's of the handshake, in DER. `here`: the guest that asks, or None for a user, who is
        no guest's peer and asks no rules.

        Raises PeerRefused, PeerLapsed.
        """
        self._handshake = certificate
        self._role = role
        self._here = here
        self._charter = charter
        self._clock = clock
        self._lease = lease
        self._version = 0
        self.peer: Peer = self._appraised(lease)

    def renew(self, lease: Lease) -> None:
        """Take what the peer shows as its newest. Raises PeerRefused, PeerLapsed; then the older does not count."""
        self.peer = self._appraised(lease)
        self._lease = lease

    def check(self, *, anew: bool = False) -> None:
        """Whether the lease stands, by charter and time, now. Raises PeerRefused, PeerLapsed."""
        at = self._clock()
        if anew or self._charter().version != self._version or at >= min(self.peer.good_until, self._due):
            self.peer = self._appraised(self._lease)

    def _appraised(self, lease: Lease) -> Peer:
        certificate = self._handshake if not lease.certificate else _same_key(self._handshake, lease.certificate)
        charter, at = self._charter(), self._clock()
        try:
            peer = appraise_peer(certificate, charter, at, role=self._role, ears=lease.ears)
        except PeerLapsed:
            raise
        except PeerRefused as error:
            # What was good under the charter before may lack a broker that this one has instead: as long as the peer's
            # place stands, a fresh attestation mends that.
            moved = lease is self._lease and self._version not in (0, charter.version)
            if moved and not enrolment_reasons(self.peer.ear, charter):
                raise PeerLapsed(error.reasons, who=f"{self.peer.role}/{self.peer.name}") from error
            raise
        if self._here is not None:
            check_peer(charter, self._here, peer, at)
        self._version = charter.version
        self._due = at + timedelta(seconds=charter.consortium.attestation_interval_seconds)
        return peer


def paused(error: PeerLapsed, who: str) -> str:
    """Why a connection ends whose peer may come back."""
    return f"the lease of {who} was not renewed: {'; '.join(error.reasons)}"


def _same_key(handshake: bytes, shown: str) -> bytes:
    """A newer certificate, if it is over the key that the handshake has proved. Raises PeerRefused, Unusable."""
    raw = unb64(shown, where="certificate")
    if len(raw) > MAX_CERTIFICATE:
        raise PeerRefused((f"the newer certificate has {len(raw)} bytes, more than {MAX_CERTIFICATE}",), who="peer")
    try:
        proved, newer = (x509.load_der_x509_certificate(der).public_key() for der in (handshake, raw))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerRefused((f"the newer certificate cannot be read: {error}",), who="peer") from error
    if proved != newer:
        raise PeerRefused(("the newer certificate is over another key than the connection's",), who="peer")
    return raw
