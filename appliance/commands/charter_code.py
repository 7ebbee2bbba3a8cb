"""`seal charter approve`, `reject`, `revoke`: decide about a job's bundle, as a proposal for the `code` role."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.charter_files import moment_of, read_file, tell, write_file
from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl.jobs.bundle import Bundle
    from policies.charter import Changes, Charter
    from policies.documents import Allowance

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
At = Annotated[str | None, typer.Option("--at", metavar="RFC3339", help="The time to judge at (default: now).")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the proposal is written.")]
Trust = Annotated[
    Path | None, typer.Option("--trust", metavar="ROOT", help="The first root that you trust (1.root.json).")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The charter's folder (metadata/ and targets/).")]
BundleFile = Annotated[Path, typer.Argument(metavar="BUNDLE", help="job.bundle, as `seal job bundle` made it.")]
Note = Annotated[str, typer.Option("--note", help="One line, in the charter for all to read.")]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to `seal charter`."""
    app.command(epilog="Example: seal charter approve charter/ job.bundle --jobs 2 --days 90 --out approve.json")(
        approve
    )
    app.command(epilog="Example: seal charter reject charter/ job.bundle --note 'writes files' --out reject.json")(
        reject
    )
    app.command(epilog="Example: seal charter revoke charter/ 4f0c…64 hex digits --out revoke.json")(revoke)


def approve(
    folder: Folder,
    file: BundleFile,
    out: Out,
    site: Annotated[list[str] | None, typer.Option("--site", help="A site where it may run (default: all).")] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long.")] = 90,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=100_000, help="The export budget: so many jobs' declared outputs.")
    ] = 1,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", min=0, help="Of privacy, over all its jobs (default: as for --jobs).")
    ] = None,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose that a bundle may run: where, until when, and how much its jobs may let out of each member's sites."""
    from policies.charter import Changes, files_of
    from policies.documents import BundleApproval

    bundle, moment = _bundle(file), moment_of(at)

    def changes(charter: Charter) -> Changes:
        sites = tuple(site) if site else tuple(one.name for one in charter.enrolments() if one.role == "site")
        if not sites:
            raise Unusable("no site is enrolled", where=str(folder), do="Enrol sites first: seal charter enrol.")
        approval = BundleApproval(
            bundle=bundle.digest,
            job=bundle.settings.name,
            sites=sites,
            note=note,
            expires=_later(moment, days),
            budget=_budget(bundle, jobs, epsilon, len(sites)),
        )
        return Changes(put=files_of([approval]))

    _propose(folder, trust, moment, note, out, changes, as_json)


def reject(
    folder: Folder,
    file: BundleFile,
    out: Out,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose the word that a bundle may not run, so that nobody is asked again; an approval of it is withdrawn."""
    from policies.charter import Changes, files_of
    from policies.documents import BundleApproval

    bundle, moment = _bundle(file), moment_of(at)

    def changes(charter: Charter) -> Changes:
        sites = tuple(one.name for one in charter.enrolments() if one.role == "site") or ("none",)
        rejection = BundleApproval(
            bundle=bundle.digest,
            job=bundle.settings.name,
            sites=sites,
            note=note,
            expires=_later(moment, 3650),
            verdict="rejected",
        )
        return Changes(put=files_of([rejection]))

    _propose(folder, trust, moment, note, out, changes, as_json)


def revoke(
    folder: Folder,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The bundle's digest, 64 hex digits.")],
    out: Out,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose that a bundle runs no more: its running jobs end within one lease of the charter's publication."""
    from policies.charter import Changes

    def changes(charter: Charter) -> Changes:
        if charter.bundle(digest) is None:
            raise Unusable(
                f"the charter approves no bundle {digest[:80]}", where="DIGEST", do="`seal charter show` lists them."
            )
        return Changes(remove=frozenset({f"code/{digest}.json"}))

    _propose(folder, trust, moment_of(at), note, out, changes, as_json)


def _propose(
    folder: Path,
    trust: Path | None,
    moment: datetime,
    note: str,
    out: Path,
    changes: Callable[[Charter], Changes],
    as_json: bool,
) -> None:
    from policies.charter import current_charter, propose, read_store, write_proposal

    store = read_store(folder)
    root = None if trust is None else read_file(trust)
    made = changes(current_charter(store, root))
    proposal = propose(store, made, moment, root=root, note=note)
    write_file(out, write_proposal(proposal))
    told = tell(proposal, moment, trust, as_json=as_json)
    if as_json:
        print_json({"proposal": str(out), **told})


def _bundle(file: Path) -> Bundle:
    from fl.jobs.bundle import MAX_BUNDLE, parse_bundle

    return parse_bundle(read_file(file, MAX_BUNDLE))


def _later(moment: datetime, days: int) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0) + timedelta(days=days)


def _budget(bundle: Bundle, jobs: int, epsilon: float | None, sites: int) -> Allowance:
    """What so many jobs declare that they let out of one site: every site of a member spends the same budget."""
    from fl.jobs.outputs import capacity
    from policies.budgets import PICO
    from policies.documents import Allowance

    settings = bundle.settings
    privacy = settings.privacy
    bits = capacity(bundle, sites).job * jobs
    if privacy is None:
        return Allowance(bits=bits, epsilon=epsilon)
    from fl.guard.accounting import debited

    costs = [debited(privacy, round_) for round_ in range(settings.num_rounds)]
    micro, pico = sum(cost for cost, _ in costs) * jobs, sum(delta for _, delta in costs) * jobs
    return Allowance(bits=bits, epsilon=(micro + 1) / 10**6 if epsilon is None else epsilon, delta=(pico + 1) / PICO)
