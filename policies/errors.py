"""Errors that a person reads: what was wrong, where, and what to do.

Every package derives its own errors from the two kinds here, so that one place (the `seal` command, the broker's
answers) can turn any of them into the right exit status: *unusable* input is 2, a *refusal* is 1 (DESIGN.md section 6).
"""


class SealwrightError(Exception):
    """What was wrong, where it was found, and what its reader can do about it."""

    def __init__(self, what: str, *, where: str, do: str) -> None:
        super().__init__(f"{what} ({where}). {do}")
        self.what = what
        self.where = where
        self.do = do


class Unusable(SealwrightError):
    """Input that cannot be used at all: malformed, missing, of the wrong kind (exit status 2)."""


class Refused(SealwrightError):
    """A check that failed, or a decision against the request (exit status 1).

    `reasons` holds every reason, one sentence each, never only the first.
    """

    def __init__(self, what: str, *, where: str, do: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, do=do)
        self.reasons = reasons or (what,)


class MalformedDocument(Unusable):
    """A document of the charter, an init-data file or a proposal whose bytes are not what their kind demands."""


class UnusableKey(Unusable):
    """A key file that is missing, of the wrong kind, or readable by others than its owner."""


class CharterRefused(Refused):
    """A charter that does not hold at the time it is judged at; `.reasons` has every reason."""


class ProposalRefused(Refused):
    """A proposal that cannot be made, signed or published as it stands; `.reasons` has every reason."""


class KitRefused(Refused):
    """A kit that is not as its maker signed it, or not what its charter says; `.reasons` names every file."""
