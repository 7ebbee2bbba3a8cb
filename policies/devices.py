"""What a charter says of devices: who may let them in, and which tasks may run on them."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from policies.forms import Digest, Document, Instant, Name, PublicKey, Text

MAX_TOKEN_SECONDS: Final = 366 * 86400
MAX_REVOKED: Final = 4096
"""Every device has the charter: what it says of others must stay small."""
_JOB_PATTERN: Final = r"^[a-z0-9A-Z][a-zA-Z0-9._-]{0,62}\*?$|^\*$"
DeviceId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
JobPattern = Annotated[str, StringConstraints(pattern=_JOB_PATTERN)]
"""A job's name, or the beginning of one followed by `*`."""


class DeviceIssuer(Document):
    """Who may let devices in: target `enrolments/device-issuer/NAME.json`.

    Tokens and certificates that `signing_key` signs are good for at most `token_seconds`, and for jobs that one of
    `jobs` names; for the devices with the ids in `revoked` they are good for nothing. An id may be taken out when all
    that was signed for it has ended.
    """

    name: Name
    member: Name
    signing_key: PublicKey
    jobs: tuple[JobPattern, ...] = Field(default=("*",), min_length=1, max_length=64)
    token_seconds: int = Field(default=90 * 86400, ge=60, le=MAX_TOKEN_SECONDS)
    revoked: tuple[DeviceId, ...] = Field(default=(), max_length=MAX_REVOKED)

    @cached_property
    def revoked_ids(self) -> frozenset[str]:
        """The same, to look into."""
        return frozenset(self.revoked)


class TaskApproval(Document):
    """A task that devices may run (fl.edge.task), for which job and until when: target `code/device-DIGEST.json`."""

    task: Digest
    job: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    note: Text = ""
    expires: Instant


def is_job_pattern(text: str) -> bool:
    """Whether `text` can be a JobPattern."""
    return re.fullmatch(_JOB_PATTERN, text) is not None


def job_matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of `patterns` names the job `name`."""
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in patterns)
