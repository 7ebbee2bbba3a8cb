"""`seal charter release-policy|test-policy`: write rules, and ask rules and rights before anybody signs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.charter_files import judged, load_proposal, moment_of, read_file
from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from policies.questions import Place

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
At = Annotated[str | None, typer.Option("--at", metavar="RFC3339", help="The time to judge at (default: now).")]
Trust = Annotated[
    Path | None, typer.Option("--trust", metavar="ROOT", help="The first root that you trust (1.root.json).")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The charter's folder (metadata/ and targets/).")]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to `seal charter`."""
    app.command("release-policy", epilog="Example: seal charter release-policy --role site > key.data.rego")(
        release_policy
    )
    app.command(
        "test-policy",
        epilog="Examples: seal charter test-policy charter/ --resource a/key/b --input request.json; "
        "seal charter test-policy charter/ --about peers --here site/borealis --input peer.json --proposal new.json",
    )(question)


def release_policy(
    role: Annotated[list[str], typer.Option("--role", help="A role that may have the resource.")],
    name: Annotated[list[str] | None, typer.Option("--name", help="Only guests of this name.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="Only guests of this image.")] = None,
    member: Annotated[list[str] | None, typer.Option("--member", help="Only this member's guests.")] = None,
    jurisdiction: Annotated[
        list[str] | None, typer.Option("--jurisdiction", help="Only guests whose hosts stand there, as DE or US-CA.")
    ] = None,
    approve: Annotated[
        list[str] | None,
        typer.Option("--approve", metavar="ROLE/NAME=DIGEST", help="Only places whose init-data the owner approves."),
    ] = None,
    max_age: Annotated[int, typer.Option("--max-age", min=1, help="Seconds since the guest attested.")] = 300,
    max_releases: Annotated[int, typer.Option("--max-releases", min=1, help="How often in all.")] = 1000,
    kbs: Annotated[bool, typer.Option("--kbs", help="Stock guests may have it over the Key Broker protocol.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a release policy for a resource: put it at members/OWNER/release/TYPE.TAG.rego."""
    from policies.ready_made import release_policy as write_policy

    approved = dict(item.rpartition("=")[::2] for item in approve or ())
    text = write_policy(
        roles=role,
        names=name or (),
        images=image or (),
        members=member or (),
        jurisdictions=jurisdiction or (),
        approved_init_data=approved,
        max_session_age_seconds=max_age,
        max_releases=max_releases,
        kbs=kbs,
    ).decode("utf-8")
    if as_json:
        print_json({"policy": text})
    else:
        sys.stdout.write(text)


def question(
    folder: Folder,
    document: Annotated[Path, typer.Option("--input", metavar="JSON", help="What the rules see, or the facts of it.")],
    subject: Annotated[
        str, typer.Option("--about", help="release, appraisal, admission, peers, export or command.")
    ] = "release",
    resource: Annotated[str | None, typer.Option("--resource", help="REPOSITORY/TYPE/TAG, for a release.")] = None,
    here: Annotated[
        str | None,
        typer.Option(
            "--here",
            metavar="ROLE/NAME",
            help="The guest that asks: the charter fills in what it says of those whom the input names.",
        ),
    ] = None,
    proposal: Annotated[
        Path | None, typer.Option("--proposal", metavar="FILE", help="Answer for what this proposal would make, too.")
    ] = None,
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Would this evidence, job, peer, export or user's command be allowed? Exit status 1 if not.

    Tells the answer of each set of rules, now and after a proposal.
    """
    from policies.charter import current_charter, read_store
    from policies.inputs import INPUTS, input_complaints
    from policies.questions import SUBJECTS, ask, completed

    chosen = next((item for item in SUBJECTS if item == subject), None)
    if chosen is None or (chosen == "release") != (resource is not None):
        do = f"Name one of {', '.join(SUBJECTS)}; a release, and only that, needs --resource."
        raise Unusable(f"not a question about {subject}", where="--about, --resource", do=do)
    request, moment, place = _request(document), moment_of(at), _place(here)
    root = None if trust is None else read_file(trust)
    charters = {"now": current_charter(read_store(folder), root)}
    if proposal is not None:
        charters["after the proposal"], _, _ = judged(load_proposal(proposal), moment, trust)
    body: dict[str, Any] = {}
    for when, charter in charters.items():
        asked = completed(charter, chosen, request, place, moment)
        for complaint in input_complaints(chosen, asked) if chosen in INPUTS else ():
            sys.stderr.write(f"mind: {when}, the rules would see something else in earnest: {complaint}\n")
        answers = ask(charter, chosen, asked, resource)
        body[when] = {
            "allowed": all(answer.decision.allow for answer in answers),
            "rules": [
                {"file": a.file, "allow": a.decision.allow, "reasons": list(a.decision.reasons)} for a in answers
            ],
        }
    if as_json:
        print_json(body)
    for when, told in () if as_json else body.items():
        typer.echo(f"{when}: {'allowed' if told['allowed'] else 'denied'}")
        if not told["rules"]:
            typer.echo(f"    the charter has no policies/{chosen}.rego, which would make further demands")
        for rules in told["rules"]:
            typer.echo(f"    {rules['file']}: {'allows' if rules['allow'] else 'denies'}")
            for reason in rules["reasons"]:
                typer.echo(f"        {reason}")
    raise typer.Exit(0 if list(body.values())[-1]["allowed"] else 1)


def _request(document: Path) -> dict[str, Any]:
    try:
        request = json.loads(read_file(document).decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Unusable(f"not valid JSON: {error}", where=str(document), do="Give one JSON object.") from error
    if not isinstance(request, dict):
        raise Unusable("not a JSON object", where=str(document), do="Give one JSON object.")
    return request


def _place(here: str | None) -> Place | None:
    from policies.documents import ROLES

    if here is None:
        return None
    role, _, name = here.partition("/")
    for known in ROLES:
        if role == known and name:
            return known, name
    raise Unusable(f"{here!r} is no place", where="--here", do="Write ROLE/NAME, as site/borealis.")
