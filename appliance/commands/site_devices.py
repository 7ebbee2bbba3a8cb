"""`seal site group-key`, `device-token` and `device-certificate`: what gateways share, and what lets a device in."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Literal

import typer

from appliance.charter_files import moment_of, read_file
from appliance.output import print_json
from policies.errors import Unusable

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def group_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file (0600) for the value.")],
    after: Annotated[
        Path | None, typer.Option("--after", metavar="FILE", help="The value until now: its keys still open messages.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the key that all gateways share: deposit it with `seal secret put`, for the role gateway alone.

    With --after it rotates the key that is there; deposit the new value in the old one's place.
    """
    from attestation.hybrid import PRIVATE_SIZE
    from fl.edge.sealing import GroupKeys, new_group_key
    from policies.keys import read_secret, write_secret

    if file.exists():
        raise Unusable("there is a file already", where=str(file), do="Name a new file.")
    previous = b"" if after is None else read_secret(after)
    if previous:
        GroupKeys.parse(previous, "0" * 64)  # whether it is one
    value = new_group_key(previous)
    write_secret(file, value)
    count = len(value) // PRIVATE_SIZE
    if as_json:
        print_json({"file": str(file), "keys": count})
    else:
        typer.echo(f"{file} holds {count} key{'s' if count > 1 else ''}, the newest first")


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The charter's folder (metadata/ and targets/).")]
PublicKey = Annotated[Path, typer.Argument(metavar="PUBLIC-KEY", help="The device's P-256 key, in PEM.")]
IssuerName = Annotated[str, typer.Option("--issuer", metavar="NAME", help="The issuer, by its name in the charter.")]
IssuerKey = Annotated[Path, typer.Option("--key", metavar="FILE", help="The issuer's signing key.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", metavar="HEX", help="Its id, 32 hex digits (default: a random one).")
]
JobNames = Annotated[list[str] | None, typer.Option("--job", help="A job's name, or its beginning and *.")]
Days = Annotated[int | None, typer.Option("--days", min=1, help="How long (default: as the issuer may).")]
Root = Annotated[Path | None, typer.Option("--trust", metavar="ROOT", help="The root that you trust.")]
At = Annotated[str | None, typer.Option("--at", metavar="RFC3339", help="The time (default: now).")]


def device_token(
    folder: Folder,
    public_key: PublicKey,
    issuer: IssuerName,
    key: IssuerKey,
    device: DeviceName = None,
    job: JobNames = None,
    days: Days = None,
    trust: Root = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Issue a device's token: it opens nothing without the device's own key."""
    _issue("token", folder, public_key, issuer, key, device, job, days, trust, at, as_json=as_json)


def device_certificate(
    folder: Folder,
    public_key: PublicKey,
    issuer: IssuerName,
    key: IssuerKey,
    device: DeviceName = None,
    job: JobNames = None,
    days: Days = None,
    trust: Root = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Issue a device's X.509 certificate, as the base64 of its DER: a device shows it in the token's place."""
    _issue("certificate", folder, public_key, issuer, key, device, job, days, trust, at, as_json=as_json)


def _issue(
    what: Literal["token", "certificate"],
    folder: Path,
    public_key: Path,
    issuer: str,
    key: Path,
    device: str | None,
    job: list[str] | None,
    days: int | None,
    trust: Path | None,
    at: str | None,
    *,
    as_json: bool,
) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from pydantic import ValidationError

    from fl.edge.credentials import read_credential
    from fl.edge.device_certificates import issue_certificate
    from fl.edge.tokens import issue_token
    from policies.charter import current_charter, read_store
    from policies.keys import load_private_key

    charter = current_charter(read_store(folder), None if trust is None else read_file(trust))
    known = charter.device_issuer(issuer)
    if known is None:
        raise Unusable(f"{issuer:.80} issues no tokens in this charter", where="--issuer", do="Enrol the issuer first.")
    try:
        public = load_pem_public_key(read_file(public_key, 4096))
        if not isinstance(public, EllipticCurvePublicKey):
            raise ValueError("not an elliptic curve's")
        moment, name = moment_of(at), device or secrets.token_hex(16)
        seconds = None if days is None else days * 86400
        issue = issue_token if what == "token" else issue_certificate
        made = issue(
            known, load_private_key(key), charter.id, public, name, moment, jobs=tuple(job or ["*"]), seconds=seconds
        )
    except (ValidationError, ValueError, UnsupportedAlgorithm) as error:
        raise Unusable(
            "the device's key, its id or a job's name is none", where="command line", do="Give a P-256 key in PEM."
        ) from error
    read_credential(made, charter, moment)  # as a gateway will
    if as_json:
        print_json({"device": f"{issuer}/{name}", what: made})
    else:
        typer.echo(made)
