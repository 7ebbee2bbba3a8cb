"""What the attestation packages raise: input that cannot be read, and refusals.

Evidence that can be read but fails a check is no exception: the verifier's appraisal lists every failed check.
"""

from __future__ import annotations

from policies.errors import Refused, Unusable


class MalformedEvidence(Unusable):
    """Bytes that are no evidence of the kind they were taken for: wrong length, unknown layout, trailing bytes."""


class MalformedEndorsement(Unusable):
    """A certificate, a revocation list or a reference manifest that cannot be read."""


class MalformedProfile(Unusable):
    """A verifier's profile that cannot be used: unknown setting, contradiction, or no profile at all."""


class UnmeasurableImage(Unusable):
    """Firmware, kernel, initrd, command line or vCPU settings of which no launch measurement can be made."""


class MalformedArchive(Unusable):
    """An initrd that is not the plain cpio archive which the image pipeline writes."""


class PlatformUnusable(Unusable):
    """A vendor, chip, image or setting with which the virtual platform cannot launch a guest."""


class AttesterUnavailable(Refused):
    """A guest that finds no secure processor of the kind its measured image was built for."""


class EarRefused(Refused):
    """An EAR, or a set of them, that is worth nothing here and now, with every reason.

    `lapsed`: nothing but time is against it.
    """

    def __init__(self, reasons: tuple[str, ...], *, lapsed: bool = False) -> None:
        super().__init__(reasons[0], where="EAR", do="Attest again to the brokers of this charter.", reasons=reasons)
        self.lapsed = lapsed


class PeerRefused(Refused):
    """A peer whose credential, EAR or place in the charter does not hold, with every reason."""

    def __init__(self, reasons: tuple[str, ...], *, who: str) -> None:
        super().__init__(
            f"the peer is refused: {reasons[0]}", where=who, do="Have it attest again, or enrol it.", reasons=reasons
        )


class PeerLapsed(PeerRefused):
    """A peer against whom there is nothing but that its lease has ended: it may renew it and come back."""


class DebitRefused(Refused):
    """An export that is not debited, with every reason: there is no budget for it, or it is kept elsewhere."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(
            reasons[0],
            where="export budget",
            do="Have the budget raised in the charter, or let nothing more out.",
            reasons=reasons,
        )


class LeaseEnded(Refused):
    """A guest's own lease that has ended, since too few brokers could be reached to renew it."""

    def __init__(self, where: str) -> None:
        super().__init__(
            "the guest's lease has ended and too few brokers could be reached to renew it",
            where=where,
            do="Bring the brokers back; the guest renews by itself.",
        )


class LedgerRefused(Refused):
    """A ledger, or a part of one, that is not what its broker signed, with every reason."""

    def __init__(self, reasons: tuple[str, ...], *, where: str) -> None:
        super().__init__(
            reasons[0], where=where, do="Do not rely on it; ask the other members for their copy.", reasons=reasons
        )


class AnswerRefused(Refused):
    """An answer that is not this broker's word on this request: signed by another, swapped, or replayed."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons[0], where="broker's answer", do="Nothing in it was used; ask again.", reasons=reasons)


class SessionRefused(Refused):
    """A call that its session does not allow: unknown, lapsed, spent, or replayed."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons[0], where="session", do="Open a new session and attest again.", reasons=reasons)


class AppraisalRefused(Refused):
    """Evidence that earns no EAR, with every reason."""

    def __init__(self, reasons: tuple[str, ...], *, who: str = "guest") -> None:
        super().__init__(
            f"the guest is refused: {reasons[0]}",
            where=who,
            do="Start the approved image with the enrolled init-data, and attest afresh.",
            reasons=reasons,
        )


class ReleaseRefused(Refused):
    """A resource that is not released, with every rule that was against it."""

    def __init__(self, reasons: tuple[str, ...], *, resource: str) -> None:
        super().__init__(
            f"{resource} is not released: {reasons[0]}",
            where=resource,
            do="Ask its owner, whose policy and the charter's floor decide.",
            reasons=reasons,
        )


class SharesMissing(Refused):
    """A split resource of which too few good shares are at hand, with every broker that gave none and why."""

    def __init__(self, reasons: tuple[str, ...], *, resource: str) -> None:
        super().__init__(
            f"{resource} cannot be joined: {'; '.join(reasons)}",
            where=resource,
            do="Bring back the brokers that are named, or have the owner share it anew.",
            reasons=reasons,
        )


class BrokerUnavailable(Refused):
    """A broker that cannot decide now: out of reach, storage gone, or too many requests. Nothing was released."""

    def __init__(self, reason: str, *, where: str, reasons: tuple[str, ...] = ()) -> None:
        do = "Try again later; see the broker's log and /healthz."
        super().__init__(reason, where=where, do=do, reasons=reasons)


class BrokersDisagree(BrokerUnavailable):
    """Brokers of which too few say the same about the time or the charter's version: none of them is believed."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons[0], where="brokers", reasons=reasons)


class DepositRefused(Refused):
    """A resource that is not taken, with every reason."""

    def __init__(self, reasons: tuple[str, ...], *, resource: str) -> None:
        super().__init__(
            f"{resource} is not taken: {reasons[0]}",
            where=resource,
            do="Sign the deposit with the owner's member key, for this broker, now.",
            reasons=reasons,
        )


class StoreRefused(Refused):
    """A vault whose store is not what its brokers have committed: older, another, or gone."""

    def __init__(self, reasons: tuple[str, ...], *, vault: str) -> None:
        do = "Bring the newest disk back; if it is lost, see docs/how-to/recover-a-vault.md."
        super().__init__(f"the vault {vault} is refused: {reasons[0]}", where=vault, do=do, reasons=reasons)


class VaultFenced(Refused):
    """A vault that a newer boot of the same guest holds: the older one must stop."""

    def __init__(self, reasons: tuple[str, ...], *, vault: str) -> None:
        do = "Let the newer one run. If none does, start this guest once more: it takes the vault over."
        super().__init__(reasons[0], where=vault, do=do, reasons=reasons)


class BrokerRefused(Refused):
    """A broker's signed refusal, or a broker that is not what the charter says, with every reason."""

    def __init__(self, reasons: tuple[str, ...], *, where: str) -> None:
        super().__init__(
            reasons[0] if reasons else "refused",
            where=where,
            do="The reasons say what to correct; the broker's ledger has them too.",
            reasons=reasons,
        )


class CharterMoved(Refused):
    """A broker that follows a newer charter than the one at hand: fetch it and try again."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons[0], where="charter", do="Fetch the charter again.", reasons=reasons)


class EndorsementUnavailable(Unusable):
    """A certificate or a revocation list that is neither at hand nor to be had now."""
