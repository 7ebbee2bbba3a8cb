"""What a charter says of devices: who may let them in, and which tasks may run on them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, StringConstraints

from policies.forms import Digest, Document, Instant, Name, PublicKey, Text

MAX_TOKEN_SECONDS: Final = 366 * 86400
JobPattern = Annotated[str, StringConstraints(pattern=r"^[a-z0-9A-Z][a-zA-Z0-9._-]{0,62}\*?$|^\*$")]
"""A job's name, or the beginning of one followed by `*`."""


class DeviceIssuer(Document):
    """Who may let devices in: target `enrolments/device-issuer/NAME.json`.

    Tokens that `signing_key` signs are good for at most `token_seconds`, and for jobs that one of `jobs` names.
    """

    name: Name
    member: Name
    signing_key: PublicKey
    jobs: tuple[JobPattern, ...] = Field(default=("*",), min_length=1, max_length=64)
    token_seconds: int = Field(default=90 * 86400, ge=60, le=MAX_TOKEN_SECONDS)


class TaskApproval(Document):
    """A task that devices may run (fl.edge.task), for which job and until when: target `code/device-DIGEST.json`."""

    task: Digest
    job: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    note: Text = ""
    expires: Instant


def job_matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of `patterns` names the job `name`."""
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in patterns)
