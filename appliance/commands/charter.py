"""`seal charter`: found, change, sign, publish and read a consortium's charter.

Thin over `policies.charter`: files are read and written here, everything else is a function there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.charter_files import (
    consortium_file,
    judged,
    load_proposal,
    moment_of,
    open_key,
    put_files,
    read_file,
    tell,
    write_file,
)
from appliance.charter_images import image_targets
from appliance.commands.charter_code import add_verbs as add_code_verbs
from appliance.commands.charter_kit import add_verbs
from appliance.commands.charter_policy import add_verbs as add_policy_verbs
from appliance.output import print_json
from policies.errors import ProposalRefused, Unusable

if TYPE_CHECKING:
    from policies.charter import Changes, Charter, Proposal

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Found, change, sign and read a consortium's charter."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
At = Annotated[str | None, typer.Option("--at", metavar="RFC3339", help="The time to judge at (default: now).")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the proposal is written.")]
Trust = Annotated[
    Path | None, typer.Option("--trust", metavar="ROOT", help="The first root that you trust (1.root.json).")
]
PinFile = Annotated[
    Path | None, typer.Option("--pin-file", metavar="FILE", help="The token's PIN, in a file of mode 0600.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The charter's folder (metadata/ and targets/).")]
ProposalFile = Annotated[Path, typer.Argument(metavar="PROPOSAL", help="The proposal's file.")]
Note = Annotated[str, typer.Option("--note", help="One line for those who sign.")]
Put = Annotated[
    list[str] | None,
    typer.Option("--put", metavar="PATH=FILE", help="Put FILE at a path, as images/demo.json=demo.toml."),
]


@app.command(epilog="Example: seal charter key acme.key --public acme.pub")
def key(
    file: Annotated[
        str, typer.Argument(metavar="FILE-OR-URI", help="Where the private key is kept: a file (0600), or pkcs11:….")
    ],
    public: Annotated[Path | None, typer.Option("--public", metavar="FILE", help="Write the public half here.")] = None,
    pin_file: PinFile = None,
    as_json: AsJson = False,
) -> None:
    """Make an Ed25519 key for a member or a broker. The private half never leaves the file or the token."""
    from policies.keys import fingerprint, generate_ed25519, public_pem

    if file.startswith("pkcs11:"):
        from policies.token import generate_token_key

        pem = generate_token_key(file, pin_file).public_pem()
    else:
        pem = public_pem(generate_ed25519(Path(file)))
    if public is not None:
        write_file(public, pem.encode("ascii"))
    if as_json:
        print_json({"public": pem, "fingerprint": fingerprint(pem)})
    else:
        sys.stdout.write(pem)
        sys.stderr.write(f"fingerprint {fingerprint(pem)}\n")


@app.command(epilog="Example: seal charter init consortium.toml --put images/demo.json=demo.toml --out founding.json")
def init(
    consortium: Annotated[Path, typer.Argument(metavar="TOML", help="Members, brokers, threshold, platform.")],
    out: Out,
    put: Put = None,
    bare: Annotated[bool, typer.Option("--bare", help="Leave out the ready-made policies.")] = False,
    note: Note = "",
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose the founding of a charter; its members sign the proposal with `seal charter sign`."""
    from policies.charter import propose_founding, write_proposal
    from policies.ready_made import shared_policies

    moment = moment_of(at)
    files = {**({} if bare else shared_policies()), **put_files(put)}
    proposal = propose_founding(consortium_file(consortium), files, moment, note=note)
    write_file(out, write_proposal(proposal))
    told = tell(proposal, moment, None, as_json=as_json)
    if as_json:
        print_json({"proposal": str(out), **told})


def _propose(
    folder: Path,
    trust: Path | None,
    at: str | None,
    note: str,
    out: Path,
    changes: Callable[[Charter], Changes],
    as_json: bool,
) -> None:
    from policies.charter import current_charter, propose, read_store, write_proposal

    moment = moment_of(at)
    store = read_store(folder)
    root = None if trust is None else read_file(trust)
    proposal = propose(store, changes(current_charter(store, root)), moment, root=root, note=note)
    write_file(out, write_proposal(proposal))
    told = tell(proposal, moment, trust, as_json=as_json)
    if as_json:
        print_json({"proposal": str(out), **told})


