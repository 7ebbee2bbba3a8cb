"""What a user's rights allow: each command to a server, and the right that it needs.

Server and sites ask this each on their own, of the charter as it is then; rules (`policies.questions`) do not widen it.
"""

from __future__ import annotations

from typing import Final, Literal

from policies.charter import Charter
from policies.documents import Right

Command = Literal[
    "submit", "abort", "delete", "clone", "download", "list", "report", "watch", "approve", "reject", "restart", "stop"
]
NEEDED: Final[dict[Command, Right]] = {
    "submit": "submit",
    "abort": "operate",
    "delete": "operate",
    "clone": "submit",
    "download": "download",
    "list": "view",
    "report": "view",
    "watch": "view",
    "approve": "approve",
    "reject": "approve",
    "restart": "operate",
    "stop": "operate",
}
"""`approve` and `reject` are a member's word on a job at its own sites; `restart` and `stop` are about a site or a
server, by users of its own member alone; `report` is `seal job status`, `clone` is by the job's submitter alone."""
OWN: Final[frozenset[Command]] = frozenset({"abort", "delete"})
"""What who may submit may do with the own jobs, without the right to operate."""
COMMANDS: Final[tuple[Command, ...]] = tuple(NEEDED)


def command_reasons(charter: Charter, user: str, command: Command, *, submitter: str | None = None) -> tuple[str, ...]:
    """Return why `user` (MEMBER/NAME) may not give `command`; empty if it may.

    `submitter` is who submitted the job that the command is about: while one may submit, one may stop and delete one's
    own jobs.
    """
    member, _, name = user.partition("/")
    found = charter.user(member, name)
    if found is None:
        return (f"{user} is no user of charter version {charter.version}",)
    needed = NEEDED[command]
    if command == "clone" and submitter is not None and submitter != user:
        return (f"{user} did not submit the job",)
    if found.may(needed):
        return ()
    if command in OWN:
        if submitter == user and found.may("submit"):
            return ()
        return (f"{user} neither submitted the job nor has the right to operate",)
    return (f"{user} has no right to {needed}",)
