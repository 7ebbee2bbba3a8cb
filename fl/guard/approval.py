"""May this job run here? Server and every site decide it on their own, from the charter alone, before each start.

The rules, all of which are checked and every broken one told:
- the job record is signed by a user whom the charter lets submit, about this charter, and not older than MAX_AGE;
- it names this server; a site is on its roster; every site on the roster is enrolled, every recipient may download;
- the bundle has the record's digest, the charter's `code` role approves that digest for this job's name and all the
  roster's sites, bounds what its jobs may let out, and has not expired;
- rounds and the least number of sites are those of the approved bundle;
- the bundle's lock goes with the packages that are installed here (`check_lock`, before a start);
- the charter's further demands (`policies/admission.rego`, if it has any) are met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from attestation.jws import ed25519_public_key, read_jws, read_jws_header
from fl.errors import ApprovalRefused
from fl.jobs.bundle import Bundle
from fl.jobs.lock import lock_reasons
from fl.jobs.packages import Packages
from fl.jobs.record import RECORD_TYPE, JobRecord, parse_record
from fl.jobs.settings import FedBuffOptions
from policies.errors import SealwrightError
from policies.questions import admission_reasons

if TYPE_CHECKING:
    from policies.charter import Charter
    from policies.documents import Role, User

MAX_AGE: Final = timedelta(hours=24)
"""A record that was signed longer ago starts nothing."""
SKEW: Final = timedelta(minutes=5)
"""How far a submitter's clock may be ahead."""


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """A job record whose signature and submitter were checked."""

    token: str
    record: JobRecord
    submitter: User


def read_record(token: str, charter: Charter) -> SignedRecord:
    """The record in `token` and the user who signed it. Raises ApprovalRefused."""
    try:
        signer = read_jws_header(token, typ=RECORD_TYPE)
        member, _, name = signer.partition("/")
        user = charter.user(member, name)
        if user is None:
            raise ApprovalRefused("(unknown)", (f"its signer {signer!r:.140} is no user of this charter",))
        record = parse_record(read_jws(token, ed25519_public_key(user.signing_key), typ=RECORD_TYPE))
    except ApprovalRefused:
        raise
    except SealwrightError as error:
        raise ApprovalRefused("(unknown)", (error.what,)) from error
    if record.submitter != signer:
        raise ApprovalRefused(record.job, (f"it names {record.submitter} as its submitter but {signer} signed it",))
    return SignedRecord(token, record, user)


def approve(
    signed: SignedRecord,
    bundle: Bundle,
    charter: Charter,
    at: datetime,
    *,
    server: str,
    site: str | None,
    role: Role = "site",
    received: datetime | None = None,
) -> None:
    """Check that the job may run at `server`, or at `site` (a guest of the role `role`) under that server.

    `received` is when the record came here (None: `at`): its age counts until then. Raises ApprovalRefused with every
    reason.
    """
    record = signed.record
    reasons = (
        *_record_reasons(
            signed, charter, received or at, server=server, site=site, role=role, roles=roster_roles(bundle)
        ),
        *_bundle_reasons(record, bundle, charter, at),
    )
    if not reasons:
        here: tuple[Role, str] = ("server", server) if site is None else (role, site)
        reasons = admission_reasons(charter, job_facts(record, bundle), *here, at)
    if reasons:
        raise ApprovalRefused(record.job, reasons)


def job_facts(record: JobRecord, bundle: Bundle) -> dict[str, Any]:
    """What the consortium's rules see of a job: its record, and of a job of devices how many an aggregate is of."""
    options = bundle.settings.options
    devices = {"devices": options.edge.models.num_updates_for_model} if isinstance(options, FedBuffOptions) else {}
    return {**record.model_dump(mode="json"), **devices}


def check_lock(record: JobRecord, bundle: Bundle, packages: Packages) -> None:
    """Check that the bundle's code finds here the packages that its lock names. Raises ApprovalRefused with every
    package that is another one."""
    reasons = tuple(lock_reasons(bundle.files, bundle.settings, packages))
    if reasons:
        raise ApprovalRefused(record.job, reasons)


_ROLE_WORDS: Final = {"inner": "an inner node"}


def roster_roles(bundle: Bundle) -> tuple[Role, ...]:
    """The roles of the guests on the roster of a job of this bundle: sites, or for devices the nodes of the tree."""
    return ("gateway", "inner") if bundle.settings.recipe == "fedbuff" else ("site",)


def _record_reasons(
    signed: SignedRecord,
    charter: Charter,
    received: datetime,
    *,
    server: str,
    site: str | None,
    role: Role,
    roles: tuple[Role, ...],
) -> Iterator[str]:
    record = signed.record
    if not signed.submitter.may("submit"):
        yield f"{record.submitter} has no right to submit jobs"
    if record.charter != charter.id:
        yield f"the record is about another charter ({record.charter[:16]}…)"
    if not received - MAX_AGE <= record.created_at <= received + SKEW:
        yield f"the record was signed at {record.created}, not within the last {MAX_AGE // timedelta(hours=1)} hours"
    if record.server != server:
        yield f"the record is for the server {record.server}, not {server}"
    if site is not None and role not in roles:
        yield f"a {role} has no part in jobs of this kind"
    if site is not None and site not in record.roster:
        yield f"{site} is not on the job's roster"
    for name in record.roster:
        if all(charter.enrolment(role, name) is None for role in roles):
            words = " or ".join(_ROLE_WORDS.get(role, f"a {role}") for role in roles)
            yield f"the roster names {name}, which is not enrolled as {words}"
    for recipient in record.recipients:
        member, _, name = recipient.partition("/")
        user = charter.user(member, name)
        if user is None or not user.may("download"):
            yield f"the recipient {recipient} may not download results"


def _bundle_reasons(record: JobRecord, bundle: Bundle, charter: Charter, at: datetime) -> Iterator[str]:
    if bundle.digest != record.bundle:
        yield f"the bundle's digest is {bundle.digest}, the record's {record.bundle}"
    settings = bundle.settings
    if (record.name, record.rounds, record.min_sites) != (settings.name, settings.num_rounds, settings.min_clients):
        yield "the record's name, rounds or least number of sites are not the bundle's"
    verdict = charter.verdict(bundle.digest)
    if verdict is not None and verdict.verdict == "rejected":
        yield f"the bundle was rejected{': ' + verdict.note if verdict.note else ''}"
    approval = charter.bundle(bundle.digest)
    if approval is None:
        yield f"the bundle {bundle.digest} is not approved in charter version {charter.version}"
        return
    if approval.job != settings.name:
        yield f"the bundle is approved for the job {approval.job}, not {settings.name}"
    if approval.expires <= at:
        yield f"the bundle's approval expired at {approval.expires:%Y-%m-%dT%H:%M:%SZ}"
    if approval.budget is None or approval.budget.bits is None:
        yield "the bundle's approval does not bound what its jobs may let out, in bits (seal charter approve --jobs)"
    outside = sorted(set(record.roster) - set(approval.sites))
    if outside:
        yield f"the bundle is not approved for {', '.join(outside)}"
