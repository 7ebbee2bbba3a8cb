"""`seal job review`: what a reviewer of a bundle sees before anything is signed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.charter_files import read_file
from appliance.output import print_json
from policies.errors import Refused

if TYPE_CHECKING:
    from fl.jobs.bundle import Bundle
    from fl.jobs.outputs import Capacity
    from fl.jobs.review import Review
    from policies.charter import Charter


def review(
    file: Annotated[Path, typer.Argument(metavar="BUNDLE", help="job.bundle, as `seal job bundle` made it.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="BUNDLE", help="The version that was approved last.")
    ] = None,
    charter: Annotated[
        Path | None, typer.Option("--charter", metavar="DIR", help="The charter that must have approved --against.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="ROOT", help="The first root that you trust (1.root.json).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a bundle changes, what its code reaches for, and how many bits it may let out of a site."""
    from fl.jobs.review import review as reviewed

    bundle, earlier = _bundle(file), None if against is None else _bundle(against)
    said = None
    if charter is not None:
        from policies.charter import current_charter, read_store

        said = current_charter(read_store(charter), None if trust is None else read_file(trust))
        if earlier is not None and said.bundle(earlier.digest) is None:
            raise Refused(
                f"the charter does not approve {earlier.digest}, so a difference to it would mislead",
                where=str(against),
                do="Compare with a bundle that is approved, or with none.",
            )
    found = reviewed(bundle, earlier)
    if as_json:
        capacity = {**asdict(found.capacity), "a_round": found.capacity.a_round, "job": found.capacity.job}
        print_json({**asdict(found), "capacity": capacity, "verdict": _verdict(said, bundle)})
        return
    _tell(found, bundle, _verdict(said, bundle))


def _bundle(file: Path) -> Bundle:
    from fl.jobs.bundle import MAX_BUNDLE, parse_bundle

    return parse_bundle(read_file(file, MAX_BUNDLE))


def _verdict(charter: Charter | None, bundle: Bundle) -> str | None:
    found = None if charter is None else charter.verdict(bundle.digest)
    return None if found is None else f"{found.verdict}{': ' + found.note if found.note else ''}"


def _tell(found: Review, bundle: Bundle, verdict: str | None) -> None:
    from policies.charter.words import visible

    def say(text: str = "") -> None:
        typer.echo("\n".join(visible(line) for line in text.split("\n")))

    say(f"bundle {found.bundle}, job {bundle.settings.name}" + (f" ({verdict})" if verdict else ""))
    say(f"compared with {found.against}" if found.against else "compared with nothing: all of it is new")
    for word, names in (("added", found.added), ("removed", found.removed), ("changed", found.changed)):
        for name in names:
            say(f"  {word:8} {name}")
    say("\nSettings" + (" that changed" if found.against else ""))
    for line in found.settings:
        say(f"  {line}")
    say("\nPackages that the code was made with" + (": what changed" if found.against else ""))
    for line in found.lock or ("none",):
        say(f"  {line}")
    say("\nWhat the code reaches for (found by reading it; what is hidden on purpose may be missing)")
    for one in found.findings:
        if one.kind != "import":
            say(f"  {one.kind:11} {one.file}:{one.line}  {one.what}")
    imported = sorted({one.what.removeprefix("imports ") for one in found.findings if one.kind == "import"})
    say(f"  imports besides: {', '.join(imported) or 'none'}")
    say("\nWhat may leave each site")
    _tell_capacity(found.capacity, bundle)
    if found.epsilon is not None and bundle.settings.privacy is not None:
        promise = f"ε {found.epsilon:.4g} at δ {bundle.settings.privacy.delta:g}"
        say(f"  each record is protected: {promise} for the whole job")
    else:
        say("  no promise about single records: the script may choose what the declared bits say")
    if found.difference:
        say("\nDifference\n" + found.difference.rstrip("\n"))


def _tell_capacity(capacity: Capacity, bundle: Bundle) -> None:
    for name in ("tensors", "weight", "metrics", "values", "lines"):
        typer.echo(f"  {name:8} {getattr(capacity, name):>16} bits a round")
    timing = "not bounded (no release_seconds)" if capacity.timing is None else f"{capacity.timing:>16} bits a round"
    typer.echo(f"  timing   {timing}")
    typer.echo(f"  ending   {capacity.ending:>16} bits, once")
    typer.echo(f"  together {capacity.job:>16} bits in {capacity.rounds} rounds")
    if bundle.settings.outputs.metrics is None:
        typer.echo("  metrics are not declared by name: a script may spell out what it likes in their names")
