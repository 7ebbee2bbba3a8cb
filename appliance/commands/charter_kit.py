"""`seal charter user|enrol|kit`: from the plan in consortium.toml to places in the charter and kits for every host."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.charter_files import moment_of, open_key, put_files, read_file, tell, write_file
from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from policies.charter import Proposal

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
At = Annotated[str | None, typer.Option("--at", metavar="RFC3339", help="The time to judge at (default: now).")]
Trust = Annotated[
    Path | None, typer.Option("--trust", metavar="ROOT", help="The first root that you trust (1.root.json).")
]
PlanFile = Annotated[
    Path, typer.Argument(metavar="TOML", help="consortium.toml, with the hosts' plan in its table [deployment].")
]
CharterFolder = Annotated[Path, typer.Option("--charter", metavar="DIR", help="The charter's folder.")]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to `seal charter`."""
    app.command(epilog="Example: seal charter user me/ --as acme-pharma/ada --trust-domain virtual.atlas.example")(user)
    app.command(epilog="Example: seal charter enrol consortium.toml --charter charter/ --out places.json")(enrol)
    app.command(epilog="Example: seal charter kit consortium.toml --charter charter/ --key acme.key --out kits/")(kit)


def user(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys, on your own machine.")],
    name: Annotated[str, typer.Option("--as", metavar="MEMBER/USER", help="Who you are.")],
    trust_domain: Annotated[str, typer.Option("--trust-domain", help="As consortium.toml has it.")],
    submits: Annotated[
        bool, typer.Option("--submits", help="Make a key for first models as well: for those who submit jobs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a person's keys, and the request (DIR/request.json) that goes to the plan's author. Nothing else travels."""
    import re

    from appliance.kits.user_keys import REQUEST, create_user_keys, write_user_keys
    from policies.documents import NAME_PATTERN

    member, slash, person = name.partition("/")
    if not slash or not all(re.fullmatch(NAME_PATTERN, part) for part in (member, person)):
        raise Unusable(f"{name!r} is no user", where="--as", do="Write MEMBER/USER, as acme-pharma/ada.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,252}", trust_domain):
        raise Unusable(f"{trust_domain!r} is no trust domain", where="--trust-domain", do="See consortium.toml.")
    keys = create_user_keys(trust_domain, member, person, moment_of(None).replace(microsecond=0))
    write_user_keys(folder, keys, model_key=os.urandom(32) if submits else None)
    if as_json:
        print_json({"folder": str(folder), "request": str(folder / REQUEST)})
        return
    sys.stderr.write(f"Made the keys of {name}. Send {folder / REQUEST} to the author of consortium.toml.\n")


def enrol(
    plan_file: PlanFile,
    charter: CharterFolder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the proposal is written.")],
    put: Annotated[
        list[str] | None,
        typer.Option("--put", metavar="PATH=FILE", help="Put FILE at a path as well, as code/DIGEST.json=bundle.toml."),
    ] = None,
    note: Annotated[str, typer.Option("--note", help="One line for those who sign.")] = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose what the plan needs and the charter lacks: its images, a place for every guest, its users.

    Images are read from the plan's folders (verify them first: `seal image verify`); init-data are made for each guest,
    and their digests are what members sign. What the charter has and the plan does not name stays.
    """
    from appliance.kits.enrolling import planned_documents
    from appliance.kits.plan import read_plan
    from policies.charter import Changes, current_charter, files_of, propose, read_store, write_proposal

    moment = moment_of(at)
    root = None if trust is None else read_file(trust)
    store = read_store(charter)
    current = current_charter(store, root)
    plan = read_plan(read_file(plan_file), str(plan_file))
    wanted = files_of(planned_documents(plan, current, plan_file.parent))
    wanted |= put_files(put)
    missing = {path: raw for path, raw in wanted.items() if current.files.get(path) != raw}
    if not missing:
        raise Unusable("the charter has all of the plan already", where=str(plan_file), do="Make the kits.")
    proposal: Proposal = propose(store, Changes(put=missing), moment, root=root, note=note)
    write_file(out, write_proposal(proposal))
    told = tell(proposal, moment, trust, as_json=as_json)
    if as_json:
        print_json({"proposal": str(out), **told})


def kit(
    plan_file: PlanFile,
    charter: CharterFolder,
    key: Annotated[
        str, typer.Option("--key", metavar="FILE-OR-URI", help="A member's private key: a file, or pkcs11:….")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the kits' folders are made.")],
    member: Annotated[str | None, typer.Option("--member", help="Only this member's kits.")] = None,
    pin_file: Annotated[
        Path | None, typer.Option("--pin-file", metavar="FILE", help="The token's PIN, in a file of mode 0600.")
    ] = None,
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Make one signed kit for each broker, guest and user of the plan. None holds a secret."""
    from appliance.kits.making import make_kits, write_kit
    from appliance.kits.plan import read_plan
    from policies.charter import read_store

    root = None if trust is None else read_file(trust)
    plan = read_plan(read_file(plan_file), str(plan_file))
    moment = moment_of(at).replace(microsecond=0)
    made = make_kits(plan, read_store(charter), root, open_key(key, pin_file), moment, member=member)
    for one in made:
        write_kit(one, out / one.name)
    if as_json:
        print_json(
            {
                "charter": made[0].manifest.charter,
                "version": made[0].manifest.charter_version,
                "kits": [
                    {"folder": str(out / one.name), "member": one.manifest.member, "place": one.manifest.place}
                    for one in made
                ],
            }
        )
        return
    for one in made:
        typer.echo(f"{out / one.name}  for {one.manifest.member}: {one.manifest.place}")
    sys.stderr.write("Give each to its operator, who runs `seal doctor KIT` first.\n")
