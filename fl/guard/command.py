"""May this user's command be done here? Server and sites decide it each on their own, from the charter alone.

The rules, all of which are checked and every broken one told:
- it is signed by a user of the charter, about this charter, this server and this job;
- it is fresh where it arrives first: within SKEW of the server's clock, and each nonce once; where it comes later (at a
  site that was away), it is not older than a job's record may be, unless it is about the site itself;
- the user has the right that the command needs (`policies.rights`);
- at a site, a member's word on a job (`approve`, `reject`) is that of the site's own member;
- who restarts or stops a site or a server is a user of its own member, at the server as at the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from attestation.jws import ed25519_public_key, read_jws, read_jws_header
from fl.errors import CommandRefused
from fl.guard.approval import MAX_AGE, SKEW
from fl.jobs.command import COMMAND_TYPE, MAX_COMMAND, UserCommand, parse_command
from policies.errors import SealwrightError
from policies.rights import command_reasons

if TYPE_CHECKING:
    from policies.charter import Charter
    from policies.documents import User

MAX_NONCES: Final = 100_000
"""Nonces that a guest remembers; those whose time is over go first."""


@dataclass(frozen=True, slots=True)
class SignedCommand:
    """A command whose signature and user were checked."""

    token: str
    command: UserCommand
    user: User


def read_command(token: str, charter: Charter) -> SignedCommand:
    """The command in `token` and the user who signed it. Raises CommandRefused."""
    try:
        if len(token) > MAX_COMMAND:
            raise CommandRefused("(unknown)", "(unknown)", (f"it has {len(token)} characters",))
        signer = read_jws_header(token, typ=COMMAND_TYPE)
        member, _, name = signer.partition("/")
        user = charter.user(member, name)
        if user is None:
            raise CommandRefused(
                "(unknown)",
                "(unknown)",
                (f"its signer {signer!r:.140} is no user of charter version {charter.version}",),
            )
        command = parse_command(read_jws(token, ed25519_public_key(user.signing_key), typ=COMMAND_TYPE))
    except CommandRefused:
        raise
    except SealwrightError as error:
        raise CommandRefused("(unknown)", "(unknown)", (error.what,)) from error
    if command.user != signer:
        raise CommandRefused(command.command, command.user, (f"it names {command.user} but {signer} signed it",))
    return SignedCommand(token, command, user)


def check_command(
    signed: SignedCommand,
    charter: Charter,
    at: datetime,
    *,
    server: str,
    job: str | None = None,
    submitter: str | None = None,
    own_member: str | None = None,
    place: tuple[str, str] | None = None,
) -> None:
    """Check that the command may be done at `at`. Raises CommandRefused with every reason.

    `job` is the job that it has to be about, `submitter` who submitted that; `place` the site or server, and its
    member. `own_member` is a site's member; None at the server.
    """
    reasons = tuple(
        _reasons(signed, charter, at, server=server, job=job, submitter=submitter, own_member=own_member, place=place)
    )
    if reasons:
        raise CommandRefused(signed.command.command, signed.command.user, reasons)


def _reasons(
    signed: SignedCommand,
    charter: Charter,
    at: datetime,
    *,
    server: str,
    job: str | None,
    submitter: str | None,
    own_member: str | None,
    place: tuple[str, str] | None,
) -> Iterator[str]:
    command = signed.command
    if command.charter != charter.id:
        yield f"it is about another charter ({command.charter[:16]}…)"
    if command.server != server:
        yield f"it is for the server {command.server}, not {server}"
    if job is not None and command.job != job:
        yield f"it is about the job {command.job}, not {job}"
    name, member = place or (None, "")
    if command.place != name:
        yield f"it is about {command.place or 'no site'}, not {name or 'a job'}"
    oldest = at - (SKEW if own_member is None or place is not None else MAX_AGE)
    if not oldest <= command.created_at <= at + SKEW:
        yield f"it was signed at {command.created}, which is not now"
    yield from command_reasons(charter, command.user, command.command, submitter=submitter)
    if own_member is not None and command.command in {"approve", "reject"} and signed.user.member != own_member:
        yield f"{command.user} does not speak for {own_member}"
    if place is not None and signed.user.member != member:
        yield f"{command.user} does not speak for {member}, whose {name} is"


class Nonces:
    """The nonces of the latest commands that came to a guest: each counts once. For use under its owner's lock."""

    def __init__(self, kept: timedelta = SKEW) -> None:
        """`kept`: how old a command may be that counts (SKEW at a server, MAX_AGE at a site)."""
        self._kept = kept
        self._seen: dict[str, datetime] = {}

    def take(self, command: UserCommand, at: datetime) -> None:
        """Remember a command. Raises CommandRefused if it came before, or if too many are remembered to be sure."""
        ended = at - self._kept - timedelta(seconds=1)
        if len(self._seen) >= MAX_NONCES:
            self._seen = {nonce: created for nonce, created in self._seen.items() if created >= ended}
        nonce = f"{command.user} {command.nonce}"
        if nonce in self._seen:
            raise CommandRefused(command.command, command.user, ("it came before: each command counts once",))
        if len(self._seen) >= MAX_NONCES:
            raise CommandRefused(
                command.command, command.user, ("too many commands came lately to tell new ones from old",)
            )
        self._seen[nonce] = command.created_at