@app.command(epilog="Example: seal charter propose charter/ --put code/DIGEST.json=bundle.toml --out bundle.proposal")
def propose(
    folder: Folder,
    out: Out,
    put: Put = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="PATH", help="Take a path out of the charter.")
    ] = None,
    consortium: Annotated[
        Path | None, typer.Option("--consortium", metavar="TOML", help="Another consortium: members, brokers, numbers.")
    ] = None,
    renew: Annotated[
        list[str] | None, typer.Option("--renew", metavar="ROLE", help="Issue a role again, with a new expiry.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="DIR", help="Put an image's reference values: its folder.")
    ] = None,
    builder: Annotated[
        Path | None, typer.Option("--builder", metavar="FILE", help="The public key of the images' builder.")
    ] = None,
    role: Annotated[
        list[str] | None, typer.Option("--role", metavar="ROLE", help="A role that the images' guests may have.")
    ] = None,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose a change of the charter: files put or removed, another consortium, roles renewed, images admitted."""
    from policies.charter import Changes

    changes = Changes(
        put={**put_files(put), **image_targets(image or (), builder, role or ())},
        remove=frozenset(remove or ()),
        consortium=None if consortium is None else consortium_file(consortium),
        renew=frozenset(renew or ()),
    )
    _propose(folder, trust, at, note, out, lambda _: changes, as_json)


@app.command(epilog="Example: seal charter rotate charter/ --member cygnus-bio --new-key new.pub --out new.json")
def rotate(
    folder: Folder,
    out: Out,
    member: Annotated[str | None, typer.Option("--member", help="The member whose key is replaced.")] = None,
    broker: Annotated[str | None, typer.Option("--broker", help="The broker whose keys are replaced.")] = None,
    new_key: Annotated[Path | None, typer.Option("--new-key", metavar="PUB", help="The new public key, PEM.")] = None,
    issuer: Annotated[
        Path | None, typer.Option("--issuer", metavar="CERT", help="A broker's new issuer certificate, PEM.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A broker's new URL.")] = None,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose another key for a member (lost or stolen), or other keys or another place for a broker."""
    from policies.charter.runbooks import replace_broker, replace_member_key

    if (member is None) == (broker is None):
        raise Unusable("name either a member or a broker", where="--member, --broker", do="Give one of the two.")
    pem = None if new_key is None else read_file(new_key).decode("ascii", "replace")
    if member is not None:
        if pem is None:
            raise Unusable("the new key is missing", where="--new-key", do="Name the file of the new public key.")
        _propose(folder, trust, at, note, out, lambda now: replace_member_key(now, member, pem), as_json)
        return
    certificate = None if issuer is None else read_file(issuer).decode("ascii", "replace")
    name = broker or ""
    _propose(
        folder, trust, at, note, out,
        lambda now: replace_broker(now, name, signing_key=pem, issuer_certificate=certificate, url=url), as_json,
    )  # fmt: skip


@app.command(epilog="Example: seal charter leave charter/ cygnus-bio --threshold 2 --out leave.json")
def leave(
    folder: Folder,
    member: Annotated[str, typer.Argument(help="The member that leaves.")],
    out: Out,
    threshold: Annotated[int | None, typer.Option("--threshold", help="How many must sign from then on.")] = None,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose that a member leaves, with its places, users, brokers and release policies."""
    from policies.charter.runbooks import member_leaves

    _propose(folder, trust, at, note, out, lambda now: member_leaves(now, member, threshold=threshold), as_json)


@app.command(epilog="Example: seal charter withdraw charter/ demo --out withdraw.json")
def withdraw(
    folder: Folder,
    image: Annotated[str, typer.Argument(help="The image that must run no more.")],
    out: Out,
    note: Note = "",
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Propose that an image is withdrawn, with every place that is enrolled for it."""
    from policies.charter.runbooks import withdraw_image

    _propose(folder, trust, at, note, out, lambda now: withdraw_image(now, image), as_json)


@app.command(epilog="Example: seal charter sign founding.json --key acme.key --trust root.json")
def sign(
    proposal: ProposalFile,
    key_name: Annotated[
        str, typer.Option("--key", metavar="FILE-OR-URI", help="Your private key: a file, or pkcs11:token=…;object=….")
    ],
    pin_file: PinFile = None,
    trust: Trust = None,
    charter: Annotated[
        Path | None, typer.Option("--charter", metavar="DIR", help="Your own copy: the proposal must build on it.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Read what a proposal changes, in plain words, and sign it in place."""
    from policies.charter import read_store, write_proposal
    from policies.charter import sign as add_signatures

    moment = moment_of(at)
    paper = load_proposal(proposal)
    if charter is not None:
        _must_build_on(paper, read_store(charter))
    tell(paper, moment, trust, as_json=as_json)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise Unusable(
                "nobody is there to ask", where="--yes", do="Read it with `seal charter read`; then give --yes."
            )
        if not typer.confirm("Sign this?", err=True):
            raise typer.Exit(1)
    signed = add_signatures(
        paper, open_key(key_name, pin_file), moment, root=None if trust is None else read_file(trust)
    )
    write_file(proposal, write_proposal(signed))
    _, _, shortfalls = judged(signed, moment, trust)
    if as_json:
        print_json({"proposal": str(proposal), "complete": not shortfalls, "missing": [str(s) for s in shortfalls]})
    else:
        sys.stderr.write("Signed. " + ("Others must sign as well.\n" if shortfalls else "It can be published.\n"))


def _must_build_on(proposal: Proposal, own: dict[str, bytes]) -> None:
    from policies.charter.proposal import TIMESTAMP_FILE

    names = (set(own) | set(proposal.base)) - {TIMESTAMP_FILE}
    reasons = tuple(f"{name}: differs" for name in sorted(names) if own.get(name) != proposal.base.get(name))
    if reasons:
        raise ProposalRefused(
            "the proposal builds on another charter than yours",
            where="--charter",
            do="Get the current charter; if yours is current, ask the author to propose again on it.",
            reasons=reasons,
        )


@app.command(epilog="Example: seal charter read founding.json")
def read(proposal: ProposalFile, trust: Trust = None, at: At = None, as_json: AsJson = False) -> None:
    """Say in plain words what a proposal changes and who has signed it."""
    told = tell(load_proposal(proposal), moment_of(at), trust, as_json=as_json)
    if as_json:
        print_json(told)


@app.command(epilog="Example: seal charter publish founding.json --to charter/ --broker-key broker.key")
def publish(
    proposal: ProposalFile,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The charter's folder, new or to be changed.")],
    broker_key: Annotated[
        list[str] | None,
        typer.Option("--broker-key", metavar="FILE", help="Put the time on it with this broker's key."),
    ] = None,
    trust: Trust = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Make a proposal the charter, if enough have signed it. A broker puts the time on it, here or when serving it."""
    from policies.charter import publish as make_current
    from policies.charter import read_store, sign_timestamp, write_store

    moment = moment_of(at)
    paper = load_proposal(proposal)
    store = read_store(to) if (to / "metadata").is_dir() else {}
    new = make_current(store, paper, moment, root=None if trust is None else read_file(trust))
    for name in broker_key or ():
        new = sign_timestamp(new, open_key(name, None), moment)
    write_store(to, new)
    if as_json:
        print_json({"charter": str(to), "version": paper.version, "timestamp": bool(broker_key)})
    else:
        sys.stderr.write(f"Published version {paper.version} in {to}.\n")


@app.command(epilog="Example: seal charter timestamp charter/ --broker-key broker.key --hours 24")
def timestamp(
    folder: Folder,
    broker_key: Annotated[str, typer.Option("--broker-key", metavar="FILE", help="A broker's private key.")],
    hours: Annotated[int, typer.Option("--hours", min=1, max=720, help="How long it is valid.")] = 24,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Put the time on a charter: the broker's word that this is the current version."""
    from policies.charter import read_store, sign_timestamp, write_store

    moment = moment_of(at)
    store = sign_timestamp(read_store(folder), open_key(broker_key, None), moment, timedelta(hours=hours))
    write_store(folder, store)
    if as_json:
        print_json({"charter": str(folder), "valid-hours": hours})


@app.command(epilog="Example: seal charter verify charter/ --trust root.json --known older-charter/")
def verify(
    folder: Folder,
    trust: Annotated[Path, typer.Option("--trust", metavar="ROOT", help="The first root that you trust.")],
    known: Annotated[
        Path | None,
        typer.Option("--known", metavar="DIR", help="A charter you have seen: nothing older is accepted."),
    ] = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Verify a charter from a root that you trust; every reason against it is listed."""
    from policies.charter import current_charter, load_charter, read_store
    from policies.documents import format_time

    root = read_file(trust)
    floor = None if known is None else current_charter(read_store(known), root)
    charter = load_charter(read_store(folder), root, moment_of(at), known=floor)
    body = {
        "id": charter.id,
        "version": charter.version,
        "platform": charter.consortium.platform,
        "expires": format_time(charter.expires),
        "versions": dict(charter.versions),
        "warnings": list(charter.warnings),
    }
    if as_json:
        print_json(body)
        return
    typer.echo(f"charter {charter.id}\nversion {charter.version} ({charter.consortium.platform})")
    typer.echo(f"holds until {body['expires']}")
    for warning in charter.warnings:
        sys.stderr.write(f"mind: {warning}\n")


@app.command(epilog="Example: seal charter show charter/")
def show(folder: Folder, trust: Trust = None, as_json: AsJson = False) -> None:
    """Print what a charter says: members, brokers, images, places, bundles, users, policies. For trust, `verify`."""
    from policies.charter import current_charter, read_store
    from policies.charter.words import differences

    charter = current_charter(read_store(folder), None if trust is None else read_file(trust))
    if as_json:
        documents = {path: document.model_dump(mode="json") for path, document in charter.documents.items()}
        texts = {p: raw.decode("utf-8") for p, raw in charter.files.items() if p not in documents}
        print_json(
            {
                "id": charter.id,
                "version": charter.version,
                "consortium": charter.consortium.model_dump(mode="json"),
                "documents": documents,
                "policies": texts,
                "warnings": list(charter.warnings),
            }
        )
        return
    typer.echo(f"charter {charter.id}, version {charter.version}")
    for change in differences(None, charter):
        sentence = change.sentence.removeprefix("Add ").removeprefix("Found ")
        typer.echo(f"\n{sentence[0].upper()}{sentence[1:]}")
        for line in change.details if "policy" not in change.sentence else ():
            typer.echo(f"    {line}")


@app.command(epilog="Example: seal charter diff old-charter/ charter/")
def diff(
    old: Annotated[Path, typer.Argument(help="A charter's folder.")],
    new: Annotated[Path, typer.Argument(help="Another version of it.")],
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Say in plain words what one charter changes against another: exit status 1 if they differ."""
    from policies.charter import current_charter, read_store
    from policies.charter.words import differences

    root = None if trust is None else read_file(trust)
    before, after = (current_charter(read_store(folder), root) for folder in (old, new))
    same = before.versions == after.versions and before.digests == after.digests
    changes = () if same else differences(before, after)
    if as_json:
        print_json({"same": same, "changes": [{"sentence": c.sentence, "details": list(c.details)} for c in changes]})
    for change in () if as_json else changes:
        typer.echo(change.sentence)
        for line in change.details:
            typer.echo(f"    {line}")
    raise typer.Exit(0 if same else 1)


add_code_verbs(app)
add_policy_verbs(app)
add_verbs(app)
