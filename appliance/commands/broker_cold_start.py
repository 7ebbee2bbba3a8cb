"""`seal broker cold-start`: give a broker its key-encryption keys back when no broker can."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.output import print_json
from policies.errors import Unusable

if TYPE_CHECKING:
    from attestation.broker.cold_start import Request
    from policies.charter import Charter

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Give a broker its keys back when no broker can.")
LIMIT = 4 * 1024 * 1024
"""Bytes of an exported request, its charter included."""

Where = Annotated[str, typer.Option("--broker", metavar="NAME=URL", help="The locked broker.")]
Root = Annotated[Path, typer.Option("--root", metavar="ROOT", help="The charter's first root (1.root.json).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def cold_start() -> None:
    """Give a broker its keys back when no broker can: export its request, have custodians answer, bring answers."""


@app.command(
    epilog="Example: seal broker cold-start export request.json --broker one=https://broker:8443 --root root.json"
)
def export(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The new file for custodians.")],
    broker: Where,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Write what a locked broker asks, with the charter that it follows, for custodians to judge offline."""
    from attestation.canonical import b64
    from attestation.connection import fetch_charter
    from attestation.endorsements.sources import read_bounded

    fetched = fetch_charter([_address(broker)], root=read_bounded(root, 1024 * 1024, "root"))
    try:
        answer = fetched.client.answer("GET", "/v1/cold-start", None, nonce="")
    finally:
        fetched.client.close()
    charter = {name: b64(raw) for name, raw in fetched.store.items()}
    document = {"charter": charter, "request": answer.result.get("request")}
    try:
        with out.open("x") as file:
            json.dump(document, file)
    except OSError as error:
        raise Unusable(f"it cannot be written: {error.strerror}", where=str(out), do="Name a new file.") from error
    request, _ = _read(out, fetched.root)
    if as_json:
        print_json({"file": str(out), "custodians": sorted(request.recovery.shares), "needed": request.recovery.k})
        return
    typer.echo(
        f"Have {request.recovery.k} of the custodians of {', '.join(sorted(request.recovery.shares))} answer {out}."
    )


@app.command(
    epilog="Example: seal broker cold-start answer request.json answer.jws --root root.json --member acme-pharma "
    "--keys custodian/"
)
def answer(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="What `export` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="ANSWER", help="The new file for the answer.")],
    root: Root,
    member: Annotated[str, typer.Option(help="The member whose custodian you are.")],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="The custodian's folder of keys.")],
    as_json: AsJson = False,
) -> None:
    """Judge who asks, offline, and seal this custodian's share to its attested key. Exit status 1: give it nothing."""
    from attestation.broker.cold_start import answer_request
    from attestation.endorsements.sources import read_bounded
    from attestation.hybrid import PRIVATE_SIZE, HybridPrivateKey
    from policies.keys import load_private_key, read_secret

    asked, charter = _read(request, read_bounded(root, 1024 * 1024, "root"))
    results_key = HybridPrivateKey.from_bytes(read_secret(keys / "results.key", PRIVATE_SIZE))
    token = answer_request(asked, charter, _now(), member, results_key, load_private_key(keys / "signing.key"))
    try:
        with out.open("x") as file:
            file.write(token)
    except OSError as error:
        raise Unusable(f"it cannot be written: {error.strerror}", where=str(out), do="Name a new file.") from error
    if as_json:
        print_json({"file": str(out), "broker": asked.recovery.broker, "member": member})
        return
    typer.echo(f"Broker {asked.recovery.broker} is the one that the charter has enrolled. {out} is for it alone.")


@app.command(
    epilog="Example: seal broker cold-start join a.jws b.jws --broker one=https://broker:8443 --root root.json"
)
def join(
    answers: Annotated[list[Path], typer.Argument(metavar="ANSWER...", help="What custodians answered.")],
    broker: Where,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Bring answers to the broker. Exit status 1 if it still needs more."""
    from attestation.connection import fetch_charter
    from attestation.endorsements.sources import read_bounded
    from attestation.jws import MAX_TOKEN

    tokens = [read_bounded(path, MAX_TOKEN, "answer").decode("ascii", "replace") for path in answers]
    fetched = fetch_charter([_address(broker)], root=read_bounded(root, 1024 * 1024, "root"))
    needed = 0
    try:
        for token in tokens:
            body = json.dumps({"answer": token}).encode()
            needed = int(fetched.client.answer("POST", "/v1/cold-start", body, nonce="").result["needed"])
            if needed == 0:
                break
    finally:
        fetched.client.close()
    if as_json:
        print_json({"needed": needed})
    else:
        typer.echo("The broker has its keys." if needed == 0 else f"The broker needs {needed} more.")
    if needed:
        raise typer.Exit(1)


def _read(path: Path, root: bytes) -> tuple[Request, Charter]:
    """A request and the charter that came with it, which verifies itself from the root. Raises Unusable or Refused."""
    from attestation.broker.cold_start import MAX_REQUEST, Request
    from attestation.canonical import read_json_object, unb64
    from attestation.endorsements.sources import read_bounded
    from attestation.messages import check_message
    from policies.charter import load_charter

    where = str(path)
    document = read_json_object(read_bounded(path, LIMIT, "request"), where=where, limit=LIMIT)
    charter, request = document.get("charter"), document.get("request")
    if set(document) != {"charter", "request"} or not isinstance(charter, dict) or not isinstance(request, dict):
        raise Unusable("this is no exported request", where=where, do="Make it by `seal broker cold-start export`.")
    store = {name: unb64(str(text), where=where) for name, text in charter.items()}
    asked = check_message(Request, request)
    if len(asked.to_bytes()) > MAX_REQUEST:
        raise Unusable(f"the request has more than {MAX_REQUEST} bytes", where=where, do="Export it again.")
    return asked, load_charter(store, root, _now())


def _address(text: str) -> tuple[str, str]:
    name, found, url = text.partition("=")
    if not found or not name or not url.startswith("https://"):
        raise Unusable(f"{text[:100]!r} is no NAME=URL", where="--broker", do="Write one=https://broker.example:8443.")
    return name, url


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
