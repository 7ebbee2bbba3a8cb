"""Files that `seal charter` reads and writes, and what it says of a proposal."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from policies.errors import Unusable

if TYPE_CHECKING:
    from policies.charter import Charter, Proposal
    from policies.charter.trust import Shortfall
    from policies.documents import Consortium

FILE_LIMIT: Final = 16 * 1024 * 1024


def read_file(path: Path, limit: int = FILE_LIMIT) -> bytes:
    """The bytes of a file. Raises Unusable if it cannot be read or is larger than `limit`."""
    do = "Name a file that can be read."
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}", where=str(path), do=do) from error
    if len(raw) > limit:
        raise Unusable(f"larger than {limit} bytes", where=str(path), do=do)
    return raw


def write_file(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise Unusable(f"cannot be written: {error.strerror}", where=str(path), do="Choose another place.") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
        os.fchmod(file.fileno(), 0o644)
    Path(name).replace(path)


def moment_of(text: str | None) -> datetime:
    """The time that `--at` says, or now."""
    if text is None:
        return datetime.now(UTC)
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", text):
        raise Unusable(f"{text!r} is no time", where="--at", do="Write it as 2026-03-01T12:00:00Z.")
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise Unusable(f"{text!r} is no time", where="--at", do="Write it as 2026-03-01T12:00:00Z.") from error


def put_files(put: Iterable[str] | None) -> dict[str, bytes]:
    """The target files of `--put PATH=FILE` options, documents in canonical form."""
    from policies.charter.written import written_target

    files = {}
    for item in put or ():
        path, equals, file = item.partition("=")
        if not equals or not file:
            raise Unusable(f"{item!r} is not PATH=FILE", where="--put", do="For example images/demo.json=demo.toml.")
        files[path] = written_target(path, read_file(Path(file)), file, partial(_beside, Path(file).parent))
        _check_rules(path, files[path], file)
    return files


def _beside(folder: Path, name: str) -> bytes:
    return read_file(folder / name)


def _check_rules(path: str, raw: bytes, where: str) -> None:
    """Refuse rules that a broker could not evaluate, before anybody signs them."""
    from policies.charter.content import rego_complaint
    from policies.charter.layout import rego_package
    from policies.decisions import Rules

    package = rego_package(path)
    if package is not None:
        what = rego_complaint(raw, package) or Rules({where: raw.decode("utf-8")}).complaint(package)
        if what is not None:
            raise Unusable(f"these rules decide nothing: {what}", where=where, do="See docs/how-to/write-a-policy.md.")
    if path == "policies/appraisal.toml":
        from attestation.verifier.appraisal_policy import load_appraisal_policy

        try:
            load_appraisal_policy(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Unusable("not UTF-8 text", where=where, do="See docs/reference/evidence-policy.md.") from error


def consortium_file(path: Path) -> Consortium:
    """The consortium in a TOML file, its keys in files beside it."""
    from policies.charter.written import read_consortium

    return read_consortium(read_file(path), str(path), lambda name: read_file(path.parent / name))


def load_proposal(path: Path) -> Proposal:
    """The proposal in a file."""
    from policies.charter import parse_proposal
    from policies.charter.proposal import PROPOSAL_LIMIT

    return parse_proposal(read_file(path, PROPOSAL_LIMIT), str(path))


def judged(
    proposal: Proposal, at: datetime, trust: Path | None
) -> tuple[Charter, Charter | None, tuple[Shortfall, ...]]:
    from policies.charter import current_charter, review

    root = None if trust is None else read_file(trust)
    charter, shortfalls = review(proposal, at, root=root)
    return charter, current_charter(proposal.base, root) if proposal.base else None, shortfalls


def tell(proposal: Proposal, at: datetime, trust: Path | None, *, as_json: bool) -> dict[str, Any]:
    """Say in plain words what a proposal changes and whose signatures it still needs; return the same for JSON."""
    from policies.charter.words import differences, standing, visible

    charter, before, shortfalls = judged(proposal, at, trust)
    changes, waits = differences(before, charter), standing(shortfalls)
    if not as_json:
        what = "a new charter" if before is None else f"version {before.version} of charter {before.id[:16]}…"
        typer.echo(f"This proposal makes version {charter.version} out of {what}.")
        if proposal.note:
            typer.echo(f"Its author says: {visible(proposal.note)}")
        for change in changes:
            typer.echo(f"\n{change.sentence}")
            for line in change.details:
                typer.echo(f"    {line}")
        typer.echo("\n" + ("\n".join(f"Signatures: {line}." for line in waits) or "All signatures are there."))
    return {
        "version": charter.version,
        "charter": None if before is None else before.id,
        "note": proposal.note,
        "changes": [{"sentence": change.sentence, "details": list(change.details)} for change in changes],
        "missing-signatures": [
            {"file": s.file, "role": s.role, "needed": s.needed, "signed": list(s.signed), "may-sign": list(s.may_sign)}
            for s in shortfalls
        ],
    }


def open_key(name: str, pin_file: Path | None) -> Any:
    """The private key in a file or, for a pkcs11: URI, in a token."""
    if name.startswith("pkcs11:"):
        from policies.token import open_token_key

        return open_token_key(name, pin_file)
    from policies.keys import load_private_key

    return load_private_key(Path(name))
