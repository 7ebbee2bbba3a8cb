"""Users' commands that come to a site by way of its server: judged here, from the charter alone, and written down.

The server is believed nothing about who wanted what: a command without its user's own signature, or beyond its user's
rights, has no effect here, and the ledger has that it was shown.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fl.errors import CommandRefused
from fl.guard.approval import MAX_AGE
from fl.guard.command import Nonces, SignedCommand, check_command, read_command
from fl.guard.command_log import CommandLog
from fl.jobs.command import UserCommand
from fl.party import Party
from fl.transport.frames import Steer, Told
from policies.errors import SealwrightError

MAX_REJECTED: Final = 10_000
"""Rejections that a site remembers; the oldest go first."""


class Orders:
    """What users have ordered at one site. For one thread."""

    def __init__(self, party: Party, site: str, server: str) -> None:
        self._party = party
        self._site = site
        self._server = server
        self._nonces = Nonces(MAX_AGE)
        self._rejected: OrderedDict[str, UserCommand] = OrderedDict()
        self.log = CommandLog(party.record, party.tell, {"site": site})

    def heed(self, told: Told, submitter: str | None) -> SignedCommand | None:
        """Judge a command about a job that `submitter` submitted (None: it does not run here).

        Returns it if it is to be done here; None if it was refused, which is told and written down.
        """
        user = None
        verb, token = "unknown", ""
        try:
            charter, at = self._party.charter(), self._party.clock()
            signed = read_command(told.command, charter)
            user, verb, token = signed.command.user, signed.command.command, signed.token
            place = charter.enrolment("site", self._site)
            check_command(
                signed,
                charter,
                at,
                server=self._server,
                job=told.job,
                submitter=submitter,
                own_member="" if place is None else place.member,
            )
            self._must_not_be_overtaken(signed.command, told.job)
            self._nonces.take(signed.command, at)
        except SealwrightError as error:
            self._party.tell(f"job {told.job}: the server shows a command that is refused here: {error.what}")
            self.log.refused(user, verb, told.job, error, token)
            return None
        return signed if self._written(signed, told.job) else None

    def steered(self, steer: Steer) -> SignedCommand | None:
        """Judge a command about this site itself. Returns it if it is to be done; None if it was refused."""
        user: str | None = None
        verb, token = "unknown", ""
        try:
            charter, at = self._party.charter(), self._party.clock()
            signed = read_command(steer.command, charter)
            user, verb, token = signed.command.user, signed.command.command, signed.token
            enrolled = charter.enrolment("site", self._site)
            member = "" if enrolled is None else enrolled.member
            place = self._site, member
            check_command(signed, charter, at, server=self._server, own_member=member, place=place)
            self._nonces.take(signed.command, at)
            self.log.accepted(user, verb, None, token)
        except SealwrightError as error:
            self._party.tell(f"the server shows a command that is refused here: {error.what}")
            self.log.refused(user, verb, None, error, token)
            return None
        return signed

    def why_rejected(self, job: str) -> str | None:
        """The sentence that names who has rejected a job for this site, if somebody has."""
        rejection = self._rejected.get(job)
        return None if rejection is None else f"{rejection.user} has rejected the job"

    def _must_not_be_overtaken(self, command: UserCommand, job: str) -> None:
        """A server may hold a command back: an approval that is older than the rejection does not take it back."""
        rejection = self._rejected.get(job)
        if command.command == "approve" and rejection is not None and command.created_at < rejection.created_at:
            raise CommandRefused(
                command.command, command.user, (f"{rejection.user} has rejected the job after this was signed",)
            )

    def _written(self, signed: SignedCommand, job: str) -> bool:
        """Write it down, and remember a rejection. What only stops something is done even if no ledger is there."""
        command = signed.command
        try:
            self.log.accepted(command.user, command.command, job, signed.token)
        except SealwrightError as error:
            self._party.tell(f"job {job}: {command.command} by {command.user} is not in the ledger: {error.what}")
            if command.command == "approve":
                return False
        if command.command == "reject":
            self._rejected[job] = command
            while len(self._rejected) > MAX_REJECTED:
                self._rejected.popitem(last=False)
        elif command.command == "approve":
            self._rejected.pop(job, None)
        return True
