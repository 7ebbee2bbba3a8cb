"""The verbs of `seal image` that build from a recipe: lock, build, reproduce, inspect."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from appliance.output import print_json
from cvm_image.build.store import Store, default_cache

if TYPE_CHECKING:
    from cvm_image.build.tools import Tools

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML); its lock lies beside it.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Where inputs and parts are kept (default: the user's cache)."),
]
Archive = Annotated[
    Path | None,
    typer.Option("--archive", metavar="DIR", help="A folder of inputs by digest, for when mirrors moved on."),
]
PinFile = Annotated[
    Path | None, typer.Option("--pin-file", metavar="FILE", help="The token's PIN, in a file of mode 0600.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Fetch nothing: use cache and archive alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs to `seal image`."""
    app.command(epilog="Example: seal image lock cvm_image/recipes/fl.toml")(lock)
    app.command(epilog="Example: seal image build cvm_image/recipes/fl.toml -o build/image --keys keys/")(build)
    app.command(epilog="Example: seal image reproduce build/image --archive inputs/ --offline")(reproduce)
    app.command(epilog="Example: seal image inspect build/image --json")(inspect)


def lock(recipe: RecipeFile, cache: Cache = None, archive: Archive = None, as_json: AsJson = False) -> None:
    """Pin every input of a recipe by version and digest, as the archives are today; --archive keeps a copy of each."""
    from cvm_image.build.lock import lock_path
    from cvm_image.build.locking import archive_inputs, lock_recipe

    store = _store(cache)
    locked = lock_recipe(recipe, store=store, say=_say)
    kept = archive_inputs(recipe, locked, store=store, archive=archive) if archive is not None else None
    facts = {
        "lock": str(lock_path(recipe)),
        "tools": len(locked.tools),
        "base": len(locked.base),
        "wheels": len(locked.wheels),
    }
    if as_json:
        print_json(facts | ({} if kept is None else {"archived": kept}))
    else:
        typer.echo(f"locked {facts['base']} packages and {facts['wheels']} wheels in {facts['lock']}")


def build(
    recipe: RecipeFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The image folder; replaced as a whole.")
    ],
    keys: Annotated[Path, typer.Option("--keys", metavar="DIR", help="The signing keys (`seal image keys`).")],
    variant: Annotated[
        Literal["hardware", "virtual"] | None,
        typer.Option(help="Which attester the guest uses (default: the recipe's)."),
    ] = None,
    pin_file: PinFile = None,
    offline: Offline = False,
    cache: Cache = None,
    archive: Archive = None,
    as_json: AsJson = False,
) -> None:
    """Build a bootable image from a recipe and its lock, and sign it. The same inputs give the same bytes."""
    from cvm_image.build.image import build_image
    from cvm_image.signing import load_signing_keys

    manifest = build_image(
        recipe,
        output,
        store=_store(cache, archive),
        keys=load_signing_keys(keys, pin_file),
        say=_say,
        variant=variant,
        offline=offline,
    )
    facts = {
        "image": str(output),
        "name": manifest.name,
        "platform": manifest.platform,
        "root_hash": manifest.root_hash,
        "measurements": len(manifest.measurements),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
    }
    if as_json:
        print_json(facts)
    else:
        typer.echo(f"built {output}: {facts['name']} ({facts['platform']}), root hash {facts['root_hash']}")


def reproduce(
    image: Annotated[Path, typer.Argument(metavar="DIR", help="An image folder.")],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="The recipe that it was built from (default: from the archive)."),
    ] = None,
    offline: Offline = False,
    cache: Cache = None,
    archive: Archive = None,
    as_json: AsJson = False,
) -> None:
    """Build the image again, sharing nothing but the inputs, and compare. Exit status 1 if one bit differs.

    Without --recipe, recipe and lock are those that the image's provenance names, taken from --archive.
    """
    from cvm_image.build.reproduction import reproduce as rebuild

    same = rebuild(image, recipe, store=_store(cache, archive), say=_say, offline=offline)
    if as_json:
        print_json({"image": str(image), "reproduced": True, "files": same})
    else:
        typer.echo(f"reproduced: {', '.join(same)} are the same bit for bit")


def inspect(
    image: Annotated[Path, typer.Argument(metavar="DIR", help="An image folder.")],
    cache: Cache = None,
    as_json: AsJson = False,
) -> int:
    """Show, from the image itself, that it is locked down. Exit status 1 if one check does not hold."""
    from cvm_image.build.inspection import inspect_image

    findings = inspect_image(image, tools_of(cache, "inspect"))
    holds = all(finding.ok for finding in findings)
    if as_json:
        print_json({"image": str(image), "ok": holds, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            typer.echo(f"{'ok     ' if finding.ok else 'REFUSED'} {finding.check}: {finding.seen}")
    return 0 if holds else 1


def tools_of(cache: Path | None, name: str) -> Tools:
    """The tools tree of the cache, with a log of this command's `name`."""
    from cvm_image.build.image import new_log
    from cvm_image.build.launching import find_tools

    store = _store(cache)
    return find_tools(store, log=new_log(store, name))


def _store(cache: Path | None, archive: Path | None = None) -> Store:
    return Store(default_cache() if cache is None else cache, archive=archive)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
